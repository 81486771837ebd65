"""Every example once an epoch, with its own label, in an order that (seed, epoch) alone chooses."""

from __future__ import annotations

import multiprocessing
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from flatmin.common import errors
from flatmin.common.params import Augment, Data
from flatmin.data import writer
from flatmin.inputs import batches
from flatmin.inputs.augment import AUGMENT_CHUNK, Augmentation, positions
from flatmin.inputs.batches import WorkerShard
from flatmin.inputs.pixels import Task
from flatmin.inputs.records import Records
from flatmin.inputs.workers import Augmenter

COUNT = 100
SIZE = 16
# These leave a picture of one colour as it is. This engine's workers are threads, which start at once.
HARMLESS = Augment(engine="tensorflow", n=0, flip=True, crop=2)
NONE = Augment(engine="none")


def make(root: Path, sizes: list[tuple[int, int]], label_noise: float = 0.0) -> Records:
    """Pictures of one colour each: an even number for cats, an odd one for dogs."""
    for split, count, start in (("train", COUNT, 0), ("val", 6, 200), ("test", 6, 220)):
        for number in range(start, start + count):
            path = root / "source" / split / ("cat", "dog")[number % 2] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", sizes[number % len(sizes)], (number, number, number)).save(path)
    splits = {"train": "train", "val": "val", "test": "test"}
    values = {"source": "folder", "name": str(root / "source"), "splits": splits, "label_noise": label_noise}
    writer.write(Data.model_validate(values), root / "records")
    return Records(root / "records")


