"""The wrapper on the backend that runs: what it keeps, saves, calls and refuses."""

from __future__ import annotations

import copy
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import keras
import numpy as np
import pytest
from keras import ops
from sam_networks import BACKEND, INPUTS, LABELS, cross_entropy, distance, fit, network, regression, values

from flatmin.sam import METHODS, Settings, SharpnessAwareMinimization, Step

pytestmark = pytest.mark.slow  # all together

STATEFUL: list[dict[str, Any]] = [
    {},
    {"method": "friendly"},
    {"method": "looksam", "every": 3},
    {"accumulate": 2},
    {"method": "gsam", "rho_min": 0.0},
]


def begin(settings: dict[str, Any]) -> keras.Model:
    """A wrapped model with a random layer, compiled."""
    layers = [keras.layers.Dropout(0.5, seed=3), keras.layers.Dense(3)]
    keras.utils.set_random_seed(1)
    model = SharpnessAwareMinimization(keras.Sequential([keras.Input((6,)), *layers]), **{"rho": 0.3} | settings)
    model.compile(keras.optimizers.Adam(0.05), cross_entropy())
    return model


def train(model: keras.Model, *callbacks: Any, start: int = 0) -> list[np.ndarray]:
    """All variables of the inner model after the fourth epoch."""
    rate = keras.callbacks.LearningRateScheduler(lambda epoch: 0.05 if epoch < 2 else 0.01)
    options = {"x": INPUTS[:32], "y": LABELS[:32], "initial_epoch": start}
    fit(model, epochs=4, callbacks=[rate, *callbacks], **options)
    return values(model.model.variables)


