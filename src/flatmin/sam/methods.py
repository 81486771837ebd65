"""The table of methods: the settings, gradients, memory and formulas of each.

The checks of `Settings`, the signature of `SharpnessAwareMinimization`, a schema of params and the table in the
documentation derive from `METHODS`: a new method is one entry there, its formula, and its test.

Keras is imported where a formula is computed, because whoever only reads the table should not wait for its backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Tensors = list[Any]  # one tensor for each trained weight that has a gradient
Gradients = dict[str, Tensors]  # "first", "perturbed", or both
Memory = dict[str, Tensors]  # name of a state -> its value


@dataclass(frozen=True, kw_only=True)
class MethodSetting:
    """A number that belongs to one method or several. It is finite and at least 0.

    Args:
        default: the default, the name of the setting whose value is the default, or None for none.
        below: an exclusive upper bound, or None.
        varies: whether it may also be a function of the step, as `Settings.rho`.
        meaning: what it does, for the documentation.
    """

    default: float | str | None
    meaning: str
    below: float | None = None
    varies: bool = False

    @property
    def expected(self) -> str:
        """The allowed range in words."""
        number = "a finite number >= 0" if self.below is None else f"a number in [0, {self.below:g})"
        return f"{number}, or a function of the step" if self.varies else number


@dataclass(frozen=True, kw_only=True)
class Method:
    """How one method perturbs the weights, and which gradient it gives to the optimizer.

    Args:
        paper: authors, year and link, in Markdown.
        when: when to choose it, in Markdown.
        settings: those that the method does not share with all others.
        rho_range: the names of the two settings between which rho follows the learning rate (`scheduled_rho`). None:
            rho is constant.
        radius: (settings, norm of the gradient, step) -> rho. None: rho is as it is set.
        gradients: the ones that `final_gradient` and `added` read: "first", "perturbed" or both.
        memory: names of the states that are kept between steps, each shaped as the trained weights and 0 at first.
        direction: (settings, first gradient, memory) -> the direction that the weights are perturbed along. The
            gradient is of a mean loss, also where there are several replicas. None: along the first gradient.
        final_gradient: (settings, gradients, memory) -> the gradient for the optimizer, and the new values of the
            states that change.
        unperturbed_gradient: the gradient for the optimizer in the steps to which `every` gives no perturbed pass, from
            the same arguments. None: `final_gradient` is used there too, and "perturbed" is the first gradient.
        added: (settings, gradients) -> a gradient along which the weights go by the learning rate alone, beside what
            the optimizer makes of `final_gradient`. None: nothing is added.
    """

    paper: str
    when: str
    settings: Mapping[str, MethodSetting] = field(default_factory=dict)
    rho_range: tuple[str, str] | None = None
    radius: Callable[[Any, Any, Any], Any] | None = None
    gradients: tuple[str, ...] = ("first", "perturbed")
    memory: tuple[str, ...] = ()
    direction: Callable[[Any, Tensors, Memory], Tensors] | None = None
    final_gradient: Callable[[Any, Gradients, Memory], tuple[Tensors, Memory]]
    unperturbed_gradient: Callable[[Any, Gradients, Memory], Tensors] | None = None
    added: Callable[[Any, Gradients], Tensors] | None = None


def inner_product(one: Tensors, other: Tensors) -> Any:
    """The scalar product over all weights, in float32, or in float64 where a weight has that."""
    from keras import ops

    dtype = "float64" if any("float64" in str(each.dtype) for each in one) else "float32"
    products = [ops.sum(ops.cast(a, dtype) * ops.cast(b, dtype)) for a, b in zip(one, other, strict=True)]
    return ops.sum(ops.stack(products)) if products else ops.zeros((), dtype)


def norm(tensors: Tensors) -> Any:
    """The Euclidean norm over all weights together."""
    from keras import ops

    return ops.sqrt(inner_product(tensors, tensors))


def scheduled_rho(rho_min: float, rho_max: float, rate: Any, low: Any, high: Any) -> Any:
    """GSAM's rho: rho_min + (rho_max - rho_min) (rate - low) / (high - low) (Zhuang et al. 2022, algorithm 1).

    Args:
        rate: the current learning rate.
        low, high: the learning rate's range. A rate outside of it counts as the nearer end.
    """
    from keras import ops

    position = ops.divide_no_nan(ops.cast(rate, "float32") - low, ops.convert_to_tensor(high - low, "float32"))
    return rho_min + (rho_max - rho_min) * ops.clip(position, 0.0, 1.0)


def lesam_rho(sigma: Any, gradient_norm: Any, rho_max: Any) -> Any:
    """LE-SAM's rho: min(sigma / (||g|| + c), rho_max) with c = 1e-12 (Wang et al. 2026, arXiv:2605.10183).

    To first order a step of this length raises the loss by sigma, wherever the weights are. The authors' code
    (smithgun2005/LE-SAM-ICML2026) trains with sigma 0.35 and rho_max 999, so without a limit; sigma rises from 0 over
    the first 10 of 200 epochs and falls to 0, by a cosine, over the last 40. The paper's own tables were not read.
    """
    from keras import ops

    return ops.minimum(sigma / (gradient_norm + 1e-12), rho_max)


def gsam_gradient(first: Tensors, perturbed: Tensors, alpha: float) -> Tensors:
    """GSAM's gradient: the perturbed one minus alpha times the first one's component orthogonal to it.

    g_p - alpha g_orthogonal (Zhuang et al. 2022, arXiv:2203.08065, algorithm 1 and eq. 8).
    """
    return [p - alpha * o for p, o in zip(perturbed, orthogonal(first, perturbed), strict=True)]


def wsam_gradient(first: Tensors, perturbed: Tensors, gamma: float) -> Tensors:
    """WSAM's gradient: (1 - 2 gamma) / (1 - gamma) g + gamma / (1 - gamma) g_p (Yue et al. 2023, arXiv:2305.15817).

    It is the gradient of loss + gamma / (1 - gamma) sharpness. The optimizer gets it as one gradient, which is the
    paper's coupled variant; the decoupled one (`wsam_sharpness`) keeps the sharpness out of the optimizer's moments.
    """
    return [(1 - 2 * gamma) / (1 - gamma) * f + gamma / (1 - gamma) * p for f, p in zip(first, perturbed, strict=True)]


def wsam_sharpness(first: Tensors, perturbed: Tensors, gamma: float) -> Tensors:
    """The gradient of WSAM's sharpness: gamma / (1 - gamma) (g_p - g) (Yue et al. 2023, arXiv:2305.15817)."""
    return [gamma / (1 - gamma) * (p - f) for f, p in zip(first, perturbed, strict=True)]