@pytest.fixture(scope="module")
def same_size(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return make(tmp_path_factory.mktemp("same-size"), [(12, 10)])


@pytest.fixture(scope="module")
def mixed_sizes(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return make(tmp_path_factory.mktemp("mixed-sizes"), [(12, 10), (9, 30), (17, 17)])


@pytest.fixture(params=["same_size", "mixed_sizes"])
def records(request: pytest.FixtureRequest) -> Records:
    found: Records = request.getfixturevalue(request.param)
    return found


Batches = list[tuple[np.ndarray, np.ndarray]]


def read_epoch(
    records: Records, settings: Augment, seed: int = 0, epoch: int = 0, workers: int = 1, batch_size: int = 24
) -> Batches:
    with Augmenter(settings, seed, workers) as augmenter:
        return list(batches.augmented(records, augmenter, SIZE, batch_size, seed, epoch))


def equal(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(one, other) for a, b in zip(first, second, strict=True) for one, other in zip(a, b, strict=True)
    )


def numbers(epoch: Batches) -> list[int]:
    """The numbers of the pictures, each of which has to be of one colour."""
    images = np.concatenate([images for images, _ in epoch])
    received = images[:, 0, 0, 0].astype(int)
    np.testing.assert_array_equal(images, np.broadcast_to(received[:, None, None, None], images.shape))
    return list(received)


def labels(epoch: Batches) -> list[int]:
    return [int(label) for _, labels in epoch for label in labels]


@pytest.mark.parametrize("settings", [HARMLESS, NONE], ids=["augmented", "none"])
def test_augmented_epoch_has_every_example_once_with_its_label(records: Records, settings: Augment) -> None:
    epoch = read_epoch(records, settings)
    received = numbers(epoch)
    assert sorted(received) == list(range(COUNT))
    assert labels(epoch) == [number % 2 for number in received]
    assert [len(images) for images, _ in epoch] == [24, 24, 24, 24, 4]
    assert all(images.dtype == np.uint8 and images.shape[1:] == (SIZE, SIZE, 3) for images, _ in epoch)
    assert all(batch_labels.dtype == np.int32 for _, batch_labels in epoch)


def test_augmented_with_label_noise_tells_wrong_labels_from_the_others(tmp_path: Path) -> None:
    epoch = read_epoch(make(tmp_path, [(12, 10)], label_noise=0.3), HARMLESS)
    pairs = [(number % 2, label) for number, label in zip(numbers(epoch), labels(epoch), strict=True)]
    assert set(pairs) == {(0, 0), (1, 1), (0, 1 + 2), (1, 0 + 2)}
    assert sum(label >= 2 for _, label in pairs) == 30


def test_augmented_balanced_epoch_draws_each_class_alike_in_as_many_images(tmp_path: Path) -> None:
    records = make(tmp_path, [(12, 10)])
    own = np.array([0 if number < 90 else 1 for number in range(COUNT)], np.int32)
    own = own[[int(Path(name).stem) for name in records.names("train")]]
    records.labels = lambda role: own  # type: ignore[method-assign]
    records.training_labels = lambda: own  # type: ignore[method-assign]
    orders = []
    for number in (0, 1):
        with Augmenter(NONE, 0, 1) as augmenter:
            epoch = list(batches.augmented(records, augmenter, SIZE, 24, 0, number, "balanced"))
        drawn = numbers(epoch)
        assert labels(epoch) == [int(each >= 90) for each in drawn]
        assert [len(images) for images, _ in epoch] == [24, 24, 24, 24, 4]
        assert np.bincount(labels(epoch)).tolist() == [50, 50]
        assert np.bincount(drawn, minlength=COUNT)[90:].tolist() == [5] * 10
        orders.append(drawn)
    assert orders[0] != orders[1]


@pytest.mark.slow
def test_augmented_order_is_chosen_by_seed_and_epoch(same_size: Records) -> None:
    orders = {
        (seed, number): tuple(numbers(read_epoch(same_size, NONE, seed, number)))
        for seed, number in ((0, 0), (0, 1), (1, 0))
    }
    assert len(set(orders.values())) == len(orders)
    stored = tuple(numbers(list(batches.plain(same_size, "train", SIZE, 24))))
    assert stored not in orders.values()
    # Shuffled as a whole: a batch draws from all over.
    assert max(stored.index(number) for number in orders[0, 0][:24]) > COUNT // 2
    assert min(stored.index(number) for number in orders[0, 0][-24:]) < COUNT // 2


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["imgaug", "tensorflow"])
def test_augmented_again_with_other_workers_gives_equal_batches(
    same_size: Records, mixed_sizes: Records, engine: str
) -> None:
    settings = Augment.model_validate({"engine": engine, "n": 2, "m": 9, "flip": True, "crop": 2})
    with Augmenter(settings, 3, 1) as one, Augmenter(settings, 3, 2) as two, Augmenter(settings, 4, 1) as other_seed:
        for records in (same_size, mixed_sizes):
            first = list(batches.augmented(records, one, SIZE, 24, 3, 5))
            assert equal(first, list(batches.augmented(records, two, SIZE, 24, 3, 5)))
            assert not equal(first, list(batches.augmented(records, one, SIZE, 24, 3, 6)))
            assert not equal(first, list(batches.augmented(records, other_seed, SIZE, 24, 4, 5)))


@pytest.mark.slow
def test_augmented_with_another_batch_size_has_the_same_pictures_in_the_same_order(same_size: Records) -> None:
    settings = Augment(engine="tensorflow", n=2, m=9)
    small, large = (read_epoch(same_size, settings, batch_size=size) for size in (7, 64))
    for one, other in zip(zip(*small, strict=True), zip(*large, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(one), np.concatenate(other))


def test_augmented_with_a_small_shuffle_buffer_has_every_example_once(
    mixed_sizes: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batches, "SHUFFLE_BYTES", 10)
    epoch = read_epoch(mixed_sizes, HARMLESS)
    received = numbers(epoch)
    assert sorted(received) == list(range(COUNT))
    assert labels(epoch) == [number % 2 for number in received]
    stored = numbers(list(batches.plain(mixed_sizes, "train", SIZE, 24)))
    chunks = [stored.index(number) // AUGMENT_CHUNK for number in received]
    order = list(dict.fromkeys(chunks))
    # Only AUGMENT_CHUNK are held: most of the first are of the chunk that came first, which is no longer chunk 0.
    assert order != sorted(order)
    assert chunks[: 2 * AUGMENT_CHUNK].count(order[0]) > AUGMENT_CHUNK // 2
    assert chunks != sorted(chunks, key=order.index)


def test_augmented_pictures_are_those_of_their_chunks_tasks(same_size: Records) -> None:
    settings = Augment(engine="tensorflow", n=1, m=9)
    epoch = read_epoch(same_size, settings, seed=0, epoch=2)
    images = np.concatenate([images for images, _ in epoch])
    expected = [
        image
        for chunk in range(4)
        for image in Task(
            same_size.stored("train", positions(chunk, COUNT)), SIZE, "squash", Augmentation(settings, 0, 2, chunk)
        ).run()
    ]
    assert sorted(image.tobytes() for image in expected) == sorted(image.tobytes() for image in images)


def test_augmented_that_shuffles_the_whole_draws_each_batch_from_all_over(same_size: Records) -> None:
    """Every place of the epoch gets examples from everywhere, over many epochs."""
    stored = numbers(list(batches.plain(same_size, "train", SIZE, 24)))
    firsts = [stored.index(numbers(read_epoch(same_size, NONE, epoch=epoch))[0]) for epoch in range(40)]
    assert len(set(firsts)) > 20
    assert abs(np.mean(firsts) - COUNT / 2) < 20


def test_augmented_balanced_epoch_of_one_rare_image_does_not_hold_all_its_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the epoch is that image, 400 times; so many copies would take 11 MB, and grow with train."""
    for number in range(1000):
        path = tmp_path / "source" / ("dog" if number else "cat") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number % 250, 0, 0)).save(path)
    splits = {"train": "train[:80%]", "val": "train[80%:90%]", "test": "train[90%:]"}
    values = {"source": "folder", "name": str(tmp_path / "source"), "splits": splits, "image_size": "original"}
    writer.write(Data.model_validate(values), tmp_path / "records")
    records, size = Records(tmp_path / "records"), 96
    monkeypatch.setattr(batches, "SHUFFLE_BYTES", 0)
    cats = 0
    with Augmenter(NONE, 0, workers=1) as augmenter:
        tracemalloc.start()
        for _, labels in batches.augmented(records, augmenter, size, 8, 0, 0, "balanced"):
            cats += int((labels == 0).sum())
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert cats == records.count("train") // 2
    assert peak < 10e6


@pytest.mark.parametrize("every", [1, 3, 500])
@pytest.mark.slow
def test_sample_takes_every_kth_train_image(records: Records, every: int) -> None:
    ((whole, _),) = list(batches.plain(records, "train", SIZE, COUNT))
    taken = list(batches.sample(records, SIZE, every, 7))
    np.testing.assert_array_equal(np.concatenate([images for images, _ in taken]), whole[::every])
    assert {len(images) for images, _ in taken[:-1]} <= {7}


@pytest.mark.parametrize("role", ["train", "val", "test"])
def test_plain_keeps_the_records_order(records: Records, role: str) -> None:
    received = list(batches.plain(records, role, SIZE, 5))
    assert [f"{number:03d}" for number in numbers(received)] == [Path(name).stem for name in records.names(role)]
    assert labels(received) == records.labels(role).tolist()
    sizes = [len(images) for images, _ in received]
    assert sum(sizes) == records.count(role)
    assert set(sizes[:-1]) <= {5}
    assert equal(received, list(batches.plain(records, role, SIZE, 5)))


def test_worker_shard_of_several_workers_gives_each_example_to_one() -> None:
    examples = np.arange(10 * AUGMENT_CHUNK + 5)
    shards = [WorkerShard(worker, 2, 3) for worker in range(2)]
    owned = [shard.examples(len(examples)) for shard in shards]
    assert sorted(np.concatenate(owned)) == examples.tolist()
    replicas = shards[0].replica_for(examples)
    assert replicas[:: 2 * AUGMENT_CHUNK].tolist() == [0, 2, 4, 0, 2, 4]  # a whole chunk to one replica, in turn
    for shard, own in zip(shards, owned, strict=True):
        assert set(replicas[own]) == set(range(3 * shard.worker, 3 * shard.worker + 3))
        assert shard.chunks(len(examples)) == sorted(set(own // AUGMENT_CHUNK))


@pytest.mark.parametrize("augmenting", [False, True])
def test_broken_record_is_an_error_of_one_line(
    augmenting: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    records = make(tmp_path, [(12, 10)])
    (damaged,) = records.stored("train", [40])
    stored = bytearray(Path(damaged.shard).read_bytes())
    stored[damaged.offset + 30] ^= 1
    Path(damaged.shard).write_bytes(stored)

    def read_all() -> None:
        if augmenting:
            signature = (tf.TensorSpec((None, SIZE, SIZE, 3), tf.uint8), tf.TensorSpec((None,), tf.int32))
            list(batches.from_generator(lambda: iter(read_epoch(records, HARMLESS)), signature, 1))  # as in training
        else:
            list(batches.plain(records, "train", SIZE, 24))

    written = error_of(read_all, capsys)
    assert written.startswith(f"error: {damaged.shard}: expected '{damaged.name}' as prepare wrote it (`dvc repro")
    assert "function_node" not in written
    assert written.count("\n") == 1


def error_of(stage: Any, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        errors.run(stage)
    return capsys.readouterr().err


def test_killed_augmenting_process_is_an_error_of_one_line(
    same_size: Records, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed() -> None:
        with Augmenter(Augment(n=1), 0, 1) as augmenter:
            augmenter.start()
            for child in multiprocessing.active_children():
                child.kill()
            list(batches.augmented(same_size, augmenter, SIZE, 24, 0, 0))

    written = error_of(killed, capsys)
    assert written.startswith("error: augment: expected worker processes that run to the end (out of memory?)")
    assert written.count("\n") == 1


def test_from_generator_prefetches_without_tuning_no_more_than_fits() -> None:
    for batch_bytes, expected in ((1, 4), (batches.PREFETCH_BYTES // 2, 2), (batches.PREFETCH_BYTES + 1, None)):
        dataset = batches.from_generator(lambda: iter(range(3)), tf.TensorSpec((), tf.int32), batch_bytes)
        assert dataset.options().autotune.enabled is False
        assert list(dataset.as_numpy_iterator()) == [0, 1, 2]
        ahead = getattr(dataset, "_buffer_size", None)
        assert (None if ahead is None else int(ahead)) == expected
