"""The temperature against closed forms and scikit-learn's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.special
from sklearn.calibration import CalibratedClassifierCV
from sklearn.datasets import load_digits
from sklearn.frozen import FrozenEstimator
from sklearn.linear_model import LogisticRegression

from flatmin.selection.calibration import HIGHEST, LOWEST, fit_temperature, is_bound


def two_classes(margin: float, right: int, wrong: int) -> tuple[np.ndarray, np.ndarray]:
    """Logits of images that all have the same margin between two classes."""
    logits = np.tile(np.array([margin, 0.0], np.float32), (right + wrong, 1))
    return logits, np.repeat([0, 1], [right, wrong])


@pytest.mark.parametrize(("margin", "right", "wrong"), [(4.0, 9, 1), (1.0, 9, 1), (2.0, 51, 49), (-3.0, 1, 4)])
def test_temperature_of_one_margin_makes_confidence_the_accuracy(margin: float, right: int, wrong: int) -> None:
    # The sigmoid of margin / T is right / (right + wrong).
    expected = margin / math.log(right / wrong)
    assert fit_temperature(*two_classes(margin, right, wrong)) == pytest.approx(min(expected, HIGHEST), rel=1e-6)


def test_temperature_without_an_error_or_without_information_is_at_its_bound() -> None:
    assert fit_temperature(*two_classes(1.0, 10, 0)) == pytest.approx(LOWEST, rel=1e-6)
    assert fit_temperature(*two_classes(1.0, 1, 9)) == pytest.approx(HIGHEST, rel=1e-6)
    assert is_bound(fit_temperature(*two_classes(1.0, 10, 0)))
    assert is_bound(fit_temperature(*two_classes(1.0, 1, 9)))
    assert not is_bound(fit_temperature(*two_classes(1.0, 9, 1)))


@pytest.mark.parametrize("scale", [0.25, 1.0, 6.0])
def test_temperature_grows_with_the_logits(scale: float) -> None:
    random = np.random.default_rng(0)
    logits = random.normal(size=(3000, 7)) * 2
    # Labels drawn from the probabilities of the logits, whose temperature is therefore near 1.
    labels = (scipy.special.softmax(logits, axis=1).cumsum(axis=1) < random.random((3000, 1))).sum(axis=1)
    fitted = fit_temperature(logits, labels)
    assert fitted == pytest.approx(1, abs=0.06)
    assert fit_temperature(scale * logits, labels) == pytest.approx(scale * fitted, rel=1e-6)


def test_temperature_of_large_logits_is_finite() -> None:
    logits, labels = two_classes(1e4, 9, 1)
    assert fit_temperature(logits, labels) == pytest.approx(HIGHEST, rel=1e-6)


@pytest.mark.parametrize("regularisation", [1e-3, 1.0])  # under-confident and over-confident
def test_temperature_is_that_of_scikit_learn(regularisation: float) -> None:
    pixels, labels = load_digits(return_X_y=True)
    classifier = LogisticRegression(C=regularisation, max_iter=5000).fit(pixels[:400], labels[:400])
    pixels, labels = pixels[400:1000], labels[400:1000]
    logits = classifier.decision_function(pixels)
    temperature = fit_temperature(logits, labels)
    assert abs(math.log(temperature)) > 0.3, "the classifier needs no calibration"
    reference = CalibratedClassifierCV(FrozenEstimator(classifier), method="temperature").fit(pixels, labels)
    expected = reference.predict_proba(pixels)
    np.testing.assert_allclose(scipy.special.softmax(logits / temperature, axis=1), expected, atol=1e-6)
