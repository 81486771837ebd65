"""The choice of the classifier that is released."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean


@dataclass(frozen=True)
class Trained:
    """A trained classifier on val.

    Attributes:
        seed: None for a method that is trained once, whatever the seed.
        accuracy: a fraction. loss: mean cross-entropy (nats). Both over images, or over classes, by `select.metric`.
        gradient_evaluations: images times passes forward and backward that its training took.
    """

    seed: int | None
    accuracy: float
    loss: float
    gradient_evaluations: int


def choose(methods: Mapping[str, Sequence[Trained]], tolerance: float) -> tuple[str, int]:
    """The method and the index in its trainings of the classifier to release.

    The method is the one with the fewest gradient evaluations among those whose val accuracy, a mean over seeds, is at
    most `tolerance` (a fraction) below the best; of equals the more accurate, then the first. Of its trainings it is
    the one with the best val accuracy; of equals the one with the lower loss, then the first.
    """
    # Accuracies are fractions of a count: rounding must not separate two that are equal or differ by the tolerance.
    accuracies = {name: round(fmean(each.accuracy for each in trained), 12) for name, trained in methods.items()}
    costs = {name: fmean(each.gradient_evaluations for each in trained) for name, trained in methods.items()}
    best = max(accuracies.values())
    near = [name for name, accuracy in accuracies.items() if accuracy >= best - tolerance - 1e-9]
    method = min(near, key=lambda name: (costs[name], -accuracies[name]))
    trained = methods[method]
    return method, min(range(len(trained)), key=lambda index: (-trained[index].accuracy, trained[index].loss))