@pytest.mark.parametrize(
    ("settings", "file"),
    [*((settings, "{epoch}.keras") for settings in STATEFUL), (STATEFUL[1], "{epoch}.weights.h5")],
    ids=str,
)
def test_training_resumed_from_a_checkpoint_is_exact(tmp_path: Path, settings: dict[str, Any], file: str) -> None:
    only_weights = ".weights" in file
    save = keras.callbacks.ModelCheckpoint(tmp_path / file, save_weights_only=only_weights)
    whole = train(begin(settings), save)
    path = tmp_path / file.format(epoch=2)
    if only_weights:
        again = begin(settings)
        again.optimizer.build(again.trainable_variables)
        again.load_weights(path)
    else:
        again = keras.models.load_model(path)
    for one, other in zip(train(again, start=2), whole, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("method", METHODS)
def test_backup_and_restore_resumes_exactly(tmp_path: Path, method: str) -> None:
    settings = {"method": method, "every": 2 if method == "looksam" else 1}
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup")
    copy_second = keras.callbacks.LambdaCallback(
        on_epoch_begin=lambda epoch, _: shutil.copytree(tmp_path / "backup", tmp_path / "copy") if epoch == 2 else None
    )
    whole = train(begin(settings), backup, copy_second)
    restored = train(begin(settings), keras.callbacks.BackupAndRestore(tmp_path / "copy"))
    for one, other in zip(restored, whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_load_weights_of_another_method_is_refused(tmp_path: Path) -> None:
    for method in ("friendly", "looksam"):
        model = SharpnessAwareMinimization(regression(), method=method)
        fit(model, keras.optimizers.SGD(0.1), epochs=1)
        if method == "friendly":
            model.save_weights(tmp_path / "file.weights.h5")
    with pytest.raises(ValueError, match=r"(?s)average.*Expected.*orthogonal.*settings that the file was written with"):
        model.load_weights(tmp_path / "file.weights.h5")


def deep(*widths: int) -> keras.Model:
    keras.utils.set_random_seed(1)
    return keras.Sequential([keras.Input((6,)), *(keras.layers.Dense(width, "tanh") for width in widths)])


@pytest.mark.parametrize("widths", [(6, 6, 6), (5, 4, 6)])
def test_memory_stays_with_its_weight_when_a_layer_is_frozen(widths: tuple[int, ...]) -> None:
    model = deep(*widths)
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    step = Step(Settings(rho=0.3, method="friendly"), model, optimizer)

    def forward(batch: Any) -> tuple[Any, Any]:
        outputs = model(batch, training=True)
        return ops.mean(outputs**2), outputs

    step(forward, ops.convert_to_tensor(INPUTS))
    weights = list(model.trainable_variables)
    before = values(step.memory.slots("average", weights))
    model.layers[0].trainable = False
    if BACKEND == "jax":  # whose optimizers take all variables or none
        optimizer = keras.optimizers.SGD(0.1)
        optimizer.build(model.trainable_variables)
        step = Step(step.settings, model, optimizer, step.memory)
    step(forward, ops.convert_to_tensor(INPUTS))
    after = values(step.memory.slots("average", weights))
    for index, (one, other) in enumerate(zip(before, after, strict=True)):
        assert np.array_equal(one, other) == (index < 2)
        assert one.shape == other.shape


def test_layers_beside_the_model_draw_once_in_a_step() -> None:
    noise = keras.layers.GaussianNoise(1.0, seed=7)
    model = keras.Sequential([keras.Input((6,)), keras.layers.Dense(2)])
    optimizer = keras.optimizers.SGD(0.1)
    optimizer.build(model.trainable_variables)
    step = Step(Settings(rho=0.1), model, optimizer)
    seen: list[np.ndarray] = []

    def forward(batch: Any) -> tuple[Any, Any]:
        inputs = noise(batch, training=True)
        if BACKEND != "jax":
            seen.append(np.array(ops.convert_to_numpy(inputs)))
        outputs = model(inputs, training=True)
        return ops.mean(outputs**2) + 0.0 * ops.sum(inputs), outputs

    states = [values(noise.seed_generator.state for _ in range(1))]
    for _ in range(2):
        step(forward, ops.convert_to_tensor(INPUTS))
        states.append(values([noise.seed_generator.state]))
    assert [int(state[0][1] - states[0][0][1]) for state in states] == [0, 1, 2]
    if BACKEND != "jax":
        np.testing.assert_array_equal(seen[0], seen[1])
        assert not np.array_equal(seen[1], seen[2])


class Own(keras.Model):
    """A model with overrides of what `fit`, `evaluate` and `predict` call."""

    def __init__(self) -> None:
        super().__init__()
        self.dense = keras.layers.Dense(1, kernel_initializer="ones")

    def call(self, inputs: Any) -> Any:
        return self.dense(inputs)

    def compute_loss(self, *args: Any, **options: Any) -> Any:
        return 100.0 * super().compute_loss(*args, **options)

    def compute_metrics(self, *args: Any, **options: Any) -> Any:
        return {**super().compute_metrics(*args, **options), "own": 3.0}

    def predict_step(self, *args: Any) -> Any:
        outputs = super().predict_step(*args)
        return (0 * outputs[0] + 7, outputs[1]) if isinstance(outputs, tuple) else 0 * outputs + 7


def test_overrides_of_the_inner_model_are_called() -> None:
    results = []
    for wrap in (lambda model: model, lambda model: SharpnessAwareMinimization(model, 1e-12)):
        model = wrap(Own())
        model.compile(keras.optimizers.SGD(0.001), "mse")
        history = model.fit(INPUTS, INPUTS[:, :1], epochs=2, shuffle=False, verbose=0).history
        evaluated = model.evaluate(INPUTS, INPUTS[:, :1], verbose=0, return_dict=True)
        predicted = model.predict(INPUTS[:1], verbose=0)
        results.append([*history["loss"], *history["own"], *evaluated.values(), float(predicted[0, 0])])
    np.testing.assert_allclose(results[1], results[0], rtol=1e-5)
    assert results[0][-1] == 7


def test_model_with_its_own_train_step_is_refused() -> None:
    class Loop(Own):
        def train_step(self, *args: Any) -> Any:
            return super().train_step(*args)

    with pytest.raises(ValueError, match=r"`model`.*train_step of its own.*Step"):
        SharpnessAwareMinimization(Loop())
    with pytest.raises(ValueError, match=r"`model`.*not wrapped yet"):
        SharpnessAwareMinimization(SharpnessAwareMinimization(regression()))


@pytest.mark.parametrize("splits", [2, 3])
def test_losses_by_output_are_right_in_parts(splits: int) -> None:
    inputs = keras.Input((6,))
    outputs = {"one": keras.layers.Dense(3, name="one")(inputs), "two": keras.layers.Dense(1, name="two")(inputs)}
    model = SharpnessAwareMinimization(keras.Model(inputs, outputs), num_batch_splits=splits)
    model.compile(keras.optimizers.SGD(0.0), {"one": cross_entropy(), "two": "mse"})
    data = (INPUTS, {"one": LABELS, "two": np.arange(36.0)[:, None]})
    history = model.fit(*data, batch_size=12, shuffle=False, verbose=0).history
    expected = model.evaluate(*data, batch_size=12, verbose=0, return_dict=True)
    for key, value in expected.items():
        assert history[key][0] == pytest.approx(value, rel=1e-5), key


@pytest.mark.parametrize("settings", [{"num_batch_splits": 2}, {"accumulate": 2}], ids=str)
def test_loss_that_is_no_mean_is_found_by_value(settings: dict[str, Any]) -> None:
    model = SharpnessAwareMinimization(regression(), **settings)
    model.compile("sgd", lambda y, outputs: ops.sum((outputs - ops.cast(y, "float32")) ** 2))
    with pytest.raises(ValueError, match=r"`loss`.*a mean over the examples"):
        model.train_on_batch(INPUTS, np.zeros((36, 3), np.float32))
    model.compile("sgd", lambda y, outputs: ops.mean((outputs - ops.cast(y, "float32")) ** 2))
    model.train_on_batch(INPUTS, np.zeros((36, 3), np.float32))


def test_attributes_take_effect() -> None:
    def run(change: Any = None, rho: float = 0.05, at: int = 0) -> list[np.ndarray]:
        model = SharpnessAwareMinimization(network(), rho)
        callback = keras.callbacks.LambdaCallback(on_epoch_begin=lambda e, _: change(model) if e == at else None)
        fit(model, keras.optimizers.SGD(0.5), epochs=2, callbacks=[callback] if change else [])
        return values(model.trainable_variables)

    expected, base = run(rho=1.0), run()
    assert distance(run(lambda model: setattr(model, "rho", 1.0)), expected) == 0
    assert distance(run(lambda model: setattr(model, "settings", Settings(rho=1.0))), expected) == 0
    late = run(lambda model: setattr(model, "rho", 1.0), at=1)
    assert distance(late, base) > 1e-4
    assert distance(late, expected) > 1e-4
    assert distance(run(lambda model: setattr(model, "num_batch_splits", 4)), base) > 1e-4


def test_wrapper_is_cloned_pickled_and_copied_with_its_settings() -> None:
    schedule = keras.optimizers.schedules.PolynomialDecay(0.1, 10, 0.2)
    model = SharpnessAwareMinimization(regression(), schedule, method="wsam", gamma=0.3)
    fit(model, keras.optimizers.Adam(0.01), epochs=1)
    for make in (keras.models.clone_model, copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))):
        made = make(model)
        assert (made.settings.method, made.settings.gamma) == ("wsam", 0.3)
        assert made.settings.rho.get_config() == schedule.get_config()
        if make is not keras.models.clone_model:
            assert distance(values(made.model.variables), values(model.model.variables)) == 0
            assert distance(values(made.optimizer.variables), values(model.optimizer.variables)) == 0


