"""Activations of augmented views: computed once, cached by what they depend on, read in the epochs' own orders."""

from __future__ import annotations

import dataclasses
import os
import shutil
from contextlib import chdir, closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from trainings import BACKBONE, NAMES, SPLIT_POINT, VAL, VARIED, view_files, write_classifier, write_images

from flatmin.common.errors import InputError
from flatmin.common.params import Augment, Runtime
from flatmin.features import cache, store
from flatmin.features.store import FeatureStore
from flatmin.inputs import batches, sampling
from flatmin.inputs.batches import WorkerShard
from flatmin.inputs.records import Records
from flatmin.inputs.workers import Augmenter
from flatmin.models import classifier
from flatmin.models.classifier import Classifier

TRAIN = 45  # two chunks
AUGMENT = Augment.model_validate(VARIED)
TENSORFLOW = Runtime(engine="tensorflow")
SEED = 3


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Records, Classifier]:
    """Records of noise, and a network whose layers from SPLIT_POINT on are trained."""
    folder = tmp_path_factory.mktemp("study")
    with chdir(folder):
        write_images(folder, TRAIN)
        model = split_at(write_classifier(), SPLIT_POINT)
    return Records(folder / "data/records"), model


def split_at(model: Classifier, layer: str) -> Classifier:
    return dataclasses.replace(model, description=dataclasses.replace(model.description, fine_tune_at=layer))


@pytest.fixture(autouse=True)
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path))
    return tmp_path


def compute(study: tuple[Records, Classifier], views: int = 2, **changes: Any) -> FeatureStore:
    records, model = study
    given: dict[str, Any] = {"runtime": TENSORFLOW, "augment": AUGMENT, "seed": SEED, "shard": WorkerShard()} | changes
    return store.compute(records, model, views=views, **given)


def read_epoch(features: FeatureStore, number: int, skipped: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(tensors[0], labels) for tensors, labels in features.epoch(number, 16, skipped).as_numpy_iterator()]


def contents(folder: Path) -> list[np.ndarray]:
    return [np.load(path) for path in view_files(folder)]


def expected_activations(study: tuple[Records, Classifier], view: int) -> np.ndarray:
    """The activations of a view, augmented and run, all together."""
    records, model = study
    frozen, _ = model.split(SPLIT_POINT)
    with Augmenter(AUGMENT, SEED) as augmenter:
        images = np.concatenate(list(augmenter.chunks(records, 32, view, range(2))))
    return frozen(images.astype(np.float32), training=False).numpy()


@pytest.mark.slow
def test_feature_store_epochs_take_the_views_in_turn_each_in_an_order_of_its_own(
    study: tuple[Records, Classifier],
) -> None:
    """View 1 of three is what a training with augmentation in every epoch sees in epoch 1."""
    records, model = study
    orders = []
    with closing(compute(study, views=3, runtime=Runtime())) as features:
        assert features.engine == "litert"
        assert len(features.train) == 3
        for number in range(7):
            view = features.train[number % 3].read(range(TRAIN))[0]
            epoch = read_epoch(features, number)
            assert [len(labels) for _, labels in epoch] == [16, 16, 13]
            received = np.concatenate([activations for activations, _ in epoch])
            # Which example each is: noise gives no two the same activations.
            order = [int(np.flatnonzero((view == row).all(axis=(1, 2, 3)))[0]) for row in received]
            assert sorted(order) == list(range(TRAIN))
            labels = np.concatenate([labels for _, labels in epoch])
            np.testing.assert_array_equal(labels, records.labels("train")[order])
            orders.append(tuple(order))
            rest = read_epoch(features, number, skipped=number % 4)
            assert len(rest) == 3 - number % 4
            for one, other in zip(rest, epoch[number % 4 :], strict=True):
                np.testing.assert_array_equal(one[0], other[0])
                np.testing.assert_array_equal(one[1], other[1])
        assert len(set(orders)) == 7
        expected = expected_activations(study, 1)
        tolerance = {"rtol": 2e-3, "atol": 2e-3 * np.abs(expected).max()}
        np.testing.assert_allclose(features.train[1].read(range(TRAIN))[0], expected, **tolerance)
        assert not np.allclose(features.train[0].read(range(TRAIN))[0], expected, **tolerance)
        ((val,),) = features.val_batches(16)
        plain = next(iter(batches.plain(records, "val", 32, VAL)))[0]
        np.testing.assert_allclose(val, model.split(SPLIT_POINT)[0](plain, training=False), **tolerance)


