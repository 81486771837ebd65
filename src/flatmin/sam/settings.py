"""The settings of a sharpness-aware step, and their checks. Imports neither TensorFlow nor Keras."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from .methods import METHODS, MethodSetting, method_settings

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


_SHARED_NUMBERS = {
    "rho": MethodSetting(default=0.05, varies=True, meaning=""),
    "eta": MethodSetting(default=0.01, meaning=""),
}


@_dataclass_with_method_settings
class Settings:
    """Settings of a step. None stands for the default, which is the paper's.

    Args:
        rho: the distance to the perturbed weights, >= 0: a number, or a function of the step (a Keras learning rate
            schedule, or one of your own on a tensor; the step is the optimizer's count of updates). With the number 0
            the step is the base optimizer's, bit for bit.
        method: one of `METHODS`.
        adaptive: measure the distance relative to each weight (`perturbation`); rho is about ten times as large then.
        eta: added to |w| there, >= 0.
        perturb: a function of a Keras variable that says whether it is perturbed (a bool), or its own rho (a number
            in place of `rho`). What is left out keeps its value in the perturbed pass and does not count in the norm.
            None: all weights are perturbed.
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
    perturb: Any = None
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
        for name, setting in (_SHARED_NUMBERS | dict(own)).items():
            value = getattr(self, name)
            if value is None and setting.default is None:
                continue
            if callable(value) and (setting.varies or value is self.rho):
                continue
            if not (_is_number(value) and 0 <= value < (math.inf if setting.below is None else setting.below)):
                raise invalid_argument(name, setting.expected, value)
        if not (self.perturb is None or callable(self.perturb)):
            raise invalid_argument("perturb", "a function of a variable, or None", self.perturb)
        for name in ("adaptive", "sync_perturbation"):
            if not isinstance(getattr(self, name), bool):
                raise invalid_argument(name, "True or False", getattr(self, name))
        for name in ("every", "accumulate", "num_batch_splits"):
            value = getattr(self, name)
            if not (isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1):
                raise invalid_argument(name, "an integer >= 1", value)
        if self.follows_rate:
            self._check_ranges()
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
        if METHODS[self.method].rho_range and callable(self.rho):
            for name in METHODS[self.method].rho_range or ():
                if not callable(getattr(self, name)):
                    raise invalid_argument(name, "None with a rho that is a function of the step", getattr(self, name))

    def _check_ranges(self) -> None:
        """The ends of GSAM's two ranges are in order."""
        low, high = self.rho_range
        names = METHODS[self.method].rho_range or ("rho", "rho")
        if low > high:
            raise invalid_argument(names[0], f"at most {names[1]}, {high}", low)
        if self.rate_min is not None and self.rate_max is not None and not self.rate_min < self.rate_max:
            raise invalid_argument("rate_min", f"less than rate_max, {self.rate_max}", self.rate_min)

    @property
    def rho_range(self) -> tuple[Any, Any]:
        """The lowest and the highest rho; twice the same function where rho is one."""
        low, high = METHODS[self.method].rho_range or ("rho", "rho")
        return getattr(self, low), getattr(self, high)

    @property
    def follows_rate(self) -> bool:
        """Whether rho follows the learning rate between two numbers."""
        low, high = self.rho_range
        return not callable(self.rho) and low != high

    @property
    def never_perturbs(self) -> bool:
        """Whether no step has a perturbed pass."""
        return not callable(self.rho) and self.rho_range[1] == 0

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
