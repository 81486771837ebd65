"""Out-of-fold probabilities, and the labels that they speak against."""

from __future__ import annotations

import numpy as np
import pytest

from flatmin.audit import labels as label_check

CLASSES = 4


def clouds(each: int = 60, noise: float = 0.1, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points around the centre of each class; some get another class's label: vectors, given labels, true labels."""
    random = np.random.default_rng(seed)
    true = np.repeat(np.arange(CLASSES), each)
    vectors = random.normal(size=(len(true), 8)).astype(np.float32) + 3 * np.eye(CLASSES, 8, dtype=np.float32)[true]
    wrong = random.random(len(true)) < noise
    return vectors, np.where(wrong, (true + random.integers(1, CLASSES, len(true))) % CLASSES, true), true


def test_out_of_fold_probabilities_are_of_models_that_have_not_seen_the_image() -> None:
    """Labels drawn at random can be learnt by heart, but not guessed."""
    random = np.random.default_rng(0)
    vectors = random.normal(size=(200, 150)).astype(np.float32)
    given = random.integers(0, 2, 200)
    found = label_check.out_of_fold(vectors, given, 2)
    assert found.sum(axis=1) == pytest.approx(1)
    assert 0.35 < (found.argmax(axis=1) == given).mean() < 0.65
    vectors, given, true = clouds(noise=0)
    assert (label_check.out_of_fold(vectors, given, CLASSES).argmax(axis=1) == true).mean() > 0.8


def test_out_of_fold_images_of_a_group_are_in_one_fold() -> None:
    """Each point is there twice, and its label is drawn at random: only its copy tells it."""
    random = np.random.default_rng(0)
    vectors = np.repeat(random.normal(size=(150, 300)).astype(np.float32), 2, axis=0)
    given = np.repeat(random.integers(0, 2, 150), 2)
    together = label_check.out_of_fold(vectors, given, 2, np.repeat(np.arange(150), 2))
    assert (together.argmax(axis=1) == given).mean() < 0.65
    assert (label_check.out_of_fold(vectors, given, 2).argmax(axis=1) == given).mean() > 0.8


def test_out_of_fold_class_of_one_image_gets_probability_zero_there() -> None:
    vectors, given, _ = clouds(noise=0)
    given[7] = CLASSES
    found = label_check.out_of_fold(vectors, given, CLASSES + 1)
    assert found[7, CLASSES] == 0
    assert found[7].sum() == pytest.approx(1)


@pytest.mark.parametrize(
    ("given", "groups"),
    [([0, 1, 0], None), ([0, 1, 0, 1, 0, 0, 0, 0], list("aaaabbbb"))],
)
def test_out_of_fold_where_a_fold_leaves_one_class_gives_that_class(given: list[int], groups: list[str] | None) -> None:
    vectors = np.random.default_rng(0).normal(size=(len(given), 2)).astype(np.float32)
    found = label_check.out_of_fold(vectors, np.array(given), 2, None if groups is None else np.array(groups))
    assert found.sum(axis=1) == pytest.approx(1)
    assert (found[:, 1] == 0).any()


@pytest.mark.parametrize("images", [1, 10])
def test_suspects_of_a_class_that_is_in_one_fold_alone_are_none_and_no_image_is_suspected_of_it(images: int) -> None:
    """No classifier that saw the class judged its images, so nothing says how probable it is of its own."""
    vectors, given, _ = clouds()
    groups = np.arange(len(given))
    expected = label_check.suspects(label_check.out_of_fold(vectors, given, CLASSES), given)
    assert len(expected.position) > 5
    random = np.random.default_rng(1)
    vectors = np.concatenate([vectors, random.normal(size=(images, 8)).astype(np.float32)])
    given, groups = np.append(given, [CLASSES] * images), np.append(groups, [len(groups)] * images)
    probabilities = label_check.out_of_fold(vectors, given, CLASSES + 1, groups)
    assert (probabilities[-images:, CLASSES] == 0).all()
    found = label_check.suspects(probabilities, given)
    assert found.position.max() < len(given) - images
    assert (found.guess < CLASSES).all()
    assert len(found.position) == pytest.approx(len(expected.position), abs=5)


def test_out_of_fold_of_nearly_as_many_classes_as_images_warns_of_nothing() -> None:
    """pytest makes an error of any warning."""
    vectors = np.random.default_rng(0).normal(size=(42, 3)).astype(np.float32)
    found = label_check.out_of_fold(vectors, np.append(np.arange(40), [0, 1]), 40)
    assert found.dtype == np.float32
    assert found.sum(axis=1) == pytest.approx(1)


def test_suspects_are_those_of_the_definition() -> None:
    """Thresholds are the means of the labels' own probabilities; a class without images has none."""
    probabilities = np.array(
        [
            [0.9, 0.1, 0.0],
            [0.4, 0.6, 0.0],  # the other is likelier, below its threshold
            [0.3, 0.7, 0.0],
            [0.1, 0.9, 0.0],
            [0.66, 0.34, 0.0],  # at least class 0's threshold
            [0.04, 0.16, 0.8],  # of a class without a threshold
            [0.9, 0.1, 0.0],
        ]
    )
    labels = np.array([0, 0, 1, 1, 1, 0, 0])
    thresholds = [np.mean([0.9, 0.4, 0.04, 0.9]), np.mean([0.7, 0.9, 0.34])]
    assert thresholds == pytest.approx([0.56, 0.6467], abs=1e-4)
    found = label_check.suspects(probabilities, labels)
    assert found.position.tolist() == [4]
    assert found.guess.tolist() == [0]
    assert found.margin == pytest.approx([0.32])


def test_suspects_of_several_confident_classes_are_of_the_likeliest() -> None:
    probabilities = np.array([[0.2, 0.35, 0.45], [0.2, 0.5, 0.3], [0.35, 0.35, 0.3], [0.5, 0.2, 0.3], [0.4, 0.3, 0.3]])
    labels = np.array([2, 1, 1, 0, 2])
    found = label_check.suspects(probabilities, labels)
    # Thresholds 0.5, 0.425 and 0.375: row 2 reaches none, row 4 none either.
    assert found.position.tolist() == []
    found = label_check.suspects(probabilities, np.array([1, 1, 2, 0, 0]))
    # Thresholds 0.45, 0.425 and 0.3: rows 0 and 1 reach that of 2, row 1 its own too, which is likelier.
    assert found.position.tolist() == [0]
    assert found.guess.tolist() == [2]


def test_suspects_find_wrong_labels_and_the_most_suspicious_come_first() -> None:
    vectors, given, true = clouds(each=250)
    found = label_check.suspects(label_check.out_of_fold(vectors, given, CLASSES), given)
    wrong = np.flatnonzero(given != true)
    hits = np.isin(found.position, wrong)
    assert hits.sum() / len(wrong) > 0.7
    assert hits.mean() > 0.9
    assert hits[:20].all()
    assert (np.diff(found.margin) <= 0).all()
    assert (found.guess[hits] == true[found.position[hits]]).mean() > 0.9


@pytest.mark.parametrize("seed", range(5))
def test_suspects_are_those_of_cleanlab(seed: int) -> None:
    filters = pytest.importorskip("cleanlab.filter", reason="cleanlab, of requirements/dev.txt, is not installed")
    vectors, given, _ = clouds(noise=0.2, seed=seed)
    probabilities = label_check.out_of_fold(vectors, given, CLASSES)
    expected = filters.find_label_issues(given, probabilities, filter_by="confident_learning", n_jobs=1)
    found = np.zeros(len(given), bool)
    found[label_check.suspects(probabilities, given).position] = True
    assert found.any()
    assert (found == expected).all()