def test_epoch_that_trains_nothing_says_so() -> None:
    # The loss is finite at w = 1 and not at w + rho.
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = SharpnessAwareMinimization(keras.Sequential([keras.Input((1,)), layer]), 1.0)
    model.compile(keras.optimizers.SGD(0.1), lambda _, outputs: outputs * ops.where(outputs > 1.5, float("inf"), 1.0))
    with pytest.warns(UserWarning, match="All 2 steps of epoch 1 were skipped"):
        history = model.fit(np.ones((4, 1)), np.ones((4, 1)), batch_size=2, verbose=0).history
    assert history["sam/skipped"] == [2]
    assert np.isfinite(history["sam/gradient_norm"]).all()


@pytest.mark.skipif(BACKEND != "torch", reason="a layer of PyTorch")
def test_module_of_pytorch_that_reads_its_own_parameters_is_refused() -> None:
    import torch

    layers = [keras.layers.TorchModuleWrapper(torch.nn.Linear(6, 4)), keras.layers.Dense(3)]
    with pytest.raises(ValueError, match=r"none at the perturbed weights.*TorchModuleWrapper"):
        fit(SharpnessAwareMinimization(keras.Sequential([keras.Input((6,)), *layers])), keras.optimizers.SGD(0.1))


@pytest.mark.skipif(BACKEND != "torch", reason="XLA compiles the step")
def test_torch_compile_is_refused_where_there_are_two_passes() -> None:
    model = SharpnessAwareMinimization(regression(), 0.05)
    with pytest.raises(ValueError, match=r"`jit_compile`.*'auto' on PyTorch"):
        model.compile("sgd", cross_entropy(), jit_compile=True)
    model.compile("sgd", cross_entropy(), jit_compile="auto")
    assert not model.jit_compile
    base = SharpnessAwareMinimization(regression(), 0.0)
    base.compile("sgd", cross_entropy(), jit_compile=True)
    with pytest.raises(ValueError, match=r"`jit_compile`.*'auto' on PyTorch"):
        base.rho = 0.05


