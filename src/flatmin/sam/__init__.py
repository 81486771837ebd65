"""Sharpness-aware minimization (SAM) for Keras 3: steps along the gradient at perturbed weights.

There are two entry points. `SharpnessAwareMinimization` wraps a model for `compile` and `fit`; `Step` is for a training
loop of your own. The package needs Keras and its backend (TensorFlow, JAX or PyTorch) alone, and knows no data set and
no pipeline.

    model = SharpnessAwareMinimization(keras.applications.ResNet50(), rho=0.05)
    model.compile("adam", "sparse_categorical_crossentropy")
    model.fit(images, labels)

Keras is imported with the first name that needs them, so that reading the table of methods is cheap.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .methods import (
    METHODS,
    Method,
    MethodSetting,
    friendly_direction,
    gsam_gradient,
    lesam_rho,
    looksam_gradient,
    method_settings,
    methods_table,
    moving_average,
    orthogonal,
    scheduled_rho,
    wsam_gradient,
    wsam_sharpness,
)
from .settings import Settings

if TYPE_CHECKING:
    from .keras_model import SharpnessAwareMinimization
    from .optimizers import base_optimizer, learning_rate_range
    from .perturb import is_kernel, perturbation
    from .step import Step

__all__ = [
    "METHODS",
    "Method",
    "MethodSetting",
    "Settings",
    "SharpnessAwareMinimization",
    "Step",
    "base_optimizer",
    "friendly_direction",
    "gsam_gradient",
    "is_kernel",
    "learning_rate_range",
    "lesam_rho",
    "looksam_gradient",
    "method_settings",
    "methods_table",
    "moving_average",
    "orthogonal",
    "perturbation",
    "scheduled_rho",
    "wsam_gradient",
    "wsam_sharpness",
]

_MODULES = {
    "SharpnessAwareMinimization": "keras_model",
    "Step": "step",
    "base_optimizer": "optimizers",
    "learning_rate_range": "optimizers",
    "is_kernel": "perturb",
    "perturbation": "perturb",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