@pytest.mark.slow
def test_compute_of_views_that_are_there_starts_no_worker(
    study: tuple[Records, Classifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Augment(engine="imgaug", n=0, flip=True)
    compute(study, augment=settings).close()
    monkeypatch.setattr(Augmenter, "_started", lambda self: pytest.fail("workers were started"))
    compute(study, augment=settings).close()


@pytest.mark.slow
def test_plain_of_roles_that_the_cache_has_in_part_keeps_their_order(
    study: tuple[Records, Classifier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, model = study
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path))
    for roles in (["val"], ["train", "val", "test"]):
        with store.plain(records, model, runtime=TENSORFLOW, roles=roles) as activations:
            assert [(role, each.count) for role, each in activations.items()] == [
                (role, records.count(role)) for role in roles
            ]


@pytest.mark.slow
def test_keys_of_a_roles_views_depend_on_that_role_alone(study: tuple[Records, Classifier], tmp_path: Path) -> None:
    records, model = study
    shutil.copytree(records.folder, tmp_path / "records")
    (tmp_path / "records/test").rename(tmp_path / "none")  # what no training reads

    def keys(of: Records) -> Any:
        return store._extractor(of, model, TENSORFLOW, Augmenter(AUGMENT, 1), WorkerShard()).keys(
            AUGMENT, 1, (0, "val")
        )

    found = [keys(records)]
    for role in ("val", "train"):
        path = tmp_path / "records" / role / "role.json"
        path.write_text(path.read_text().replace(records.digest(role), "another"))
        found.append(keys(Records(tmp_path / "records")))
    first, of_val, of_both = found
    assert of_val[0] == first[0] != of_both[0]
    assert first["val"] != of_val["val"] == of_both["val"]


@pytest.mark.slow
def test_feature_store_balanced_epochs_draw_by_class_whatever_the_shards(study: tuple[Records, Classifier]) -> None:
    records, _ = study
    own = np.where(np.arange(TRAIN) < 5, 1, 0)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(records, "labels", lambda role: own)
        patched.setattr(records, "training_labels", lambda: own)
        with closing(compute(study, views=1, sampling="balanced")) as features:
            view = features.train[0].read(range(TRAIN))[0]
            whole = read_epoch(features, 3)
        drawn = sampling.draw(own, "balanced", np.random.default_rng([SEED, 3]))
        np.testing.assert_array_equal(np.concatenate([activations for activations, _ in whole]), view[drawn])
        np.testing.assert_array_equal(np.concatenate([labels for _, labels in whole]), own[drawn])
        assert sorted(np.bincount(own[drawn])) == [22, 23]
        shards = []
        for worker in range(2):
            shard = WorkerShard(worker, 2, 1)
            with closing(compute(study, views=1, sampling="balanced", shard=shard)) as features:
                shards.append(read_epoch(features, 3))
        for (activations, _), *of_workers in zip(whole, *shards, strict=True):
            together = [row.tobytes() for part, _ in of_workers for row in part]
            assert sorted(together) == sorted(row.tobytes() for row in activations)


@pytest.mark.slow
def test_compute_by_shards_gives_together_what_one_gives(study: tuple[Records, Classifier], tmp_path: Path) -> None:
    with closing(compute(study, views=1)) as features:
        whole = {number: read_epoch(features, number) for number in (0, 1)}
    shards = []
    for worker in range(2):
        with closing(compute(study, views=1, shard=WorkerShard(worker, 2, 1))) as features:
            assert features.train[0].count == (32, 13)[worker]
            shards.append({number: read_epoch(features, number) for number in (0, 1)})
    with closing(compute(study, views=1, shard=WorkerShard(0, 1, 2))) as features:  # two replicas of one worker
        parts = read_epoch(features, 1)
        assert [len(labels) for _, labels in parts[::2]] == [len(labels) for _, labels in shards[0][1]]
    for number in (0, 1):
        for (activations, labels), *of_workers in zip(whole[number], *(s[number] for s in shards), strict=True):
            together = [row.tobytes() for part, _ in of_workers for row in part]
            assert sorted(together) == sorted(row.tobytes() for row in activations)
            assert sorted(np.concatenate([part for _, part in of_workers])) == sorted(labels)


@pytest.mark.slow
def test_compute_interrupted_or_damaged_makes_what_is_missing_again(
    study: tuple[Records, Classifier],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    compute(study, views=3).close()
    files = view_files(tmp_path)
    assert len(files) == 4
    assert not list(tmp_path.rglob(".*.part"))
    for path in files:
        shutil.rmtree(Path(path).parent)
    to_float16 = store._to_float16

    def interrupted(tensor: np.ndarray) -> np.ndarray:
        if len(list(tmp_path.glob("views/*/checksums.json"))) == 2:
            raise KeyboardInterrupt
        return to_float16(tensor)

    monkeypatch.setattr(store, "_to_float16", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compute(study, views=3)
    monkeypatch.setattr(store, "_to_float16", to_float16)
    capsys.readouterr()
    compute(study, views=3).close()
    printed = capsys.readouterr().out
    assert [f"view {view}/3:" in printed for view in (1, 2, 3)] == [False, True, True]
    assert "val activations" not in printed
    assert view_files(tmp_path) == files
    damaged = Path(next(iter(files)))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    compute(study, views=3).close()
    assert view_files(tmp_path) == files


@pytest.mark.slow
def test_compute_without_room_is_an_error_before_any_view(
    study: tuple[Records, Classifier],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("FLATMIN_CACHE_LIMIT", "1000")
    with pytest.raises(InputError, match=r"\$FLATMIN_CACHE_LIMIT: expected at least (\d+) bytes") as error:
        compute(study)
    values = 3 * 3 * 128  # of the input of conv_dw_12 at 32 pixels, padded
    needed = (2 * TRAIN + VAL) * values * 2 + 3 * store.FILE_OVERHEAD_BYTES
    assert f"({needed} for this, 0 in use), received 1000" in str(error.value)
    assert capsys.readouterr().out == ""
    assert not view_files(tmp_path)
    monkeypatch.setenv("FLATMIN_CACHE_LIMIT", str(needed))
    compute(study).close()
    assert capsys.readouterr().out.count(" images, ") == 3
    compute(study).close()  # nothing is missing, so nothing needs room
    assert capsys.readouterr().out == ""


def test_to_float16_of_activations_beyond_its_range_is_an_error() -> None:
    np.testing.assert_array_equal(store._to_float16(np.array([65504, 1e-9], np.float32)), [65504, 0])
    for beyond in (1e6, np.inf, np.nan):
        with pytest.raises(InputError, match=r"views: expected activations that float16 can hold, received"):
            store._to_float16(np.array([1, beyond], np.float32))


def test_activations_in_a_file_that_was_cut_off_are_an_error() -> None:
    values = np.arange(40, dtype=np.float16).reshape(10, 4)
    entry = cache.open_entry("views", "0", lambda folder: np.save(folder / "activations_00.npy", values))
    with closing(store.Activations(entry)) as activations:
        np.testing.assert_array_equal(activations.read([9, 0])[0], values[[9, 0]])
        path = entry.folder / "activations_00.npy"
        os.truncate(path, path.stat().st_size - 2)
        np.testing.assert_array_equal(activations.read([8])[0], values[[8]])
        with pytest.raises(InputError, match="expected complete files, received a truncated one"):
            activations.read([9])


@pytest.mark.slow
def test_keys_of_views_differ_with_all_that_activations_depend_on(
    study: tuple[Records, Classifier], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records, model = study

    def keys(
        view: int = 0,
        model: Classifier = model,
        shard: WorkerShard | None = None,
        augment: Augment = AUGMENT,
        seed: int = 1,
        records: Records = records,
        **changes: Any,
    ) -> tuple[str, str]:
        """The keys of a view of train and of val."""
        settings = Runtime.model_validate({"engine": "tensorflow"} | changes)
        extractor = store._extractor(records, model, settings, Augmenter(augment, seed), shard or WorkerShard())
        both = extractor.keys(augment, seed, (view, "val"))
        return both[view], both["val"]

    train, val = keys()
    assert keys() == (train, val)
    # val's depend neither on augmentation nor on how train is divided.
    of_train = [
        keys(1),
        keys(seed=2),
        keys(augment=Augment(n=0)),
        keys(shard=WorkerShard(1, 2, 1)),
        keys(shard=WorkerShard(0, 2, 1)),
    ]
    assert {key for _, key in of_train} == {val}
    assert len({key for key, _ in of_train} | {train}) == len(of_train) + 1
    with chdir(tmp_path):
        write_images(tmp_path, 3)
        other = split_at(write_classifier(), SPLIT_POINT)
    layer = other.base.get_layer("conv_dw_1")
    layer.set_weights([2 * weight for weight in layer.get_weights()])
    larger = classifier.create(BACKBONE, NAMES, image_size=64, dropout=0.0, seed=1, weights="none")
    of_both = [keys(records=Records(tmp_path / "data/records")), keys(model=other)]
    of_both += [keys(model=split_at(larger, SPLIT_POINT))]
    of_both += [keys(model=split_at(model, "conv_dw_11"))]
    of_both += [keys(matmul="half"), keys(engine="litert"), keys(deterministic=False)]
    monkeypatch.setattr(store, "machine", lambda: ["another"])
    of_both.append(keys())
    assert len({key for both in of_both for key in both} | {train, val}) == 2 * len(of_both) + 2


@pytest.mark.slow
def test_keys_do_not_depend_on_who_asked_for_the_engine(study: tuple[Records, Classifier]) -> None:
    """`auto` finds the views of `tensorflow` where that is what runs."""
    records, model = study

    def keys(name: str) -> Any:
        settings = Runtime.model_validate({"engine": name, "precision": "mixed_bfloat16"})
        return store._extractor(records, model, settings, Augmenter(AUGMENT, 1), WorkerShard()).keys(AUGMENT, 1, [0])

    assert keys("auto") == keys("tensorflow")
