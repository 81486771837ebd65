"""The table of methods: the settings, gradients, memory and formulas of each.

The checks of `Settings`, the signature of `SharpnessAwareMinimization`, a schema of params and the table in the
documentation derive from `METHODS`: a new method is one entry there, its formula, and its test.

TensorFlow is imported where a formula is computed, because whoever only reads the table should not wait for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorflow as tf

Tensors = list[Any]  # one tensor for each trained weight that has a gradient
Gradients = dict[str, Tensors]  # "first", "perturbed", or both
Memory = dict[str, Tensors]  # name of a state -> its value


@dataclass(frozen=True, kw_only=True)
class MethodSetting:
    """A number that belongs to one method or several. It is finite and at least 0.

    Args:
        default: the default, or the name of the setting whose value is the default.
        below: an exclusive upper bound, or None.
        meaning: what it does, for the documentation.
    """

    default: float | str
    meaning: str
    below: float | None = None

    @property
    def expected(self) -> str:
        """The allowed range in words."""
        return "a finite number >= 0" if self.below is None else f"a number in [0, {self.below:g})"


@dataclass(frozen=True, kw_only=True)
class Method:
    """How one method perturbs the weights, and which gradient it gives to the optimizer.

    Args:
        paper: authors, year and link, in Markdown.
        when: when to choose it, in Markdown.
        settings: those that the method does not share with all others.
        rho_range: the names of the two settings between which rho follows the learning rate (`scheduled_rho`). None:
            rho is constant.
        gradients: the ones that `final_gradient` reads: "first", "perturbed" or both.
        memory: names of the states that are kept between steps, each shaped as the trained weights and 0 at first.
        direction: (settings, first gradient, memory) -> the direction that the weights are perturbed along. The
            gradient is of a mean loss, also where there are several replicas. None: along the first gradient.
        final_gradient: (settings, gradients, memory) -> the gradient for the optimizer, and the new values of the
            states that change.
        unperturbed_gradient: the gradient for the optimizer in the steps to which `every` gives no perturbed pass, from
            the same arguments. None: `final_gradient` is used there too, and "perturbed" is the first gradient.
    """

    paper: str
    when: str
    settings: Mapping[str, MethodSetting] = field(default_factory=dict)
    rho_range: tuple[str, str] | None = None
    gradients: tuple[str, ...] = ("first", "perturbed")
    memory: tuple[str, ...] = ()
    direction: Callable[[Any, Tensors, Memory], Tensors] | None = None
    final_gradient: Callable[[Any, Gradients, Memory], tuple[Tensors, Memory]]
    unperturbed_gradient: Callable[[Any, Gradients, Memory], Tensors] | None = None


def scheduled_rho(rho_min: float, rho_max: float, rate: Any, low: float, high: float) -> tf.Tensor:
    """GSAM's rho: rho_min + (rho_max - rho_min) (rate - low) / (high - low) (Zhuang et al. 2022, algorithm 1).

    Args:
        rate: the current learning rate.
        low, high: the learning rate's range. A rate outside of it counts as the nearer end.
    """
    import tensorflow as tf

    position = tf.math.divide_no_nan(tf.cast(rate, "float32") - low, high - low)
    return rho_min + (rho_max - rho_min) * tf.clip_by_value(position, 0.0, 1.0)


def gsam_gradient(first: Tensors, perturbed: Tensors, alpha: float) -> Tensors:
    """GSAM's gradient: the perturbed one minus alpha times the first one's component orthogonal to it.

    g_p - alpha g_orthogonal (Zhuang et al. 2022, arXiv:2203.08065, algorithm 1 and eq. 8).
    """
    return [p - alpha * o for p, o in zip(perturbed, orthogonal(first, perturbed), strict=True)]


def wsam_gradient(first: Tensors, perturbed: Tensors, gamma: float) -> Tensors:
    """WSAM's gradient: (1 - 2 gamma) / (1 - gamma) g + gamma / (1 - gamma) g_p (Yue et al. 2023, arXiv:2305.15817).

    It is the gradient of loss + gamma / (1 - gamma) sharpness. The optimizer gets it as one gradient, which is the
    paper's coupled variant; the decoupled one keeps the sharpness out of the optimizer's moments and of clipping.
    """
    return [(1 - 2 * gamma) / (1 - gamma) * f + gamma / (1 - gamma) * p for f, p in zip(first, perturbed, strict=True)]


def looksam_gradient(first: Tensors, orthogonal_part: Tensors, alpha: float) -> Tensors:
    """LookSAM's gradient between its perturbed steps: g + alpha ||g|| / ||g_v|| g_v.

    g_v is the last perturbed gradient's component orthogonal to the first gradient (Liu et al. 2022, arXiv:2203.02714,
    algorithm 1). Each norm is taken over all weights together.
    """
    import tensorflow as tf

    norm, norm_of_part = tf.linalg.global_norm(first), tf.linalg.global_norm(orthogonal_part)
    factor = tf.math.divide_no_nan(alpha * norm, norm_of_part)
    return [f + factor * part for f, part in zip(first, orthogonal_part, strict=True)]


def orthogonal(vector: Tensors, to: Tensors) -> Tensors:
    """The component of `vector` that is orthogonal to `to`; each is one vector over all weights."""
    import tensorflow as tf

    def product(one: Tensors, other: Tensors) -> tf.Tensor:
        return tf.add_n([tf.reduce_sum(a * b) for a, b in zip(one, other, strict=True)])

    factor = tf.math.divide_no_nan(product(vector, to), product(to, to))
    return [v - factor * t for v, t in zip(vector, to, strict=True)]


def moving_average(average: Tensors, gradient: Tensors, decay: float) -> Tensors:
    """decay m + (1 - decay) g: the moving average m of F-SAM after a gradient g."""
    return [decay * a + (1 - decay) * g for a, g in zip(average, gradient, strict=True)]


def friendly_direction(gradient: Tensors, average: Tensors, sigma: float, decay: float) -> Tensors:
    """The direction that F-SAM perturbs along (Li et al. 2024, arXiv:2403.12350, algorithm 1).

    d_t = g_t - sigma m_t with m_t = lambda m_{t-1} + (1 - lambda) g_t and m_{-1} = 0.

    Args:
        average: m_{t-1}.
        decay: lambda.
    """
    return [g - sigma * a for g, a in zip(gradient, moving_average(average, gradient, decay), strict=True)]


def _perturbed(_: Any, gradients: Gradients, __: Memory) -> tuple[Tensors, Memory]:
    return gradients["perturbed"], {}


def _gsam(settings: Any, gradients: Gradients, _: Memory) -> tuple[Tensors, Memory]:
    return gsam_gradient(gradients["first"], gradients["perturbed"], settings.alpha), {}


def _wsam(settings: Any, gradients: Gradients, _: Memory) -> tuple[Tensors, Memory]:
    return wsam_gradient(gradients["first"], gradients["perturbed"], settings.gamma), {}


def _looksam(_: Any, gradients: Gradients, __: Memory) -> tuple[Tensors, Memory]:
    return gradients["perturbed"], {"orthogonal": orthogonal(gradients["perturbed"], gradients["first"])}


def _looksam_unperturbed(settings: Any, gradients: Gradients, memory: Memory) -> Tensors:
    return looksam_gradient(gradients["first"], memory["orthogonal"], settings.alpha)


def _friendly_direction(settings: Any, first: Tensors, memory: Memory) -> Tensors:
    return friendly_direction(first, memory["average"], settings.sigma, settings.friendly_lambda)


def _friendly(settings: Any, gradients: Gradients, memory: Memory) -> tuple[Tensors, Memory]:
    average = moving_average(memory["average"], gradients["first"], settings.friendly_lambda)
    return gradients["perturbed"], {"average": average}


METHODS: dict[str, Method] = {
    "sam": Method(
        paper="Foret 2021, [arXiv:2010.01412](https://arxiv.org/abs/2010.01412)",
        when="first: it has the most evidence",
        gradients=("perturbed",),
        final_gradient=_perturbed,
    ),
    "gsam": Method(
        paper="Zhuang 2022, [arXiv:2203.08065](https://arxiv.org/abs/2203.08065)",
        when="the loss at the perturbed weights falls, but its gap to the loss at the weights does not",
        settings={
            "alpha": MethodSetting(default=0.4, meaning="how strongly the gap between the two losses is reduced"),
            "rho_min": MethodSetting(default="rho", meaning="rho at the lowest learning rate"),
            "rho_max": MethodSetting(default="rho", meaning="rho at the highest learning rate"),
        },
        rho_range=("rho_min", "rho_max"),
        final_gradient=_gsam,
    ),
    "wsam": Method(
        paper="Yue 2023, [arXiv:2305.15817](https://arxiv.org/abs/2305.15817)",
        when="sharpness should weigh more (gamma > 0.5) or less than in SAM (0.5)",
        settings={
            "gamma": MethodSetting(
                default=0.9, below=1, meaning="the weight of sharpness: 0 is the base optimizer, 0.5 is sam"
            )
        },
        final_gradient=_wsam,
    ),
    "looksam": Method(
        paper="Liu 2022, [arXiv:2203.02714](https://arxiv.org/abs/2203.02714)",
        when="the budget is tight: as `every`, but the steps between reuse a part of the last perturbed gradient; try "
        "`every=5`",
        settings={"alpha": MethodSetting(default=0.7, meaning="how much of the orthogonal part is reused")},
        memory=("orthogonal",),
        final_gradient=_looksam,
        unperturbed_gradient=_looksam_unperturbed,
    ),
    "friendly": Method(
        paper="Li 2024, [arXiv:2403.12350](https://arxiv.org/abs/2403.12350)",
        when="gradients are noisy: it perturbs along the part of the gradient that is particular to the batch",
        settings={
            "sigma": MethodSetting(default=1.0, meaning="how much of the gradients' moving average is subtracted"),
            "friendly_lambda": MethodSetting(default=0.9, below=1, meaning="the decay of that average"),
        },
        memory=("average",),
        direction=_friendly_direction,
        final_gradient=_friendly,
    ),
}


def method_settings() -> dict[str, dict[str, MethodSetting]]:
    """Every setting that not all methods share -> the methods that have it, and what it is to each.

    Raises:
        ValueError: two methods allow different ranges for one name, so that no schema could check it.
    """
    users: dict[str, dict[str, MethodSetting]] = {}
    for method, entry in METHODS.items():
        for name, setting in entry.settings.items():
            users.setdefault(name, {})[method] = setting
    for name, settings in users.items():
        if len({setting.below for setting in settings.values()}) > 1:
            raise ValueError(f"{name}: expected one range in all methods, received several ({', '.join(settings)})")
    return users


def methods_table() -> str:
    """The methods as a Markdown table, ending with a newline."""
    lines = ["| method | paper | its settings (default) | when |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        settings = ", ".join(f"`{key}` ({setting.default})" for key, setting in method.settings.items())
        lines.append(f"| `{name}` | {method.paper} | {settings} | {method.when} |")
    return "\n".join(lines) + "\n"