def looksam_gradient(first: Tensors, orthogonal_part: Tensors, alpha: float) -> Tensors:
    """LookSAM's gradient between its perturbed steps: g + alpha ||g|| / ||g_v|| g_v.

    g_v is the last perturbed gradient's component orthogonal to the first gradient (Liu et al. 2022, arXiv:2203.02714,
    algorithm 1). Each norm is taken over all weights together.
    """
    from keras import ops

    factor = ops.divide_no_nan(alpha * norm(first), norm(orthogonal_part))
    return [f + ops.cast(factor, f.dtype) * part for f, part in zip(first, orthogonal_part, strict=True)]


def orthogonal(vector: Tensors, to: Tensors) -> Tensors:
    """The component of `vector` that is orthogonal to `to`; each is one vector over all weights."""
    from keras import ops

    factor = ops.divide_no_nan(inner_product(vector, to), inner_product(to, to))
    return [v - ops.cast(factor, v.dtype) * t for v, t in zip(vector, to, strict=True)]


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


def at_step(value: Any, step: Any) -> Any:
    """A number, or what a function of the step gives."""
    return value(step) if callable(value) else value


def _perturbed(_: Any, gradients: Gradients, __: Memory) -> tuple[Tensors, Memory]:
    return gradients["perturbed"], {}


def _gsam(settings: Any, gradients: Gradients, _: Memory) -> tuple[Tensors, Memory]:
    return gsam_gradient(gradients["first"], gradients["perturbed"], settings.alpha), {}


def _wsam(settings: Any, gradients: Gradients, _: Memory) -> tuple[Tensors, Memory]:
    return wsam_gradient(gradients["first"], gradients["perturbed"], settings.gamma), {}


def _wsam_decoupled(_: Any, gradients: Gradients, __: Memory) -> tuple[Tensors, Memory]:
    return gradients["first"], {}


def _wsam_added(settings: Any, gradients: Gradients) -> Tensors:
    return wsam_sharpness(gradients["first"], gradients["perturbed"], settings.gamma)


def _lesam_radius(settings: Any, gradient_norm: Any, step: Any) -> Any:
    return lesam_rho(at_step(settings.sigma, step), gradient_norm, at_step(settings.rho, step))


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
            "rate_min": MethodSetting(default=None, meaning="the lowest learning rate, where no schedule says it"),
            "rate_max": MethodSetting(default=None, meaning="the highest learning rate, where no schedule says it"),
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
    "wsam-decoupled": Method(
        paper="Yue 2023, [arXiv:2305.15817](https://arxiv.org/abs/2305.15817)",
        when="as `wsam`, and the sharpness should stay out of the optimizer's moments and of clipping",
        settings={
            "gamma": MethodSetting(default=0.9, below=1, meaning="the weight of sharpness: 0 is the base optimizer")
        },
        final_gradient=_wsam_decoupled,
        added=_wsam_added,
    ),
    "lesam": Method(
        paper="Wang 2026, [arXiv:2605.10183](https://arxiv.org/abs/2605.10183)",
        when="gradients vanish during training: rho grows as they do, up to `rho`, so that the loss rises by `sigma`; "
        "anneal `sigma` by a schedule",
        settings={
            "sigma": MethodSetting(default=0.35, varies=True, meaning="the rise of the loss that sets the distance"),
        },
        radius=_lesam_radius,
        gradients=("perturbed",),
        final_gradient=_perturbed,
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
        settings = ", ".join(
            f"`{key}`" + (f" ({setting.default})" if setting.default is not None else "")
            for key, setting in method.settings.items()
        )
        lines.append(f"| `{name}` | {method.paper} | {settings} | {method.when} |")
    return "\n".join(lines) + "\n"
