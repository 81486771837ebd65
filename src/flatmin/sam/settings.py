"""The settings of a sharpness-aware step, and their checks. Imports neither TensorFlow nor Keras."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .methods import METHODS, method_settings

# A number, or None for the default.
Setting = Any

_T = TypeVar("_T")


def _dataclass_with_method_settings(cls: type[_T]) -> type[_T]:
    """Make a dataclass that has the methods' own settings as fields too, and describe them in its docstring."""
    lines = []
    for name, users in method_settings().items():
        cls.__annotations__[name] = "float | None"
        setattr(cls, name, None)
        meanings = [f"{method}: {setting.meaning}" for method, setting in users.items()]
        lines.append(f"        {name}: {'; '.join(meanings)}.\n")
    cls.__doc__ = (cls.__doc__ or "").replace("\n\n    Raises:", f"\n{''.join(lines)}\n    Raises:")
    return dataclass(frozen=True, kw_only=True)(cls)


@_dataclass_with_method_settings
class Settings:
    """Settings of a step. None stands for the default, which is the paper's.

    Args:
        rho: the distance to the perturbed weights, >= 0. With 0 the step is the base optimizer's, bit for bit.
        method: one of `METHODS`.
        adaptive: measure the distance relative to each weight (`perturbation`); rho is about ten times as large then.
        eta: added to |w| there, >= 0.
        every: the first step and every `every`-th step after it are perturbed, the others are not.
        num_batch_splits: m-sharpness (Foret 2021, section 4.1): each part of the batch has its own perturbation.
        accumulate: the number of calls whose gradients are averaged before the optimizer steps.
        sync_perturbation: compute one perturbation from all replicas' gradients. Without it each replica has its own.

    Raises:
        ValueError: a value is out of range, the method is unknown, or a setting belongs to another method.
    """

    rho: Setting = 0.05
    method: str = "sam"
    adaptive: bool = False
    eta: Setting = 0.01
    every: int = 1
    num_batch_splits: Setting = None
    accumulate: int = 1
    sync_perturbation: bool = False

    if TYPE_CHECKING:  # the decorator adds what mypy cannot see
        __dataclass_fields__: ClassVar[dict[str, Any]]

        def __init__(self, **settings: Any) -> None: ...

        def __getattr__(self, name: str) -> Any: ...

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise invalid_argument("method", f"one of {', '.join(METHODS)}", self.method)
        self._fill_in_defaults()
        own = METHODS[self.method].settings
        ranges = {"rho": "a finite number >= 0", "eta": "a finite number >= 0"}
        for name, expected in (ranges | {name: setting.expected for name, setting in own.items()}).items():
            below = own[name].below if name in own else None
            value = getattr(self, name)
            if not (_is_number(value) and 0 <= value < (math.inf if below is None else below)):
                raise invalid_argument(name, expected, value)
        for name in ("adaptive", "sync_perturbation"):
            if not isinstance(getattr(self, name), bool):
                raise invalid_argument(name, "True or False", getattr(self, name))
        for name in ("every", "accumulate", "num_batch_splits"):
            value = getattr(self, name)
            if not (isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1):
                raise invalid_argument(name, "an integer >= 1", value)
        low, high = self.rho_range
        if low > high:
            low_name, high_name = METHODS[self.method].rho_range or ("rho", "rho")
            raise invalid_argument(low_name, f"at most {high_name}, {high}", low)
        if self.sync_perturbation and self.num_batch_splits > 1:
            raise invalid_argument(
                "sync_perturbation", "False with num_batch_splits, which gives each part its own", True
            )

    def _fill_in_defaults(self) -> None:
        """Replace None by the default, and refuse the settings of other methods."""
        for name, default in (("rho", Settings.rho), ("eta", Settings.eta), ("num_batch_splits", 1)):
            if getattr(self, name) is None:
                object.__setattr__(self, name, default)
        own = METHODS[self.method].settings
        for name in method_settings():
            if name not in own and getattr(self, name) is not None:
                expected = f"None, because it is not a setting of method={self.method!r}"
                raise invalid_argument(name, expected, getattr(self, name))
        for name, setting in own.items():
            if getattr(self, name) is None:
                default = setting.default
                object.__setattr__(self, name, getattr(self, default) if isinstance(default, str) else default)

    @property
    def rho_range(self) -> tuple[float, float]:
        """The lowest and the highest rho."""
        low, high = METHODS[self.method].rho_range or ("rho", "rho")
        return getattr(self, low), getattr(self, high)

    @property
    def never_perturbs(self) -> bool:
        """Whether no step has a perturbed pass."""
        return self.rho_range[1] == 0

    @property
    def is_base_step(self) -> bool:
        """Whether every step is exactly the base optimizer's."""
        return self.never_perturbs and self.num_batch_splits == 1 and self.accumulate == 1


def invalid_argument(name: str, expected: str, received: Any) -> ValueError:
    """The error for a wrong value of an argument."""
    return ValueError(
        f"Invalid value received for argument `{name}`. Expected {expected}. Received: {name}={received!r}"
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