def test_weights_load_into_a_model_that_was_built_after_it_was_wrapped(tmp_path: Path) -> None:
    models = [SharpnessAwareMinimization(keras.Sequential([keras.layers.Dense(3)])) for _ in range(2)]
    for model in models:
        model.compile(keras.optimizers.SGD(0.1), cross_entropy())
        model.model.build((None, 6))
    models[0].save_weights(tmp_path / "a.weights.h5")
    models[1].load_weights(tmp_path / "a.weights.h5")
    assert distance(*(values(model.model.variables) for model in models)) == 0


def test_fit_does_not_wait_for_the_logs_of_every_step() -> None:
    class Waits(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
            pass

    waits = []

    def note(self: Any, batch: int, logs: Any = None) -> None:
        waits.append(not self._async_train)

    for callbacks in ([], [Waits()]):
        model = SharpnessAwareMinimization(regression())
        model.compile(keras.optimizers.SGD(0.1), cross_entropy())
        with mock.patch.object(keras.callbacks.CallbackList, "on_train_batch_begin", note):
            fit(model, epochs=1, batch_size=36, callbacks=callbacks)
    # On TensorFlow Keras always waits.
    assert waits == [keras.backend.backend() == "tensorflow", True]


def test_gsam_refuses_a_learning_rate_above_the_known_one() -> None:
    rates = keras.callbacks.LearningRateScheduler(lambda epoch: [0.001, 0.1][epoch])
    model = SharpnessAwareMinimization(regression(), method="gsam", rho_min=0.0)
    with pytest.raises(ValueError, match=r"`rate_max`.*the highest learning rate, since it rose"):
        fit(model, keras.optimizers.SGD(0.001), callbacks=[rates])
    model = SharpnessAwareMinimization(regression(), method="gsam", rho_min=0.0, rate_max=0.1)
    fit(model, keras.optimizers.SGD(0.001), callbacks=[rates])


def test_multi_optimizer_trains_as_its_parts() -> None:
    results = []
    for optimizer in (
        keras.optimizers.SGD(0.1),
        keras.optimizers.MultiOptimizer(
            keras.optimizers.OptimizerMap(keras.optimizers.SGD(0.1), {".*bias": keras.optimizers.SGD(0.1)})
        ),
    ):
        model = SharpnessAwareMinimization(regression(), 0.5)
        fit(model, optimizer)
        results.append(values(model.variables))
    assert distance(*results) < 1e-6
    model = SharpnessAwareMinimization(regression(), 0.5, method="gsam", rho_min=0.1)
    with pytest.raises(ValueError, match=r"`optimizer`.*single learning rate"):
        fit(model, optimizer)


def test_weights_of_several_dtypes_train() -> None:
    layers = [keras.layers.Dense(8, "tanh", dtype="bfloat16"), keras.layers.Dense(3, dtype="float32")]
    model = SharpnessAwareMinimization(keras.Sequential([keras.Input((6,)), *layers]), 0.1, adaptive=True)
    losses = fit(model, keras.optimizers.SGD(0.3), epochs=4)["loss"]
    assert losses[-1] < losses[0]


@pytest.mark.skipif(BACKEND != "tensorflow", reason="its assignment of a weight has another gradient on JAX")
def test_spectral_normalisation_moves_its_vector_once() -> None:
    results = []
    for wrap in (lambda model: model, lambda model: SharpnessAwareMinimization(model, 1e-12)):
        keras.utils.set_random_seed(1)
        layer = keras.layers.SpectralNormalization(keras.layers.Dense(3))
        model = keras.Sequential([keras.Input((6,)), layer])
        fit(wrap(model), keras.optimizers.SGD(0.1))
        results.append(values(model.variables))
    assert distance(*results) < 1e-5


def test_variables_overwritten_with_their_gradient_are_not_perturbed() -> None:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input((16,)), keras.layers.Dense(16, "tanh"), keras.layers.Dense(3)])
    for layer in model.layers:
        layer.quantize("float8")
    seen = []

    def perturb(variable: keras.Variable) -> bool:
        seen.append(variable.path)
        return True

    random = np.random.default_rng(0).normal(size=(32, 16)).astype("float32")
    wrapped = SharpnessAwareMinimization(model, 0.05, perturb=perturb)
    wrapped.compile(keras.optimizers.SGD(0.1), cross_entropy())
    wrapped.fit(random, np.arange(32) % 3, batch_size=8, verbose=0)
    assert {path.rpartition("/")[2] for path in seen} == {"kernel", "bias"}
    assert float(ops.convert_to_numpy(model.layers[0].kernel_scale.value)) < 0.01  # it began at 1


