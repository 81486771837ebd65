"""One training step: a batch to activations, the loss, the gradients, and an update of the trained layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

import keras
import numpy as np
import tensorflow as tf

from flatmin.common.errors import InputError
from flatmin.common.params import Cosine, Training
from flatmin.models.classifier import TrainedLayers
from flatmin.training.batch_sources import BatchSource
from flatmin.training.optimizer import make_optimizer, updates
from flatmin.training.schedule import cosine

# A batch, or a part of it -> its mean loss, regularisation included, and the logits.
Forward = Callable[[Any], tuple[tf.Tensor, Any]]


class UpdateRule(Protocol):
    """Turns a batch into one update of a model's trainable weights; `flatmin.sam.Step` is another one."""

    @property
    def variables(self) -> Sequence[Any]:
        """The state between steps."""

    @property
    def gradient_evaluations(self) -> int:
        """The number of images that went forward and backward so far, counted once for each pass."""

    def __call__(self, forward: Forward, batch: Any, count: tf.Tensor) -> tuple[tf.Tensor, Any]:
        """Update the weights; return the first pass's loss and logits.

        count: float32, the number of real examples in the batch.
        """


@dataclass(frozen=True)
class StepSettings:
    """Which update rule a training takes.

    Args:
        make: makes the rule for a built model and its built optimizer, within the strategy's scope.
        depends_on: settings that results depend on; they distinguish resume states.
        rooms: folders of src/flatmin that the rule's code lies in.
        accumulate: batches for each update of the optimizer.
        hint: an advice for a training that diverged.
    """

    make: Callable[[keras.Model, keras.optimizers.Optimizer], UpdateRule]
    depends_on: Mapping[str, Any] = field(default_factory=dict)
    rooms: tuple[str, ...] = ()
    accumulate: int = 1
    hint: str = ""


class PlainStep:
    """The optimizer's own step along the gradient of the batch's loss."""

    def __init__(self, model: keras.Model, optimizer: keras.optimizers.Optimizer) -> None:
        self._model, self._optimizer = model, optimizer
        self._evaluations = keras.Variable(
            tf.zeros((), tf.int64), dtype="int64", trainable=False, aggregation="sum", name="gradient_evaluations"
        )
        self.variables = [self._evaluations]

    @property
    def gradient_evaluations(self) -> int:
        return int(self._evaluations.numpy())

    @tf.autograph.experimental.do_not_convert
    def __call__(self, forward: Forward, batch: Any, count: tf.Tensor) -> tuple[tf.Tensor, Any]:
        with tf.GradientTape() as tape:
            loss, logits = forward(batch)
            scaled = self._optimizer.scale_loss(loss)
        variables = self._model.trainable_variables
        self._optimizer.apply(tape.gradient(scaled, [variable.value for variable in variables]), variables)
        # Not the Keras variable's own `assign_add`: that assigns the sum, and replicas would add up their sums.
        self._evaluations.value.assign_add(tf.cast(count, tf.int64))
        return loss, logits


PLAIN = StepSettings(PlainStep)


@dataclass(frozen=True)
class Sums:
    """Sums over the images of some steps: float64 [SIZE], as `TrainStep` returns them."""

    totals: np.ndarray
    SIZE: ClassVar[int] = 5  # loss, right predictions, images; of wrongly labelled images right predictions and number

    def means(self) -> dict[str, float]:
        """The mean loss, and accuracy by the given labels; where some are wrong, also on clean and on wrong ones."""
        loss, correct, count, correct_wrong, wrong = self.totals.tolist()
        means = {"loss": loss / count, "accuracy": correct / count}
        if wrong and wrong < count:
            means["accuracy_clean"] = (correct - correct_wrong) / (count - wrong)
            means["accuracy_wrong"] = correct_wrong / wrong
        return means


