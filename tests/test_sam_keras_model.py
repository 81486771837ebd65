"""The Keras model: `compile`, `fit`, callbacks, saving."""

from __future__ import annotations

import dataclasses
import inspect
import pydoc
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from sam_networks import (
    INPUTS,
    LABELS,
    assert_equal,
    cross_entropy,
    fit,
    network,
    regression,
    trained,
    values,
    wrapping,
)
from sam_networks import float32_policy as float32_policy

from flatmin.sam import Settings, SharpnessAwareMinimization

pytestmark = pytest.mark.usefixtures("float32_policy")

EAGERLY = {"run_eagerly": True}  # a step or two take less time than to trace them


@pytest.mark.slow
def test_fit_reports_loss_and_metrics_of_first_pass() -> None:
    options = {"metrics": ["accuracy"]}
    plain = fit(network(), keras.optimizers.SGD(0.0), compile=options)
    history = fit(SharpnessAwareMinimization(network(), rho=50.0), keras.optimizers.SGD(0.0), compile=options)
    assert history["loss"] == pytest.approx(plain["loss"], rel=1e-6)
    assert history["accuracy"] == plain["accuracy"]


@pytest.mark.slow
def test_compile_with_mixed_float16_scales_the_loss() -> None:
    keras.config.set_dtype_policy("mixed_float16")
    wrapped = SharpnessAwareMinimization(network())
    fit(wrapped, keras.optimizers.Adam(0.01))
    assert isinstance(wrapped.optimizer, keras.optimizers.LossScaleOptimizer)
    assert all(np.isfinite(value).all() for value in values(wrapped.model.trainable_variables))


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"num_batch_splits": 3}, {"every": 2}, {"accumulate": 2}], ids=str)
def test_fit_run_eagerly_equals_graph(settings: dict[str, Any]) -> None:
    eager = trained(wrapping(rho=0.5, **settings), network(), compile=EAGERLY)
    assert_equal(eager, trained(wrapping(rho=0.5, **settings), network()), atol=1e-5)


@pytest.mark.slow
def test_fit_with_steps_per_execution_equals_single_steps() -> None:
    several = trained(wrapping(every=2), network(), compile={"steps_per_execution": 3})
    assert_equal(several, trained(wrapping(every=2), network()), atol=1e-6)


def test_compile_with_jit_and_parts_is_refused() -> None:
    wrapped = SharpnessAwareMinimization(network(), num_batch_splits=2)
    with pytest.raises(ValueError, match=r"`jit_compile`.*num_batch_splits"):
        wrapped.compile("sgd", "mse", jit_compile=True)
    wrapped.compile("sgd", "mse", jit_compile="auto")
    assert not wrapped.jit_compile


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{}, {"num_batch_splits": 3}], ids=str)
def test_fit_with_class_weight_equals_sample_weight(settings: dict[str, Any]) -> None:
    class_weight = {0: 1.0, 1: 2.0, 2: 0.5}
    sample_weight = np.array([class_weight[int(label)] for label in LABELS])
    by_class, by_sample, plain = (
        trained(wrapping(rho=0.5, **settings), network(), epochs=1, compile=EAGERLY, **weights)
        for weights in ({"class_weight": class_weight}, {"sample_weight": sample_weight}, {})
    )
    assert_equal(by_class, by_sample, atol=1e-6)
    assert np.abs(by_class[0] - plain[0]).max() > 1e-3


def test_fit_with_parts_of_weighted_batch_equals_whole_batch() -> None:
    weight = np.linspace(0.1, 2.0, 7)
    results = []
    for splits in (None, 3):
        model = regression()
        wrapped = SharpnessAwareMinimization(model, 0.0, splits)
        wrapped.compile(keras.optimizers.SGD(1.0), cross_entropy(), **EAGERLY)
        wrapped.train_on_batch(INPUTS[:7], LABELS[:7], sample_weight=weight)
        results.append(values(model.variables))
    assert_equal(results[1], results[0], atol=1e-6)


@pytest.mark.parametrize("settings", [{"num_batch_splits": 2}, {"accumulate": 2}], ids=str)
@pytest.mark.parametrize("reduction", ["sum", "none", "mean_with_sample_weight"])
def test_compile_with_averaged_parts_refuses_loss_that_is_not_a_mean(reduction: str, settings: dict[str, Any]) -> None:
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction=reduction)
    with pytest.raises(ValueError, match="Invalid value received for argument `loss`"):
        SharpnessAwareMinimization(network(), **settings).compile("sgd", loss)
    SharpnessAwareMinimization(network()).compile("sgd", loss)


