"""The Keras model whose `fit` takes sharpness-aware steps."""

from __future__ import annotations

import contextlib
import functools
import inspect
import warnings
from dataclasses import fields, replace
from typing import Any

import keras
from keras import ops

from . import backends
from .loss import is_mean
from .memory import Memory
from .methods import METHODS
from .scope import PassScope
from .settings import Settings, invalid_argument
from .step import Outcome, Step

# Settings that may be functions, or objects that Keras saves.
_SAVED_FUNCTIONS = ("rho", "perturb", "sigma")


@keras.saving.register_keras_serializable(package="flatmin")
class SharpnessAwareMinimization(keras.Model):
    """A model whose `fit` takes sharpness-aware steps. Everything else works as before.

    `compile`, `fit`, `evaluate`, `predict` and callbacks work as on the model itself, which computes losses, metrics
    and predictions, its own overrides included. `save` and `save_weights` also write the state of the optimizer and of
    the method, so that a training resumes exactly; save `model` for a file that knows no wrapper. `rho`,
    `num_batch_splits` and `settings` may be set at any time.

    The first four arguments are those of tf_keras' class of this name. All others are those of `Settings`, which
    explains them; they are keywords.

    Beside the model's metrics there are `sam/skipped`, the number of steps in the epoch that were skipped because a
    gradient was not finite; `sam/perturbed_loss`, the loss at the perturbed weights; `sam/gap`, how much higher that
    is; and `sam/gradient_norm`.

    Args:
        model: functional, sequential or subclassed; without a `train_step` of its own.

    Raises:
        ValueError: `Settings` refuses a value, or the model has a `train_step` of its own or is a wrapper already;
            in `compile`, a loss is not a mean although gradients of several parts are averaged, or `jit_compile=True`
            comes with `num_batch_splits` on TensorFlow, or on PyTorch; in `fit`, there are several workers.

    Example:
        >>> import keras, numpy as np
        >>> network = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
        >>> model = SharpnessAwareMinimization(network, rho=0.05)
        >>> model.compile("sgd", "mse")
        >>> history = model.fit(np.ones((8, 3)), np.ones((8, 1)), epochs=2, verbose=0).history
        >>> sorted(history)
        ['loss', 'sam/gap', 'sam/gradient_norm', 'sam/perturbed_loss', 'sam/skipped']
    """

    def __init__(
        self,
        model: keras.Model,
        rho: Any = Settings.rho,
        num_batch_splits: int | None = Settings.num_batch_splits,
        name: str | None = None,
        **settings: Any,
    ) -> None:
        checked = Settings(rho=rho, num_batch_splits=num_batch_splits, **settings)
        if isinstance(model, SharpnessAwareMinimization):
            raise invalid_argument(
                "model", "a model that is not wrapped yet: train this one on as it is, or wrap its `model`", model
            )
        if type(model).train_step is not keras.Model.train_step and not checked.is_base_step:
            expected = "a model without a train_step of its own, which would not be called: write a loop with Step"
            raise invalid_argument("model", expected, model)
        super().__init__(name=name, dtype=model.dtype_policy, autocast=False)  # the model gets its inputs unconverted
        self._backend = backends.load()
        self._settings = checked
        self.model = model
        self._call_has_training_arg = model._call_has_training_arg
        if hasattr(model, "output_names"):  # losses and metrics may be given by these
            self.output_names = model.output_names
        self.sam_memory = Memory(model)
        self._step: Any = None  # a Step, as soon as there are variables
        self._checked_loss = False
        self._own_metrics = [keras.metrics.Sum(name="sam/skipped")]
        self._own_metrics += [
            keras.metrics.Mean(name=f"sam/{each}") for each in ("perturbed_loss", "gap", "gradient_norm")
        ]

    @property
    def built(self) -> bool:
        """Whether the inner model is built, which happens when it is called."""
        inner = getattr(self, "model", None)  # Keras asks before it is there
        return inner is not None and bool(inner.built)

    @built.setter
    def built(self, _: bool) -> None:
        """Do nothing: Keras sets it for a layer that builds itself."""

    def build(self, input_shape: Any = None) -> None:
        """Do nothing, because the inner model builds itself when it is called."""

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        """Return the inner model's outputs. Keras' call context passes `training` on to a `call` that takes it."""
        return self.model(inputs)

    # Settings

    @property
    def settings(self) -> Settings:
        """The settings of a step. They may be replaced, and hold from the next step on."""
        return self._settings

    @settings.setter
    def settings(self, settings: Settings) -> None:
        self._settings = settings
        self._step = None
        if self.compiled:
            self._check_jit(self.jit_compile)
            self._check_compiled()
            if self.train_function is not None:
                self.make_train_function(force=True)

    @property
    def rho(self) -> Any:
        """The distance to the perturbed weights; it may be set."""
        return self.settings.rho

    @rho.setter
    def rho(self, rho: Any) -> None:
        # Where rho_min or rho_max were not given they follow rho.
        old = self.settings
        names = [name for name, each in METHODS[old.method].settings.items() if each.default == "rho"]
        following = {name: None for name in names if getattr(old, name) == old.rho}
        self.settings = replace(old, rho=rho, **following)

    @property
    def num_batch_splits(self) -> int:
        """The number of parts of a batch; it may be set."""
        return int(self.settings.num_batch_splits)

    @num_batch_splits.setter
    def num_batch_splits(self, splits: int | None) -> None:
        self.settings = replace(self.settings, num_batch_splits=splits)

    # Training

    def compile(self, *arguments: Any, **options: Any) -> None:
        """`keras.Model.compile`. Compiles the inner model too.

        The method's state goes with the optimizer: another one begins without.
        """
        before = getattr(self, "optimizer", None)
        given = inspect.signature(keras.Model.compile).bind(self, *arguments, **options).arguments
        del given["self"]
        self._check_jit(given.get("jit_compile"))
        if self.settings.num_batch_splits > 1 and keras.config.backend() == "tensorflow":
            given["jit_compile"] = False
        self.model.compile(**given)
        inner = self.model
        super().compile(
            inner.optimizer,
            run_eagerly=inner.run_eagerly,
            steps_per_execution=inner.steps_per_execution,
            jit_compile=inner.jit_compile,
            auto_scale_loss=False,
        )
        self.loss = getattr(inner, "loss", None)
        self._checked_loss = False
        self._check_compiled()
        if before is not self.optimizer:
            self.sam_memory.reset()
        self._step = None

    def _check_jit(self, jit_compile: Any) -> None:
        """Refuse a compiler that fails on the step."""
        backend = keras.config.backend()
        if jit_compile is True and backend == "tensorflow" and self.settings.num_batch_splits > 1:
            expected = "False or 'auto' with num_batch_splits: XLA cannot loop over parts of unequal size"
            raise invalid_argument("jit_compile", expected, True)
        if jit_compile is True and backend == "torch" and not self.settings.is_base_step:
            expected = "False or 'auto' on PyTorch: torch.compile fails on a step of two passes"
            raise invalid_argument("jit_compile", expected, True)

    def _check_compiled(self) -> None:
        if not (self.settings.num_batch_splits > 1 or self.settings.accumulate > 1):
            return
        for each in keras.tree.flatten(self.loss):
            reduction = getattr(each, "reduction", "sum_over_batch_size")
            if reduction not in ("sum_over_batch_size", "mean"):
                raise invalid_argument(
                    "loss", "losses whose reduction is 'sum_over_batch_size', since parts are averaged", each
                )
            if getattr(each, "ignore_class", None) is not None:
                expected = "losses without ignore_class, of which parts have unequal shares: use sample_weight"
                raise invalid_argument("loss", expected, each)

    def get_compile_config(self) -> Any:
        """What the inner model was compiled with."""
        return self.model.get_compile_config()

    def compile_from_config(self, config: Any) -> None:
        """Compile as `get_compile_config` says."""
        self.compile(**keras.saving.deserialize_keras_object(config))
        if self.built:
            self.optimizer.build(self.trainable_variables)

    @property
    def metrics(self) -> list[Any]:
        """The inner model's metrics, and `sam/...` where there are perturbed steps."""
        return [*self.model.metrics, *([] if self.settings.is_base_step else self._own_metrics)]

    def fit(self, *args: Any, **options: Any) -> Any:
        """`keras.Model.fit`. Refuses several workers, where it fails in Keras 3 (keras issue 20585)."""
        self._backend.check_devices(self)
        given = inspect.signature(keras.Model.fit).bind(self, *args, **options).arguments
        del given["self"]
        watch, callbacks = _Watch(), given.get("callbacks")
        if isinstance(callbacks, keras.callbacks.CallbackList):
            watch.set_model(self)
            callbacks.append(watch)
        else:
            given["callbacks"] = [*keras.tree.flatten(callbacks or []), watch]
        return super().fit(**given)

    def train_on_batch(self, *args: Any, return_dict: bool = False, **options: Any) -> Any:
        """`keras.Model.train_on_batch`. Without `return_dict` it returns what it does for the inner model."""
        logs = super().train_on_batch(*args, return_dict=True, **options)
        if return_dict:
            return logs
        return self._flatten_metrics_in_order({k: value for k, value in logs.items() if not k.startswith("sam/")})

    def _symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        """Build the inner model, whose losses and metrics these are, before Keras builds this one."""
        self.model._symbolic_build(iterator, data_batch)
        super()._symbolic_build(iterator, data_batch)

    def make_train_function(self, force: bool = False) -> Any:
        """`keras.Model.make_train_function`. Creates the step's variables, if those of the model exist."""
        if all(layer.built for layer in self._flatten_layers()):
            self._begin()
        before = self.train_function
        made = super().make_train_function(force)
        if self._backend.FUNCTIONAL and self.train_function is not before:
            self._backend.choose_on_the_host(self)
        return made

    def _begin(self) -> None:
        if self.settings.is_base_step or not self.trainable_variables:
            return
        with self._outside():
            if self._step is None:
                if not self.optimizer.built:
                    self.optimizer.build(self.trainable_variables)
                self._step = Step(self.settings, self.model, self.optimizer, self.sam_memory)
            self._step.add_slots()

    def _outside(self) -> Any:
        return self._backend.outside(getattr(self, "distribute_strategy", None))

    def train_step(self, *arguments: Any, perturbed: bool | None = None) -> Any:
        """Take one step on (x, y, sample_weight). Loss and metrics are the first pass's.

        Called with the data, on JAX with state and data, as the trainers of Keras' backends do. `perturbed` is that of
        `Step.stateless_call`.
        """
        if self.settings.is_base_step or (self.built and not self.trainable_variables):
            return self._delegate("train_step", *arguments)
        run = functools.partial(self._train, perturbed)
        return self._backend.train(self, run, *arguments) if self._backend.FUNCTIONAL else run(*arguments)

    def _train(self, perturbed: bool | None, data: Any) -> dict[str, Any]:
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        if self._step is None:
            self.model(x, training=False)  # an unbuilt model has no variables before it is called
            self._begin()
        model, in_parts = self.model, self.settings.num_batch_splits > 1

        def forward(part: Any) -> tuple[Any, Any]:
            x, y, sample_weight = part
            outputs = model(x, training=True) if model._call_has_training_arg else model(x)
            self._check_parts(y, outputs, sample_weight)
            with PassScope() if in_parts else contextlib.nullcontext():  # losses by output are those of the whole batch
                return model._compute_loss(x, y, outputs, sample_weight, training=True), outputs

        outcome = self._step.run(forward, (x, y, sample_weight), perturbed=perturbed)
        if in_parts and model._compile_loss is not None:
            model._compute_loss(x, y, outcome.outputs, sample_weight, training=True)
        replicas = self._backend.replicas()
        examples = self._backend.count_examples(x)
        model._loss_tracker.update_state(outcome.loss * replicas, sample_weight=examples)
        logs = model.compute_metrics(x, y, outcome.outputs, sample_weight)
        return {**logs, **self._update_own_metrics(outcome, examples, replicas)}

    def _update_own_metrics(self, outcome: Outcome, examples: Any, replicas: int) -> dict[str, Any]:
        skipped, perturbed_loss, gap, gradient_norm = self._own_metrics
        skipped.update_state(outcome.skipped / replicas)
        weight = ops.cast(examples, "float32") * (1.0 - outcome.skipped)
        for metric, value, factor in (
            (perturbed_loss, outcome.perturbed_loss * replicas, outcome.perturbed),
            (gap, (outcome.perturbed_loss - outcome.loss) * replicas, outcome.perturbed),
            (gradient_norm, outcome.gradient_norm, 1.0),
        ):
            finite = ops.where(outcome.skipped > 0, ops.zeros_like(value), value)  # 0 times infinity is not a number
            metric.update_state(ops.cast(finite, "float32"), sample_weight=weight * factor)
        return {metric.name: metric.result() for metric in self._own_metrics}

    def _check_parts(self, y: Any, outputs: Any, sample_weight: Any) -> None:
        """Refuse what cannot be averaged over parts: masked outputs, and losses that are no means."""
        if self.settings.num_batch_splits > 1 and any(
            getattr(output, "_keras_mask", None) is not None for output in keras.tree.flatten(outputs)
        ):
            raise invalid_argument(
                "num_batch_splits", "1 with masked outputs, whose steps the parts share unequally", "more"
            )
        if self._checked_loss or self._backend.replicas() > 1:
            return
        self._checked_loss = True
        if self.settings.num_batch_splits > 1 or self.settings.accumulate > 1:
            with self._backend.evaluated():
                mean = is_mean(self.model._compile_loss, y, outputs, sample_weight)
            if not mean:
                raise invalid_argument("loss", "a mean over the examples, since parts are averaged", self.loss)

    # What the inner model does

    def _delegate(self, method: str, *arguments: Any) -> Any:
        if self._backend.FUNCTIONAL:
            return self._backend.delegate(self, method, *arguments)
        return getattr(self.model, method)(*arguments)

    def test_step(self, *arguments: Any) -> Any:
        """The inner model's."""
        return self._delegate("test_step", *arguments)

    def predict_step(self, *arguments: Any) -> Any:
        """The inner model's."""
        return self._delegate("predict_step", *arguments)

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """The inner model's."""
        return self.model.compute_loss(*arguments, **options)

    def compute_metrics(self, *arguments: Any, **options: Any) -> Any:
        """The inner model's."""
        return self.model.compute_metrics(*arguments, **options)

    def export(self, *args: Any, **options: Any) -> None:
        """Export the inner model."""
        self.model.export(*args, **options)

    # Saving

    def load_weights(self, *arguments: Any, **options: Any) -> None:
        """`keras.Model.load_weights`. Refuses the state of another method, which would be forgotten."""
        super().load_weights(*arguments, **options)
        self.sam_memory.check_loaded()

    def get_config(self) -> dict[str, Any]:
        """The inner model, and the settings that are not the defaults."""
        model = keras.saving.serialize_keras_object(self.model)
        model.pop("compile_config", None)  # it is this model's
        config = {field.name: getattr(self.settings, field.name) for field in fields(Settings)}
        config = {name: value for name, value in config.items() if value is not None}
        for name in _SAVED_FUNCTIONS:
            if callable(config.get(name)):
                config[name] = keras.saving.serialize_keras_object(config[name])
        return {"model": model, "name": self.name, **config}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> SharpnessAwareMinimization:
        """Make the model that `get_config` describes."""
        config = dict(config)
        for name in ("model", *_SAVED_FUNCTIONS):
            if isinstance(config.get(name), dict):
                config[name] = keras.saving.deserialize_keras_object(config[name], custom_objects=custom_objects)
        return cls(**config)


class _Watch(keras.callbacks.Callback):
    """Says when an epoch trained nothing, and refuses a learning rate that GSAM's rho cannot follow."""

    async_safe = True  # so that Keras need not wait for every step's logs

    def __init__(self) -> None:
        super().__init__()
        self._steps = 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._steps = 0
        self._check_rate()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._steps = max(self._steps, batch + 1)  # in any order

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self._check_rate()
        skipped = round(float((logs or {}).get("sam/skipped", 0)))
        if skipped and skipped >= self._steps:
            warnings.warn(
                f"All {skipped} steps of epoch {epoch + 1} were skipped because a gradient was not finite: nothing was "
                "trained. Lower rho, or look for a loss that is not defined near the weights",
                stacklevel=2,
            )

    def _check_rate(self) -> None:
        settings = self.model.settings
        if self.model._step is not None and settings.follows_rate and settings.rate_max is None:
            self.model._step.check_rate()


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
