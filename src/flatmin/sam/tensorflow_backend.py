"""TensorFlow: gradient tapes, branches and loops of a graph, and replicas of `tf.distribute`."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import keras
import tensorflow as tf

from .optimizers import base_optimizer

COUNTS = "int64"
FUNCTIONAL = False  # a pass is a function of values, and returns what it assigns
STRAIGHT_THROUGH = True


def gradients(call: Callable[[Any], Any], variables: list[keras.Variable], values: Any) -> tuple[Any, list[Any]]:
    """Differentiate `call(values) -> (loss, rest)`; values None stands for those of the variables."""
    sources = [variable.value for variable in variables] if values is None else values
    with tf.GradientTape() as tape:
        if values is not None:
            tape.watch(values)
        loss, rest = call(values)
    computed = tape.gradient(loss, sources)
    return rest, [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in computed]


def without_recomputation() -> Any:
    """Nothing: a gradient that is recomputed is None at the perturbed weights, which the step refuses."""
    return contextlib.nullcontext()


def cond(predicate: Any, then: Callable[[], Any], otherwise: Callable[[], Any]) -> Any:
    """What the branch that is taken returns. Neither changes a variable; both may reduce over replicas."""
    if not _merges():
        return tf.cond(predicate, then, otherwise)
    key = object()  # the replica that asks; `merge_call` gives every replica the results of all

    def merged(strategy: Any, key: Any, predicate: Any, *functions: Any) -> dict[int, Any]:
        structure: list[Any] = []

        def run(function: Any) -> list[list[Any]]:
            structure[:] = [_on_each(strategy, function)]
            local = [_local(strategy, each) for each in tf.nest.flatten(structure[0])]
            return [list(tensors) for tensors in zip(*local, strict=True)]

        results = tf.cond(_first(strategy, predicate), lambda: run(functions[0]), lambda: run(functions[1]))
        packed = [tf.nest.pack_sequence_as(structure[0], result) for result in results]
        return {id(each): result for each, result in zip(_local(strategy, key), packed, strict=True)}

    merge = tf.distribute.get_replica_context().merge_call
    return merge(merged, args=(key, predicate, then, otherwise))[id(key)]


def branch(predicate: Any, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
    """Run one of two branches, which change variables."""
    if not _merges():
        tf.cond(predicate, lambda: _no_value(then), lambda: _no_value(otherwise))
        return

    # The optimizer merges replicas, which a replica cannot do in its own branch, so all take the same one.
    def merged(strategy: Any, predicate: Any, *functions: Any) -> None:
        runs = [lambda function=function: _no_value(lambda: _on_each(strategy, function)) for function in functions]
        tf.cond(_first(strategy, predicate), *runs)

    tf.distribute.get_replica_context().merge_call(merged, args=(predicate, then, otherwise))


def _no_value(run: Callable[[], Any]) -> None:
    run()


def _merges() -> bool:
    """Whether replicas reduce by merging their threads, which a branch or loop of one replica cannot do."""
    return not tf.__internal__.distribute.strategy_supports_no_merge_call()


def _on_each(strategy: Any, functions: Any) -> Any:
    return strategy.extended.call_for_each_replica(lambda function: function(), args=(functions,))


def _local(strategy: Any, value: Any) -> tuple[Any, ...]:
    return strategy.experimental_local_results(value)


def _first(strategy: Any, value: Any) -> Any:
    return _local(strategy, value)[0]


def over_parts(
    run: Callable[[Any, Any, Any], tuple[Any, Any, Any]], add: Callable[[Any, Any], Any], batch: Any, splits: int
) -> tuple[Any, Any, Any]:
    """Call `run(part, weight, state)` for the parts of a batch, in order, so that one part is in memory at a time.

    The parts are those of `np.array_split`; the weight is a part's share of the examples.

    Args:
        run: -> (values to add up, outputs to join along the examples, state for the next part). The first gets None.
        add: adds up two of those values.
    """
    size = count_examples(batch)

    def run_part(index: Any, state: Any) -> tuple[Any, Any, Any]:
        start = index * (size // splits) + tf.minimum(index, size % splits)
        end = start + size // splits + tf.cast(index < size % splits, "int32")
        part = keras.tree.map_structure(lambda leaf: None if leaf is None else _part(leaf, start, end), batch)
        # The last batch may leave a replica without examples.
        weight = tf.math.divide_no_nan(tf.cast(end - start, "float32"), tf.cast(size, "float32"))
        return run(part, weight, state)

    # The first part runs outside of the loop, to find out which weights are used and how the outputs look.
    sums, outputs, state = run_part(tf.constant(0), None)
    for output in keras.tree.flatten(outputs):
        if not isinstance(output, tf.Tensor) or output.shape.rank == 0:
            raise ValueError(
                "Invalid value received for argument `num_batch_splits`. Expected 1 for a model with ragged, sparse or "
                f"scalar outputs, which cannot be joined from parts. Received: num_batch_splits={splits}"
            )
    if _merges():
        return _one_by_one(run_part, add, splits, size, (sums, outputs, state))
    collected = tf.nest.map_structure(_begin_list, outputs)

    def body(index: tf.Tensor, sums: Any, state: Any, collected: Any) -> Any:
        new, outputs, state = run_part(index, state)
        collected = tf.nest.map_structure(lambda array, output: array.write(index, output), collected, outputs)
        return index + 1, add(sums, new), state, collected

    _, sums, state, collected = tf.while_loop(
        lambda index, *_: index < tf.minimum(splits, size),
        body,
        (tf.constant(1), sums, state, collected),
        parallel_iterations=1,
    )
    return sums, tf.nest.map_structure(lambda array: array.concat(), collected), state


def _one_by_one(run_part: Any, add: Any, splits: int, size: Any, first: tuple[Any, Any, Any]) -> tuple[Any, Any, Any]:
    """The parts after the first without a loop: replicas that merge cannot do so in one.

    Where there are fewer examples than parts, the last ones are empty: they have no weight, and leave the state.
    """
    sums, outputs, state = first
    collected = [outputs]
    for index in range(1, splits):
        with tf.control_dependencies([tensor for tensor in tf.nest.flatten(sums) if tensor is not None]):
            new, outputs, after = run_part(tf.constant(index), state)
        exists = index < tf.maximum(size, 1)
        new = tf.nest.map_structure(lambda each, e=exists: tf.where(e, each, tf.zeros_like(each)), new)
        state = tf.nest.map_structure(lambda a, b, e=exists: tf.where(e, a, b), after, state)
        sums = add(sums, new)
        collected.append(outputs)
    return sums, tf.nest.map_structure(lambda *parts: tf.concat(parts, axis=0), *collected), state


def _part(tensor: Any, start: Any, end: Any) -> Any:
    if not isinstance(tensor, tf.SparseTensor):
        return (tensor if isinstance(tensor, tf.RaggedTensor) else tf.convert_to_tensor(tensor))[start:end]
    rest = tensor.dense_shape[1:]
    begin = tf.concat([[tf.cast(start, "int64")], tf.zeros_like(rest)], axis=0)
    return tf.sparse.slice(tensor, begin, tf.concat([[tf.cast(end - start, "int64")], rest], axis=0))


def _begin_list(first: tf.Tensor) -> tf.TensorArray:
    shape = [None, *first.shape[1:]]
    array = tf.TensorArray(first.dtype, 1, dynamic_size=True, infer_shape=False, element_shape=shape)
    return array.write(0, first)


def unconverted(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function as AutoGraph leaves it alone."""
    return tf.autograph.experimental.do_not_convert(function)


