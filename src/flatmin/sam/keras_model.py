"""The Keras model whose `fit` takes sharpness-aware steps."""

from __future__ import annotations

import inspect
from dataclasses import fields
from typing import Any

import keras
import tensorflow as tf

from .settings import Settings, invalid_argument
from .step import Step, count_examples, replicas


class SharpnessAwareMinimization(keras.Model):
    """A model whose `fit` takes sharpness-aware steps. Everything else works as before.

    `compile`, `fit`, `evaluate`, `predict` and callbacks work as on the model itself. `model` is the inner model, and
    `save` and `export` write it without the wrapper. `save_weights` also writes the state of the optimizer and of the
    method, which `BackupAndRestore` needs.

    The first four arguments are those of tf_keras' class of this name. All others are those of `Settings`, which
    explains them; they are keywords.

    Args:
        model: functional, sequential or subclassed.

    Raises:
        ValueError: `Settings` refuses a value; in `compile`, a loss is not a mean although gradients of several parts
            are averaged, or `jit_compile=True` comes with `num_batch_splits`; in `fit`, there are several workers.
    """

    def __init__(
        self,
        model: keras.Model,
        rho: float = Settings.rho,
        num_batch_splits: int | None = Settings.num_batch_splits,
        name: str | None = None,
        **settings: Any,
    ) -> None:
        checked = Settings(rho=rho, num_batch_splits=num_batch_splits, **settings)
        super().__init__(name=name, dtype=model.dtype_policy, autocast=False)  # the model gets its inputs unconverted
        self.settings = checked
        self.model = model
        self.built = model.built
        self._call_has_training_arg = model._call_has_training_arg
        if hasattr(model, "output_names"):  # losses and metrics may be given by these
            self.output_names = model.output_names
        self._step: Any = None  # a Step, as soon as there are variables

    def build(self, input_shape: Any = None) -> None:
        """Do nothing, because the inner model builds itself when it is called."""
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the inner model's outputs. Keras' call context passes `training` on to a `call` that takes it."""
        return self.model(inputs)

    def compile(
        self, optimizer: Any = "rmsprop", loss: Any = None, *arguments: Any, jit_compile: Any = "auto", **options: Any
    ) -> None:
        """`keras.Model.compile`. Refuses a loss, or a compiler, that parts of a batch cannot be averaged with."""
        splits = self.settings.num_batch_splits > 1
        if splits and jit_compile is True:
            raise invalid_argument(
                "jit_compile", "False or 'auto' with num_batch_splits: XLA cannot loop over parts of unequal size", True
            )
        for each in keras.tree.flatten(loss) if splits or self.settings.accumulate > 1 else ():
            reduction = getattr(each, "reduction", "sum_over_batch_size")
            if reduction not in ("sum_over_batch_size", "mean"):
                raise invalid_argument(
                    "loss", "losses whose reduction is 'sum_over_batch_size', since parts are averaged", each
                )
        self._step = None
        super().compile(optimizer, loss, *arguments, jit_compile=False if splits else jit_compile, **options)

    def fit(self, *args: Any, **options: Any) -> Any:
        """`keras.Model.fit`. Refuses several workers, where it fails in Keras 3 (keras issue 20585)."""
        if isinstance(self.distribute_strategy, tf.distribute.MultiWorkerMirroredStrategy):
            raise ValueError("fit does not run on several workers in Keras 3; call flatmin.sam.Step in a loop instead")
        return super().fit(*args, **options)

    def make_train_function(self, force: bool = False) -> None:
        """`keras.Model.make_train_function`. Creates the step's variables, if those of the model exist."""
        if all(layer.built for layer in self._flatten_layers()):
            self._begin()
        super().make_train_function(force)

    def _begin(self) -> None:
        if self._step is None and not self.settings.is_base_step:
            with tf.init_scope(), self.distribute_strategy.scope():
                if not self.optimizer.built:
                    self.optimizer.build(self.trainable_variables)
                self._step = Step(self.settings, self.model, self.optimizer)

    def train_step(self, data: Any) -> dict[str, Any]:
        """Take one step on (x, y, sample_weight). Loss and metrics are the first pass's."""
        if self.settings.is_base_step or (self.built and not self.trainable_variables):
            return super().train_step(data)
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if self._step is None:
            self(x, training=False)  # an unbuilt model has no variables before it is called
            self._begin()

        def forward(part: Any) -> tuple[tf.Tensor, Any]:
            x, y, sample_weight = part
            outputs = self(x, training=True) if self._call_has_training_arg else self(x)
            if self.settings.num_batch_splits > 1 and any(
                getattr(output, "_keras_mask", None) is not None for output in keras.tree.flatten(outputs)
            ):
                raise invalid_argument(
                    "num_batch_splits", "1 with masked outputs, whose steps the parts share unequally", "more"
                )
            return self.compute_loss(x, y, outputs, sample_weight, training=True), outputs

        loss, outputs = self._step(forward, (x, y, sample_weight))
        for metric in self.metrics:
            if metric.name == "loss":
                metric.update_state(loss * replicas(), sample_weight=count_examples(x))
        return self.compute_metrics(x, y, outputs, sample_weight)

    def save(self, *args: Any, **options: Any) -> None:
        """Save the inner model."""
        self.model.save(*args, **options)

    def export(self, *args: Any, **options: Any) -> None:
        """Export the inner model."""
        self.model.export(*args, **options)

    def save_own_variables(self, store: Any) -> None:
        """Store the method's state for `save_weights`."""
        for index, variable in enumerate(self._step.variables if self._step else ()):
            store[str(index)] = variable.numpy()

    def load_own_variables(self, store: Any) -> None:
        """Load what `save_own_variables` stored, if training has begun. Values that are missing become 0."""
        for index, variable in enumerate(self._step.variables if self._step else ()):
            variable.assign(store[str(index)] if str(index) in store else tf.zeros_like(variable.value))


def _signature(with_self: bool) -> inspect.Signature:
    """The constructor's signature with every field of `Settings` in place of **settings."""
    parameters = [*inspect.signature(SharpnessAwareMinimization.__init__).parameters.values()][:-1]
    names = {parameter.name for parameter in parameters}
    parameters += [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.type)
        for field in fields(Settings)
        if field.name not in names
    ]
    return inspect.Signature(parameters if with_self else parameters[1:], return_annotation=None)


# Keras' own `__new__` hides the signature of `__init__`, so the class needs it too.
SharpnessAwareMinimization.__signature__ = _signature(with_self=False)
vars(SharpnessAwareMinimization)["__init__"].__signature__ = _signature(with_self=True)