def test_wrapper_first_four_arguments_are_those_of_tf_keras() -> None:
    wrapped = SharpnessAwareMinimization(network(), 0.2, 3, "wrapping")
    assert (wrapped.settings.rho, wrapped.settings.num_batch_splits, wrapped.name) == (0.2, 3, "wrapping")


class Subclassed(keras.Model):
    """Not built before it sees data; its `call` has no `training`."""

    def __init__(self) -> None:
        super().__init__()
        self.first = keras.layers.Dense(8, "tanh")
        self.drop = keras.layers.Dropout(0.5, seed=1)
        self.last = keras.layers.Dense(3)

    def call(self, inputs: tf.Tensor) -> tf.Tensor:
        return self.last(self.drop(self.first(inputs)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["functional", "unbuilt", "subclassed"])
def test_wrapper_trains_every_kind_of_model(kind: str) -> None:
    inputs = keras.Input((6,))
    model = {
        "functional": lambda: keras.Model(inputs, keras.layers.Dense(3)(keras.layers.Dense(8, "tanh")(inputs))),
        "unbuilt": lambda: keras.Sequential([keras.layers.Dense(8, "tanh"), keras.layers.Dense(3)]),
        "subclassed": Subclassed,
    }[kind]()
    wrapped = SharpnessAwareMinimization(model)
    options = {"metrics": ["accuracy"]}
    history = fit(wrapped, keras.optimizers.Adam(0.05), 8, compile=options, validation_data=(INPUTS, LABELS))
    assert history["loss"][-1] < history["loss"][0]
    scores = wrapped.evaluate(INPUTS, LABELS, verbose=0, return_dict=True)
    assert scores["accuracy"] == pytest.approx(history["val_accuracy"][-1])
    np.testing.assert_allclose(wrapped.predict(INPUTS, verbose=0), model.predict(INPUTS, verbose=0), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("rho", [0.0, 1e-12])
def test_wrapper_of_call_without_training_equals_keras(rho: float) -> None:
    # Keras leaves dropout off then.
    results = []
    for wrap in (wrapping(rho=rho), lambda model: model):
        keras.utils.set_random_seed(2)
        model = Subclassed()
        fit(wrap(model), keras.optimizers.SGD(0.5), compile=EAGERLY)
        results.append(values(model.trainable_variables))
    assert_equal(results[0], results[1], atol=0.0 if rho == 0 else 1e-6)


@pytest.mark.slow
def test_compile_with_losses_by_output_name_equals_keras() -> None:
    inputs = keras.Input((6,))
    histories = []
    for wrap in (wrapping(rho=1e-12), lambda model: model):
        keras.utils.set_random_seed(2)
        outputs = [keras.layers.Dense(1, name=name)(inputs) for name in ("one", "two")]
        model = wrap(keras.Model(inputs, outputs))
        model.compile("sgd", {"one": "mse", "two": "mae"}, {"one": 1.0, "two": 0.5}, {"one": ["mae"]})
        labels = {"one": LABELS, "two": LABELS}
        histories.append(model.fit(INPUTS, labels, epochs=2, shuffle=False, verbose=0).history)
    assert {key for key in histories[0] if not key.startswith("sam/")} == set(histories[1])
    for key in histories[1]:
        assert histories[0][key] == pytest.approx(histories[1][key], rel=1e-5)


def test_wrapper_passes_inputs_unconverted() -> None:
    # In float16 100,000 would be infinite.
    keras.config.set_dtype_policy("mixed_float16")
    model = keras.Sequential([keras.Input((1,)), keras.layers.Rescaling(1e-5, dtype="float32")])
    assert SharpnessAwareMinimization(model).predict(np.full((1, 1), 1e5), verbose=0)[0, 0] == pytest.approx(1.0)


def test_fit_with_masked_outputs_and_parts_is_refused() -> None:
    layers = [keras.Input((None,)), keras.layers.Embedding(5, 4, mask_zero=True)]
    wrapped = SharpnessAwareMinimization(keras.Sequential(layers), num_batch_splits=2)
    wrapped.compile("sgd", "mse")
    with pytest.raises(ValueError, match=r"`num_batch_splits`.*masked outputs"):
        wrapped.fit(np.ones((4, 3), np.int32), np.zeros((4, 3, 4)), verbose=0)


@pytest.mark.filterwarnings("ignore:The model does not have any trainable weights")
def test_fit_without_trainable_weights_changes_nothing() -> None:
    model = network()
    model.trainable = False
    before = values(model.trainable_variables)
    fit(SharpnessAwareMinimization(model, num_batch_splits=2, method="gsam"), keras.optimizers.SGD(0.1))
    assert_equal(values(model.trainable_variables), before)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer")
def test_load_weights_saved_before_training_resets_memory(tmp_path: Path) -> None:
    model = regression()
    wrapped = SharpnessAwareMinimization(model, method="friendly")
    wrapped.compile(keras.optimizers.Adam(), cross_entropy())
    wrapped.save_weights(tmp_path / "start.weights.h5")
    start = values(model.variables)
    fit(wrapped, keras.optimizers.Adam(), epochs=1)
    wrapped.load_weights(tmp_path / "start.weights.h5")
    assert_equal(values(model.variables), start)
    assert all((np.array(variable) == 0).all() for variable in wrapped.sam_memory.variables)


@pytest.mark.slow
def test_save_of_the_inner_model_holds_no_wrapper(tmp_path: Path) -> None:
    model = network()
    fit(SharpnessAwareMinimization(model), keras.optimizers.Adam(0.01), epochs=1)
    model.save(tmp_path / "inner.keras")
    loaded = keras.models.load_model(tmp_path / "inner.keras")
    assert type(loaded) is keras.Sequential
    assert_equal(values(loaded.weights), values(model.weights))


@pytest.mark.slow
def test_fit_obeys_learning_rate_and_early_stopping_callbacks() -> None:
    wrapped = SharpnessAwareMinimization(network())
    callbacks = [
        keras.callbacks.ReduceLROnPlateau(monitor="loss", min_delta=100.0, patience=1, factor=0.5),
        keras.callbacks.EarlyStopping(monitor="loss", min_delta=100.0, patience=3),
    ]
    history = fit(wrapped, keras.optimizers.SGD(0.1), epochs=10, callbacks=callbacks)
    assert len(history["loss"]) == 4
    assert float(wrapped.optimizer.learning_rate) < 0.1


@pytest.mark.slow
def test_compile_with_another_optimizer_forgets_and_with_the_same_one_does_not() -> None:
    wrapped = SharpnessAwareMinimization(network(), method="friendly")
    fit(wrapped, keras.optimizers.SGD(0.01), epochs=1)
    before = values(wrapped.sam_memory.variables)
    wrapped.compile(wrapped.optimizer, cross_entropy())
    assert_equal(values(wrapped.sam_memory.variables), before)
    assert np.abs(before[0]).max() > 0
    wrapped.compile(keras.optimizers.SGD(0.01), cross_entropy())
    assert all((value == 0).all() for value in values(wrapped.sam_memory.variables))


def test_fit_on_several_workers_is_refused() -> None:
    wrapped = SharpnessAwareMinimization(network())
    wrapped._distribute_strategy = tf.distribute.MultiWorkerMirroredStrategy.__new__(
        tf.distribute.MultiWorkerMirroredStrategy
    )
    with pytest.raises(ValueError, match=r"several workers.*flatmin\.sam\.Step"):
        wrapped.fit(INPUTS, LABELS)


def test_wrapper_signature_names_every_setting_with_its_default() -> None:
    parameters = inspect.signature(SharpnessAwareMinimization).parameters
    assert list(parameters)[:4] == ["model", "rho", "num_batch_splits", "name"]
    assert all(each.kind is inspect.Parameter.KEYWORD_ONLY for each in list(parameters.values())[4:])
    settings = {field.name: field.default for field in dataclasses.fields(Settings)}
    assert {name: each.default for name, each in parameters.items() if name not in ("model", "name")} == settings
    assert parameters["name"].default is None
    text = pydoc.plain(pydoc.render_doc(SharpnessAwareMinimization))
    assert "SharpnessAwareMinimization(model: 'keras.Model', rho: 'Any' = 0.05, num_batch_splits:" in text
    assert all(f" {name}: " in text for name in settings)


def test_wrapper_with_unknown_setting_is_an_error() -> None:
    with pytest.raises(TypeError, match="radius"):
        SharpnessAwareMinimization(network(), radius=0.5)