def count_examples(batch: Any) -> tf.Tensor:
    """int32 scalar: the length of the batch's tensors."""
    first = next(tensor for tensor in keras.tree.flatten(batch) if tensor is not None)
    if isinstance(first, tf.RaggedTensor):
        return tf.cast(first.nrows(), "int32")
    if isinstance(first, tf.SparseTensor):
        return tf.cast(first.dense_shape[0], "int32")
    return tf.shape(first)[0]


def replicas() -> int:
    """The number of replicas of the current strategy."""
    return tf.distribute.get_strategy().num_replicas_in_sync


def all_sum(tensors: Any) -> Any:
    """The sum over replicas."""
    return tensors if replicas() == 1 else tf.distribute.get_replica_context().all_reduce("SUM", tensors)


def shares(optimizer: keras.optimizers.Optimizer, gradients: list[Any]) -> list[Any]:
    """Each replica's share of gradients that all have; the optimizer adds them up.

    Keras clips on each replica and then sums. Here the sum is clipped.
    """
    if replicas() == 1:
        return gradients
    return [gradient / replicas() for gradient in base_optimizer(optimizer)._clip_gradients(gradients)]


def check_devices(model: Any) -> None:
    """Refuse several workers."""
    if isinstance(model.distribute_strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise ValueError("fit does not run on several workers in Keras 3; call flatmin.sam.Step in a loop instead")


def apply(optimizer: keras.optimizers.Optimizer, gradients: list[Any], variables: list[keras.Variable]) -> None:
    """One update, as Keras' step on TensorFlow makes it."""
    optimizer.apply_gradients(list(zip(gradients, variables, strict=True)))


def here() -> Any:
    """Where an assignment is made: None outside of graphs, or the graph."""
    return None if tf.executing_eagerly() else tf.compat.v1.get_default_graph()


@contextlib.contextmanager
def outside(strategy: Any) -> Iterator[None]:
    """A context in which variables are made and read as outside of a compiled function."""
    with tf.init_scope(), strategy.scope():
        yield


def evaluated() -> Any:
    """A context in which tensors have values, within a compiled function too."""
    return tf.init_scope()
