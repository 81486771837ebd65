"""The mean loss over a sample as a function of the trained weights, with its gradient and Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

Batch = tuple[Any, Any]


class Derivatives:
    """Compiled functions: the sum over a batch of the losses, its gradient, and its Hessian times a vector.

    They take the values of all variables as arguments, so models of one architecture share them.
    """

    def __init__(self, model: keras.Model, losses: Callable[[Any, tf.Tensor], tf.Tensor], example: Batch) -> None:
        """
        Args:
            losses: (labels, outputs) -> float32 [batch].
            example: (inputs, labels) of any batch size; inputs are one tensor or several.
        """
        model(example[0], training=False)
        self._model = model
        self._losses = losses
        self._shapes = [tuple(variable.shape) for variable in model.trainable_variables]
        vector = tf.TensorSpec((sum(map(_size, self._shapes)),), tf.float32)
        frozen = [tf.TensorSpec(variable.shape, variable.dtype) for variable in model.non_trainable_variables]
        batch = tf.nest.map_structure(lambda part: tf.TensorSpec((None, *part.shape[1:]), part.dtype), example)
        one, two = [vector, frozen, batch], [vector, vector, frozen, batch]
        self.loss = tf.function(self._loss, input_signature=one, autograph=False)
        self.gradient = tf.function(self._gradient, input_signature=one, autograph=False)
        self.product = tf.function(self._product, input_signature=two, autograph=False)

    def split(self, vector: Any) -> list[tf.Tensor]:
        """Split [n] into tensors that are shaped as the trained variables."""
        parts = tf.split(tf.convert_to_tensor(vector), [_size(shape) for shape in self._shapes])
        return [tf.reshape(part, shape) for part, shape in zip(parts, self._shapes, strict=True)]

    def _loss(self, weights: tf.Tensor, frozen: list[tf.Tensor], batch: Batch) -> tf.Tensor:
        return self._sum(self.split(weights), frozen, batch)

    def _sum(self, values: list[tf.Tensor], frozen: list[tf.Tensor], batch: Batch) -> tf.Tensor:
        inputs, labels = batch
        outputs, _ = self._model.stateless_call(values, frozen, inputs, training=False)
        return tf.reduce_sum(self._losses(labels, outputs))

    def _gradient(self, weights: tf.Tensor, frozen: list[tf.Tensor], batch: Batch) -> tf.Tensor:
        values = self.split(weights)
        return flattened(self._gradients(values, frozen, batch))

    def _gradients(self, values: list[tf.Tensor], frozen: list[tf.Tensor], batch: Batch) -> list[tf.Tensor]:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            loss = self._sum(values, frozen, batch)
        return tape.gradient(loss, values, unconnected_gradients="zero")

    def _product(self, weights: tf.Tensor, vector: tf.Tensor, frozen: list[tf.Tensor], batch: Batch) -> tf.Tensor:
        # Reverse over reverse: the gradient of <g, vector> is the Hessian times the vector (Pearlmutter 1994).
        values = self.split(weights)
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(values)
            gradients = self._gradients(values, frozen, batch)
        return flattened(tape.gradient(gradients, values, self.split(vector), unconnected_gradients="zero"))


class Surface:
    """The mean loss over a sample as a function of a model's trained weights, float [n]; sums are float64."""

    def __init__(self, derivatives: Derivatives, model: keras.Model, batches: Sequence[Batch]) -> None:
        """
        Args:
            model: its variables are read now. Its architecture is the one that `derivatives` was made for.
            batches: (inputs, labels), each with at least one example.
        """
        self.split = derivatives.split
        self.weights: np.ndarray = flattened([variable.value for variable in model.trainable_variables]).numpy()
        self._frozen = [tf.convert_to_tensor(variable) for variable in model.non_trainable_variables]
        self._batches = batches
        self._count = sum(len(labels) for _, labels in batches)
        self._derivatives = derivatives

    def loss(self, weights: np.ndarray) -> float:
        """The mean loss at `weights`, float [n]."""
        return float(self._mean(self._derivatives.loss, weights))

    def gradient(self, weights: np.ndarray) -> np.ndarray:
        """The mean loss's gradient at `weights`, float64 [n]."""
        return self._mean(self._derivatives.gradient, weights)

    def hessian_vector_product(self, vector: np.ndarray) -> np.ndarray:
        """The mean loss's Hessian at the model's weights, times `vector`: float64 [n]."""
        return self._mean(self._derivatives.product, self.weights, vector)

    def _mean(self, batch_sum: Callable[..., tf.Tensor], *vectors: np.ndarray) -> np.ndarray:
        tensors = [tf.constant(vector, tf.float32) for vector in vectors]
        total = sum(batch_sum(*tensors, self._frozen, batch).numpy().astype(np.float64) for batch in self._batches)
        return np.asarray(total) / self._count


def flattened(tensors: Sequence[Any]) -> tf.Tensor:
    """The tensors in their order as one float32 [n]."""
    return tf.concat([tf.reshape(tf.cast(tensor, tf.float32), [-1]) for tensor in tensors], axis=0)


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))
