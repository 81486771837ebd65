"""The perturbation: from the weights to the highest loss nearby, to first order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import tensorflow as tf

from .settings import Settings


def perturbation(
    gradients: Sequence[tf.Tensor | None],
    variables: Sequence[keras.Variable],
    rho: float | tf.Tensor,
    adaptive: bool = False,
    eta: float = Settings.eta,
) -> list[tf.Tensor | None]:
    """The step of length rho along the gradient; the norm is taken over all weights together.

    e = rho g / ||g||_2 (Foret et al. 2021, arXiv:2010.01412, eq. 2). Adaptive: e = rho T^2 g / ||T g||_2 with
    T = |w| + eta for kernels and 1 for biases and normalisation weights: those of fewer than two dimensions, or called
    bias, gamma or beta (Kwon et al. 2021, arXiv:2102.11600, eq. 3). Zero where all gradients are zero.

    Args:
        gradients: unscaled, shaped as `variables`; None stays None.
    """
    scales = [
        tf.abs(tf.convert_to_tensor(variable)) + eta if adaptive and _is_kernel(variable) else None
        for variable in variables
    ]
    dense = [None if gradient is None else tf.convert_to_tensor(gradient) for gradient in gradients]
    scaled = [
        gradient if gradient is None or scale is None else gradient * scale
        for gradient, scale in zip(dense, scales, strict=True)
    ]
    norm = tf.linalg.global_norm([gradient for gradient in scaled if gradient is not None])
    factor = tf.math.divide_no_nan(tf.cast(rho, norm.dtype), norm)
    return [
        gradient if gradient is None else gradient * factor if scale is None else gradient * scale * factor
        for gradient, scale in zip(scaled, scales, strict=True)
    ]


def _is_kernel(variable: Any) -> bool:
    return len(variable.shape) > 1 and getattr(variable, "name", "") not in ("bias", "gamma", "beta")
