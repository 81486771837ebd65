"""The perturbation: from the weights to the highest loss nearby, to first order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any

import keras
import numpy as np
from keras import ops

from .methods import norm
from .settings import Settings, invalid_argument


def perturbation(
    gradients: Sequence[Any],
    variables: Sequence[keras.Variable],
    rho: Any,
    adaptive: bool = False,
    eta: float = Settings.eta,
    perturb: Callable[[keras.Variable], bool | float] | None = None,
) -> list[Any]:
    """The step of length rho along the gradient; the norm is taken over all weights together.

    e = rho g / ||g||_2 (Foret et al. 2021, arXiv:2010.01412, eq. 2). Adaptive: e = rho T^2 g / ||T g||_2 with
    T = |w| + eta for kernels and 1 for biases and normalisation weights: those of fewer than two dimensions, or called
    bias, gamma or beta (Kwon et al. 2021, arXiv:2102.11600, eq. 3). Zero where all gradients are zero.

    Args:
        gradients: unscaled, shaped as `variables`; None stays None.
        rho: a number, or a function of the norm.
        perturb: see `Settings`. What is left out gets None.
    """
    own = [True if perturb is None else _checked(perturb(variable), variable) for variable in variables]
    chosen = [g is not None and (radius is not False) for g, radius in zip(gradients, own, strict=True)]
    scales = [
        ops.abs(ops.convert_to_tensor(variable)) + eta if adaptive and is_kernel(variable) else None
        for variable in variables
    ]
    scaled = [
        None if not used else ops.convert_to_tensor(gradient) if scale is None else gradient * scale
        for gradient, scale, used in zip(gradients, scales, chosen, strict=True)
    ]
    length = norm([gradient for gradient in scaled if gradient is not None])
    shared = ops.divide_no_nan(ops.cast(rho(length) if callable(rho) else rho, length.dtype), length)
    shifts: list[Any] = []
    for gradient, scale, radius in zip(scaled, scales, own, strict=True):
        if gradient is None:
            shifts.append(None)
            continue
        factor = shared if radius is True else ops.divide_no_nan(ops.cast(radius, length.dtype), length)
        along = gradient if scale is None else gradient * scale
        shifts.append(along * ops.cast(factor, along.dtype))
    return shifts


def _checked(answer: Any, variable: keras.Variable) -> bool | float:
    """What `perturb` said of a variable, as Python's own type.

    Raises:
        ValueError: it is neither a bool nor a finite number >= 0.
    """
    if isinstance(answer, bool | np.bool_):
        return bool(answer)
    if not (isinstance(answer, Real) and 0 <= float(answer) < math.inf):
        raise invalid_argument(
            "perturb", f"a function that returns True, False or a number >= 0, for {variable.path} too", answer
        )
    return float(answer)


def is_kernel(variable: Any) -> bool:
    """Whether adaptive SAM scales a weight: it has two dimensions or more, and is no bias of a normalisation."""
    return len(variable.shape) > 1 and getattr(variable, "name", "") not in ("bias", "gamma", "beta")
