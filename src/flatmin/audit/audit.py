"""The audit stage: near duplicates within and across roles, labels that contradict each other or may be wrong.

It reads test's pictures and labels, and scores no model on them. Nothing that trains or chooses depends on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from flatmin import runtime as devices
from flatmin.audit import duplicates, labels, similarity
from flatmin.audit.duplicates import Match, Matches, Places
from flatmin.audit.labels import Suspects
from flatmin.audit.similarity import Whitening
from flatmin.common import console, files
from flatmin.common.params import Audit, Runtime
from flatmin.features import store
from flatmin.inputs import batches
from flatmin.inputs.records import Records
from flatmin.inputs.thumbnails import Gallery
from flatmin.models import classifier

SEED = 0  # of what little a forward pass could draw
CHECKED = ("train", "val")  # the roles whose labels a classifier checks
FITTED = 20_000  # pictures to whose activations the whitening is fitted, at most
TOGETHER = 4096  # activations that are read at a time
SHOWN = 24  # pairs, contradictions and suspects of which the report shows pictures, of each kind
PICTURE_SIDE = 96  # pixels of the longer side of these pictures
PAIRS = ("role", "position", "like_role", "like_position", "cosine", "bits", "contradicts")
SUSPECTS = ("role", "position", "name", "label", "guess", "margin")


def audit(*, runtime: Runtime, settings: Audit, records: str, model: str, metrics: str, outputs: str) -> None:
    """Compare all pictures, check labels, and write metrics, tables and pictures for the report.

    Args:
        records, model: the folders of the records and of the selected classifier.
        metrics: a JSON file. outputs: a folder.
    """
    dataset = Records(records)
    classes = len(dataset.class_names)
    places = Places.read(dataset)
    vectors = _activations(dataset, model, runtime)
    pairs = similarity.alike(similarity.unit(vectors), _hashes(dataset), settings.cosine, settings.hash_bits)
    alike, contradicting = duplicates.find(pairs, places)
    checked = places.of(CHECKED)
    groups = _groups(dataset)
    probabilities = labels.out_of_fold(vectors[checked], places.labels[checked], classes, groups)
    suspects = labels.suspects(probabilities, places.labels[checked])
    found = {
        "near_duplicates": _counts(alike, places.roles),
        "contradictions": _counts(contradicting, places.roles),
        "suspects": _suspect_counts(dataset, places, suspects, probabilities),
        "classes": _classes(dataset, settings.small_class),
    }
    with files.atomic_write(outputs) as folder:
        (folder / "pictures").mkdir(parents=True)
        files.write_csv(folder / "pairs.csv", PAIRS, _pair_rows(alike, contradicting, places))
        files.write_csv(folder / "suspects.csv", SUSPECTS, _suspect_rows(suspects, dataset, places))
        shown = _shown(Gallery(dataset, folder / "pictures"), dataset, places, alike, contradicting, suspects)
        files.write_json(folder / "shown.json", shown)
    files.write_json(metrics, found)
    _tell(found)


def _activations(records: Records, model: str, runtime: Runtime) -> np.ndarray:
    """Whitened activations of all pictures as they are: float32 [n, components]."""
    devices.configure(runtime, SEED)
    with devices.dtype_policy(runtime.precision):
        loaded = classifier.load(model)
        with store.plain(records, loaded, runtime=runtime, roles=records.roles) as activations:
            # Not to predict's, so that more pictures to predict change nothing that is found among the others.
            fitted = [activations[role] for role in records.roles if role != "predict"]
            every = -(-sum(each.count for each in fitted) // FITTED)
            sample = [each.read(np.arange(0, each.count, every))[0] for each in fitted]
            whitening = Whitening.fit(np.concatenate(sample))
            parts = [
                whitening(each.read(np.arange(start, min(start + TOGETHER, each.count)))[0])
                for each in (activations[role] for role in records.roles)
                for start in range(0, each.count, TOGETHER)
            ]
    return np.concatenate(parts)


def _groups(records: Records) -> np.ndarray | None:
    """The groups of the pictures whose labels are checked, text [m]; None where they are not known."""
    found = [records.groups(role) for role in CHECKED]
    return None if None in found else np.array([group for groups in found for group in groups or ()], np.str_)


def _hashes(records: Records) -> np.ndarray:
    """The perceptual hash of every picture: float32 [n, BITS]."""
    images = (batches.plain(records, role, similarity.SIDE, TOGETHER) for role in records.roles)
    progress = console.progress(itertools.chain.from_iterable(images), "hashing", unit="batch")
    return np.concatenate([similarity.hashes(pixels) for pixels, _ in progress])


def _counts(matches: Matches, roles: Sequence[str]) -> dict[str, int]:
    """By `train_test` and the like: how many pictures of the second role have one in the first; by `train`: within."""
    within = {role: int(matches.has(role, role).sum()) for role in roles}
    across = {
        f"{first}_{second}": int(matches.has(second, first).sum()) for first, second in itertools.combinations(roles, 2)
    }
    return within | across


def _suspect_counts(records: Records, places: Places, suspects: Suspects, probabilities: np.ndarray) -> dict[str, Any]:
    """How many there are in each role; where labels were made wrong on purpose, how many of these they are."""
    checked = places.of(CHECKED)
    suspected = checked[suspects.position]
    right = probabilities.argmax(axis=1) == places.labels[checked]
    found: dict[str, Any] = {role: int(np.isin(suspected, places.of([role])).sum()) for role in CHECKED}
    found["out_of_fold_accuracy"] = float(right.mean())
    train = places.of(["train"])
    wrong = train[records.training_labels() != records.labels("train")]
    if len(wrong):
        hits = len(np.intersect1d(wrong, suspected))
        found["made_wrong"] = {"count": len(wrong), "found": hits, "recall": hits / len(wrong)}
        if found["train"]:
            found["made_wrong"]["precision"] = hits / found["train"]
    return found


def _classes(records: Records, small: int) -> dict[str, Any]:
    """Train's smallest and largest class, their ratio, and how many classes have fewer than `small` images."""
    sizes = np.bincount(records.labels("train"), minlength=len(records.class_names))
    return {
        "smallest": int(sizes.min()),
        "largest": int(sizes.max()),
        "imbalance": float(sizes.max() / sizes.min()),
        "small": int((sizes < small).sum()),
    }


