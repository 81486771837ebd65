"""The mean loss over a sample as a function of the trained weights, with its gradient and Hessian."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from . import backends

Batch = tuple[Any, Any]


class Derivatives:
    """Compiled functions: the sum over a batch of the losses, its gradient, and its Hessian times a vector.

    They take the values of all variables as arguments, so models of one architecture share them.
    """

    def __init__(self, model: keras.Model, losses: Callable[[Any, Any], Any], example: Batch) -> None:
        """
        Args:
            losses: (labels, outputs) -> float32 [batch]. Another shape is refused when the first loss is computed.
            example: (inputs, labels) of any batch size; each is one tensor or several.
        """
        model(example[0], training=False)
        self._model = model
        self._losses = losses
        self._variables = model.trainable_variables
        size = sum(_size(variable.shape) for variable in self._variables)
        functions = backends.functions(self._sum, size, model.non_trainable_variables, example)
        self.loss, self.gradient, self.product = functions

    def split(self, vector: Any) -> list[Any]:
        """Split [n] into tensors that are shaped as the trained variables."""
        ends = np.cumsum([_size(variable.shape) for variable in self._variables])[:-1].tolist()
        whole = ops.convert_to_tensor(vector)
        parts = ops.split(whole, ends) if ends else [whole]
        return [ops.reshape(part, v.shape) for part, v in zip(parts, self._variables, strict=True)]

    def _sum(self, weights: Any, frozen: list[Any], batch: Batch) -> Any:
        inputs, labels = batch
        values = [ops.cast(each, v.dtype) for each, v in zip(self.split(weights), self._variables, strict=True)]
        outputs, _ = self._model.stateless_call(values, frozen, inputs, training=False)
        losses = self._losses(labels, outputs)
        if len(losses.shape) != 1:
            raise ValueError(
                "Invalid value received for argument `losses`. Expected a function that returns one loss for each "
                f"example, shape (batch,). Received: shape {tuple(losses.shape)}"
            )
        return ops.sum(ops.cast(losses, "float32"))


class Surface:
    """The mean loss over a sample as a function of a model's trained weights, float [n]; sums are float64."""

    def __init__(self, derivatives: Derivatives, model: keras.Model, batches: Sequence[Batch]) -> None:
        """
        Args:
            model: its variables are read now. Its architecture is the one that `derivatives` was made for.
            batches: (inputs, labels), each with at least one example. Standard errors come from the differences between
                batches, so they need two or more; small ones give the better estimate.
        """
        self.split = derivatives.split
        self.weights: np.ndarray = flattened([variable.value for variable in model.trainable_variables])
        self.variables = model.trainable_variables
        self._frozen = [ops.copy(variable.value) for variable in model.non_trainable_variables]
        self._batches = batches
        self._sizes = np.array([len(keras.tree.flatten(labels)[0]) for _, labels in batches])
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

    def losses_by_batch(self, weights: np.ndarray) -> np.ndarray:
        """The mean loss of each batch at `weights`, float64 [batches]."""
        return np.array([float(each) for each in self._sums(self._derivatives.loss, weights)]) / self._sizes

    def curvature_by_batch(self, vector: np.ndarray) -> np.ndarray:
        """Vector . H vector with the Hessian of each batch's mean loss, float64 [batches]."""
        products = self._sums(self._derivatives.product, self.weights, vector)
        return np.array([float(product @ vector) for product in products]) / self._sizes

    def standard_error(self, by_batch: np.ndarray) -> float:
        """The standard error over images of the mean of values that are means of batches; NaN for one batch."""
        count, share = len(by_batch), self._sizes / self._sizes.sum()
        if count < 2:
            return float("nan")
        deviation = share * (by_batch - share @ by_batch)
        return float(np.sqrt(count / (count - 1) * (deviation @ deviation)))

    def _mean(self, batch_sum: Callable[..., Any], *vectors: np.ndarray) -> np.ndarray:
        return np.asarray(sum(self._sums(batch_sum, *vectors))) / self._sizes.sum()

    def _sums(self, batch_sum: Callable[..., Any], *vectors: np.ndarray) -> list[np.ndarray]:
        tensors = [ops.convert_to_tensor(vector, "float32") for vector in vectors]
        results = [batch_sum(*tensors, self._frozen, batch) for batch in self._batches]
        return [ops.convert_to_numpy(result).astype(np.float64) for result in results]


def flattened(tensors: Sequence[Any]) -> np.ndarray:
    """The tensors in their order as one float32 [n]."""
    parts = [ops.convert_to_numpy(ops.cast(tensor, "float32")).reshape(-1) for tensor in tensors]
    return np.concatenate(parts) if parts else np.zeros(0, np.float32)


def _size(shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64))
