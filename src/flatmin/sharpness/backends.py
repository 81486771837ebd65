"""First and second derivatives on each of Keras' backends.

Each function makes (loss, gradient, product) of a `call`:

    loss(weights, frozen, batch), gradient(weights, frozen, batch), product(weights, vector, frozen, batch)

Weights and vector are float32 [n]. `call(weights, frozen, batch)` is a sum of losses, float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import keras

Functions = tuple[Any, Any, Any]


def functions(call: Callable[..., Any], size: int, frozen: Sequence[keras.Variable], example: Any) -> Functions:
    """Compile the three functions on the backend that Keras runs on.

    Raises:
        RuntimeError: the backend has no derivatives.
    """
    makers = {"tensorflow": _tensorflow, "jax": _jax, "torch": _torch}
    name = keras.config.backend()
    if name not in makers:
        raise RuntimeError(f"flatmin.sharpness: expected one of Keras' backends {', '.join(makers)}, found {name}")
    return makers[name](call, size, frozen, example)


def _tensorflow(call: Callable[..., Any], size: int, frozen: Sequence[keras.Variable], example: Any) -> Functions:
    import tensorflow as tf

    def gradient(weights: Any, frozen: Any, batch: Any) -> Any:
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            loss = call(weights, frozen, batch)
        return tf.convert_to_tensor(tape.gradient(loss, weights, unconnected_gradients="zero"))

    def product(weights: Any, vector: Any, frozen: Any, batch: Any) -> Any:
        # Reverse over reverse: the gradient of <g, vector> is the Hessian times the vector (Pearlmutter 1994).
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch(weights)
            inner = gradient(weights, frozen, batch)
        return tape.gradient(inner, weights, vector, unconnected_gradients="zero")

    vector = tf.TensorSpec((size,), tf.float32)
    values = [tf.TensorSpec(variable.shape, variable.dtype) for variable in frozen]
    batch = tf.nest.map_structure(lambda part: tf.TensorSpec((None, *part.shape[1:]), part.dtype), example)

    def compiled(function: Callable[..., Any], *vectors: Any) -> Any:
        return tf.function(function, input_signature=[*vectors, values, batch], autograph=False)

    return compiled(call, vector), compiled(gradient, vector), compiled(product, vector, vector)


def _jax(call: Callable[..., Any], size: int, frozen: Sequence[keras.Variable], example: Any) -> Functions:
    import jax

    def product(weights: Any, vector: Any, frozen: Any, batch: Any) -> Any:
        return jax.jvp(lambda each: jax.grad(call)(each, frozen, batch), (weights,), (vector,))[1]

    return jax.jit(call), jax.jit(jax.grad(call)), jax.jit(product)


def _torch(call: Callable[..., Any], size: int, frozen: Sequence[keras.Variable], example: Any) -> Functions:
    import torch

    def gradient(weights: Any, frozen: Any, batch: Any, create_graph: bool = False) -> Any:
        weights = weights.detach().requires_grad_() if not create_graph else weights
        return torch.autograd.grad(call(weights, frozen, batch), weights, create_graph=create_graph)[0]

    def product(weights: Any, vector: Any, frozen: Any, batch: Any) -> Any:
        weights = weights.detach().requires_grad_()
        # The quicker kernels of attention have no second derivative.
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            inner = gradient(weights, frozen, batch, create_graph=True)
        if not inner.requires_grad:  # the loss is linear
            return torch.zeros_like(weights)
        result = torch.autograd.grad(inner, weights, vector, allow_unused=True)[0]
        return torch.zeros_like(weights) if result is None else result

    def loss(*arguments: Any) -> Any:
        with torch.no_grad():
            return call(*arguments)

    return loss, gradient, product
