"""The checks of settings."""

from __future__ import annotations

from typing import Any

import numpy as np
import pydantic
import pytest
from sam_networks import network

from flatmin import sam
from flatmin.common import params
from flatmin.sam import Settings, SharpnessAwareMinimization


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"rho": -0.1}, "rho"),
        ({"rho": float("nan")}, "rho"),
        ({"rho": float("inf")}, "rho"),
        ({"rho": "0.1"}, "rho"),
        ({"rho": True}, "rho"),
        ({"adaptive": "false"}, "adaptive"),
        ({"method": "esam"}, "method"),
        ({"every": 0}, "every"),
        ({"every": 1.5}, "every"),
        ({"num_batch_splits": 0}, "num_batch_splits"),
        ({"accumulate": 0}, "accumulate"),
        ({"accumulate": True}, "accumulate"),
        ({"eta": -1.0}, "eta"),
        ({"alpha": 0.1}, "alpha"),
        ({"method": "wsam", "alpha": 0.1}, "alpha"),
        ({"gamma": 0.5}, "gamma"),
        ({"method": "wsam", "gamma": 1.0}, "gamma"),
        ({"rho_min": 0.1}, "rho_min"),
        ({"rho_max": 0.1}, "rho_max"),
        ({"method": "gsam", "rho_min": 0.2, "rho_max": 0.1}, "rho_min"),
        ({"method": "gsam", "rho_min": 0.2}, "rho_min"),
        ({"method": "gsam", "alpha": float("nan")}, "alpha"),
        ({"sigma": 1.0}, "sigma"),
        ({"method": "friendly", "sigma": -1.0}, "sigma"),
        ({"friendly_lambda": 0.5}, "friendly_lambda"),
        ({"method": "friendly", "friendly_lambda": 1.0}, "friendly_lambda"),
        ({"sync_perturbation": True, "num_batch_splits": 2}, "sync_perturbation"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(
        ValueError, match=f"Invalid value received for argument `{name}`. Expected .* Received: {name}="
    ):
        SharpnessAwareMinimization(network(), **settings)


@pytest.mark.parametrize("method", sam.METHODS)
def test_params_schema_accepts_each_methods_own_settings(method: str) -> None:
    own = {"alpha": 0.5, "gamma": 0.5, "rho_min": 0.04, "rho_max": 0.06, "sigma": 0.5, "friendly_lambda": 0.5}
    for name, value in own.items():
        try:
            Settings(method=method, **{name: value})
        except ValueError:
            with pytest.raises(pydantic.ValidationError, match=f"no value with method {method}"):
                params.Sam.model_validate({"method": method, name: value})
        else:
            assert params.Sam.model_validate({"method": method, name: value})
    assert Settings(**params.Sam.model_validate({"method": method}).settings()) == Settings(method=method)


def test_settings_accept_numpy_numbers() -> None:
    numbers: dict[str, Any] = {"rho": np.float32(0.5), "every": np.int64(2), "gamma": np.float16(0.5)}
    settings = Settings(method="wsam", **numbers)
    assert (settings.rho, settings.every, settings.gamma) == (0.5, 2, 0.5)