def _pair_rows(alike: Matches, contradicting: Matches, places: Places) -> Iterator[list[Any]]:
    """The rows of PAIRS: each picture's nearest, and the nearest of another label where that is another one."""
    nearest = set()
    for match in alike:
        nearest.add(match[:2])
        yield _pair_row(match, places)
    yield from (_pair_row(match, places) for match in contradicting if match[:2] not in nearest)


def _pair_row(match: Match, places: Places) -> list[Any]:
    contradicts = places.contradict(np.array(match.place), np.array(match.like))
    both = [(places.roles[places.role[place]], int(places.position[place])) for place in (match.place, match.like)]
    return [*both[0], *both[1], f"{match.cosine:.4f}", match.bits, int(contradicts)]


def _suspect_rows(suspects: Suspects, records: Records, places: Places) -> Iterator[list[Any]]:
    """The rows of SUSPECTS, the most suspicious first."""
    names, checked = records.class_names, places.of(CHECKED)
    for index, guess, margin in zip(*suspects, strict=True):
        place = checked[index]
        role, position = places.roles[places.role[place]], int(places.position[place])
        label = names[places.labels[place]]
        yield [role, position, records.names(role)[position], label, names[guess], f"{margin:.4f}"]


def _shown(
    gallery: Gallery, records: Records, places: Places, alike: Matches, contradicting: Matches, suspects: Suspects
) -> dict[str, Any]:
    """What the report shows: files of pictures, with names and classes."""

    def picture(place: int) -> dict[str, Any]:
        role, position = places.roles[places.role[place]], int(places.position[place])
        label = int(places.labels[place])
        return {
            "role": role,
            "name": records.names(role)[position],
            "label": records.class_names[label] if label >= 0 else None,
            "picture": gallery.add(role, position, PICTURE_SIDE),
        }

    def pairs(matches: Iterator[Match]) -> list[dict[str, Any]]:
        return [
            {"cosine": each.cosine, "bits": each.bits, "pictures": [picture(each.like), picture(each.place)]}
            for each in matches
        ]

    checked = places.of(CHECKED)
    most = itertools.islice(zip(*suspects, strict=True), SHOWN)
    return {
        "pairs": pairs(_chosen(alike, places)),
        "contradictions": pairs(_chosen(contradicting, places)),
        "suspects": [
            {**picture(int(checked[index])), "guess": records.class_names[guess], "margin": float(margin)}
            for index, guess, margin in most
        ],
    }


def _chosen(matches: Matches, places: Places) -> Iterator[Match]:
    """Pairs to show: spread over the kinds of roles, those with test first, each pair once."""
    kinds: dict[tuple[int, int], list[Match]] = {}
    seen = set()
    for match in matches:
        pair = frozenset(match[:2])
        if pair not in seen:
            seen.add(pair)
            kinds.setdefault((int(places.role[match.place]), int(places.role[match.like])), []).append(match)
    test = places.roles.index("test")
    order = sorted(kinds, key=lambda kind: (kind[0] == kind[1], kind[0] != test, kind))
    turns = itertools.zip_longest(*(kinds[kind] for kind in order))
    return itertools.islice((match for turn in turns for match in turn if match), SHOWN)


def _tell(found: Mapping[str, Any]) -> None:
    pairs = [f"{count:,} {_words(key)}" for key, count in found["near_duplicates"].items() if count]
    console.log(f"audit: near duplicates: {', '.join(pairs) or 'none'}")
    if contradicting := [f"{count:,} {_words(key)}" for key, count in found["contradictions"].items() if count]:
        console.log(f"audit: of these with different labels: {', '.join(contradicting)}")
    suspects, classes = found["suspects"], found["classes"]
    told = ", ".join(f"{suspects[role]:,} of {role}" for role in CHECKED)
    console.log(
        f"audit: labels that may be wrong: {told} (a linear classifier that did not see them is right on"
        f" {suspects['out_of_fold_accuracy']:.1%} of the images)".replace("%", " %")
    )
    console.log(
        f"audit: classes of train have {classes['smallest']:,} to {classes['largest']:,} images;"
        f" {classes['small']:,} have few"
    )


def _words(key: str) -> str:
    """`train_test` -> of test in train; `test` -> within test."""
    first, _, second = key.partition("_")
    return f"of {second} in {first}" if second else f"within {first}"