def test_decoupled_wsam_refuses_accumulation_within_a_loss_scale() -> None:
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=2)
    model = SharpnessAwareMinimization(regression(), method="wsam-decoupled")
    with pytest.raises(ValueError, match=r"`optimizer`.*no gradient_accumulation_steps"):
        fit(model, keras.optimizers.LossScaleOptimizer(inner))


def test_perturb_may_answer_with_booleans_of_numpy() -> None:
    results = []
    for answer in (bool, np.bool_):
        model = regression()
        wrapped = SharpnessAwareMinimization(model, 0.3, perturb=lambda v, a=answer: a(v.name == "kernel"))
        fit(wrapped, keras.optimizers.SGD(0.1))
        results.append(values(model.variables))
    assert distance(*results) == 0


@pytest.mark.parametrize("answer", [None, -1.0, float("nan"), "kernel"])
def test_perturb_that_answers_anything_else_is_refused(answer: Any) -> None:
    model = SharpnessAwareMinimization(regression(), perturb=lambda _: answer)
    with pytest.raises(ValueError, match=r"`perturb`.*True, False or a number >= 0, for .*kernel"):
        fit(model, keras.optimizers.SGD(0.1))


def test_state_is_a_copy_that_brings_a_step_back() -> None:
    model, optimizer = regression(), keras.optimizers.Adam(0.1)
    optimizer.build(model.trainable_variables)
    step = Step(Settings(rho=0.3, method="friendly"), model, optimizer)
    data = ops.convert_to_tensor(INPUTS)

    def forward(batch: Any) -> tuple[Any, Any]:
        outputs = model(batch, training=True)
        return ops.mean(outputs**2), outputs

    before, state = values(model.variables), step.state
    step(forward, data)
    moved = values(model.variables)
    assert distance(moved, before) > 0.01
    step.state = state
    assert distance(values(model.variables), before) == 0
    if BACKEND == "tensorflow":
        with pytest.raises(RuntimeError, match=r"Call the step in tf\.function"):
            step.stateless_call(state, forward, data)
        return
    _, _, after = step.stateless_call(state, forward, data)
    assert distance(values(model.variables), before) == 0
    step.state = after
    assert distance(values(model.variables), moved) < 1e-6


def test_gsam_obeys_a_range_of_rates_that_is_given_later(tmp_path: Path) -> None:
    def begin(rate_max: float) -> keras.Model:
        model = SharpnessAwareMinimization(regression(), method="gsam", rho_min=0.0, rho_max=0.5, rate_max=rate_max)
        model.compile(keras.optimizers.SGD(0.05), cross_entropy())
        model.make_train_function()
        return model

    def step(model: keras.Model) -> list[np.ndarray]:
        model.train_on_batch(INPUTS, LABELS)
        return values(model.model.variables)

    expected = step(begin(0.1))
    begin(0.05).save_weights(tmp_path / "other.weights.h5")
    changed, loaded = begin(0.05), begin(0.1)
    changed.settings = replace(changed.settings, rate_max=0.1)
    loaded.optimizer.build(loaded.trainable_variables)
    loaded.load_weights(tmp_path / "other.weights.h5")
    for model in (changed, loaded):
        assert distance(step(model), expected) < 1e-7
    assert distance(step(begin(0.05)), expected) > 1e-5


@pytest.mark.parametrize("settings", [{"num_batch_splits": 2}, {"accumulate": 2}], ids=str)
def test_loss_that_ignores_a_class_is_refused_where_parts_are_averaged(settings: dict[str, Any]) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, ignore_class=2)
    with pytest.raises(ValueError, match=r"`loss`.*without ignore_class"):
        SharpnessAwareMinimization(regression(), **settings).compile("sgd", {"one": loss})


def test_rematerialised_layer_trains_as_without_it_or_is_refused() -> None:
    results = []
    for mode in (None, "full"):
        keras.utils.set_random_seed(1)
        with keras.RematScope(mode=mode):
            layers = [keras.layers.Dense(5, "tanh"), keras.layers.Dense(3)]
        model = keras.Sequential([keras.Input((6,)), *layers])
        if mode is not None and BACKEND != "jax":
            message = "cannot recompute" if BACKEND == "torch" else "none at the perturbed weights"
            # Not in a graph, where Keras' own fit fails on TensorFlow.
            with pytest.raises((ValueError, RuntimeError), match=message):
                fit(SharpnessAwareMinimization(model, 0.5), keras.optimizers.SGD(0.1), compile={"run_eagerly": True})
            return
        fit(SharpnessAwareMinimization(model, 0.5), keras.optimizers.SGD(0.1))
        results.append(values(model.variables))
    assert distance(*results) < 1e-6