class TrainStep:
    """Trains layers on distributed batches: owns the optimizer and the update rule. Construct under `strategy.scope()`.

    Labels of batches are those of `Records.training_labels`.

    Args:
        steps: the number of batches in all.
        classes: the number of classes.
        weights: of the losses of each class, float32 [classes]; None for equal ones.

    Raises:
        InputError: more batches are accumulated for an update than there are.
    """

    def __init__(
        self,
        strategy: tf.distribute.Strategy,
        source: BatchSource,
        layers: TrainedLayers,
        recipe: Training,
        settings: StepSettings,
        *,
        steps: int,
        classes: int,
        weights: np.ndarray | None = None,
    ) -> None:
        if settings.accumulate > steps:
            raise InputError(
                f"sam.accumulate: expected at most {steps}, the batches of all epochs, received {settings.accumulate}"
            )
        self.strategy, self.source, self.layers, self.settings = strategy, source, layers, settings
        self.replicated = strategy.num_replicas_in_sync > 1
        self._recipe, self._updates = recipe, steps / settings.accumulate
        self.optimizer = make_optimizer(recipe)
        self.optimizer.build(layers.trainable_variables)
        self.rule = settings.make(layers, self.optimizer)
        self._classes, self._weights = classes, weights
        self._losses = keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=recipe.label_smoothing, reduction=None
        )
        self._function = tf.function(self._distributed_step)

    @property
    def variables(self) -> list[Any]:
        """All that a resumed training needs: the layers' variables, the optimizer's and the update rule's."""
        return [*self.layers.variables, *self.optimizer.variables, *self.rule.variables]

    def rate(self) -> float:
        """The learning rate of the next update: the schedule's, or without one what the optimizer has."""
        if isinstance(self._recipe.schedule, Cosine):
            return cosine(updates(self.optimizer), self._updates, self._recipe)
        return float(tf.convert_to_tensor(self.optimizer.learning_rate))

    def __call__(self, batches: Any) -> np.ndarray:
        """Train on the next batch; return float32 [Sums.SIZE]."""
        if isinstance(self._recipe.schedule, Cosine):
            self.optimizer.learning_rate = self.rate()
        return self._function(batches).numpy()

    def _distributed_step(self, batches: Any) -> tf.Tensor:
        sums = self.strategy.run(self._replica_step, args=(next(batches),))
        return self.strategy.reduce(tf.distribute.ReduceOp.SUM, sums, axis=None)

    def _replica_step(self, batch: tuple[Any, tf.Tensor]) -> tf.Tensor:
        inputs, labels = pad_empty_shard(*batch) if self.replicated else batch
        wrong = labels >= self._classes
        labels = tf.where(wrong, labels - self._classes, labels)
        present = tf.cast(labels >= 0, tf.float32)
        count = tf.reduce_sum(present) if self.replicated else tf.cast(tf.shape(labels)[0], tf.float32)
        global_count = count
        if self.replicated:
            global_count = tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, count)

        def forward(part: Any) -> tuple[tf.Tensor, tf.Tensor]:
            activations, labels, present = part
            logits = self.layers(activations, training=True)
            losses = self._losses(tf.one_hot(labels, self._classes), logits)
            if self._weights is not None:
                losses *= tf.gather(tf.constant(self._weights), tf.maximum(labels, 0))
            if not self.replicated:
                return tf.reduce_sum(losses) / tf.cast(tf.shape(labels)[0], tf.float32) + sum(
                    self.layers.losses
                ), logits
            mean = tf.math.divide_no_nan(tf.reduce_sum(losses * present), tf.reduce_sum(present))
            # A replica's share of the global mean; regularisation is the same on all.
            regularisation = sum(self.layers.losses) / self.strategy.num_replicas_in_sync
            return mean * count / global_count + regularisation, logits

        activations = self.source.activations(inputs)
        loss, logits = self.rule(forward, (activations, labels, present), count)
        correct = tf.argmax(logits, axis=1, output_type=tf.int32) == labels
        counts = [tf.reduce_sum(tf.cast(each, tf.float32)) for each in (correct, correct & wrong, wrong)]
        return tf.stack([loss * global_count, counts[0], count, *counts[1:]])


def pad_empty_shard(inputs: Any, labels: tf.Tensor) -> tuple[Any, tf.Tensor]:
    """Pad an empty per-replica batch with one black image labelled -1, because layers fail on zero examples."""
    missing = tf.maximum(0, 1 - tf.shape(labels)[0])

    def padded(tensor: tf.Tensor) -> tf.Tensor:
        return tf.concat([tensor, tf.zeros((missing, *tensor.shape[1:]), tensor.dtype)], axis=0)

    return tf.nest.map_structure(padded, inputs), tf.concat([labels, tf.fill((missing,), -1)], axis=0)
