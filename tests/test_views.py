"""Every example once an epoch, with its own label, in an order that (seed, epoch) alone chooses."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
from contextlib import closing
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from flatmin import runtime
from flatmin.common import errors, params
from flatmin.common.errors import InputError
from flatmin.common.params import Augment, Data
from flatmin.data import writer
from flatmin.features import cache, store
from flatmin.inputs import batches
from flatmin.inputs.augment import CHUNK, Augmenter
from flatmin.inputs.batches import Share
from flatmin.inputs.records import Records
from flatmin.models import classifier
from flatmin.models.classifier import Classifier

COUNT = 100
SIZE = 16
# These leave a picture of one colour as it is.
HARMLESS = Augment(n=0, flip=True, crop=2)
NONE = Augment(engine="none")


def make(root: Path, sizes: list[tuple[int, int]]) -> Records:
    """Pictures of one colour each: an even number for cats, an odd one for dogs."""
    for split, count, start in (("train", COUNT, 0), ("val", 6, 200), ("test", 6, 220)):
        for number in range(start, start + count):
            path = root / "source" / split / ("cat", "dog")[number % 2] / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", sizes[number % len(sizes)], (number, number, number)).save(path)
    splits = {"train": "train", "val": "val", "test": "test"}
    data = Data.model_validate({"source": "folder", "name": str(root / "source"), "splits": splits})
    writer.write(data, 0, root / "records")
    return Records(root / "records")


@pytest.fixture(scope="module")
def alike(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return make(tmp_path_factory.mktemp("alike"), [(12, 10)])


@pytest.fixture(scope="module")
def unlike(tmp_path_factory: pytest.TempPathFactory) -> Records:
    return make(tmp_path_factory.mktemp("unlike"), [(12, 10), (9, 30), (17, 17)])


@pytest.fixture(params=["alike", "unlike"])
def made(request: pytest.FixtureRequest) -> Records:
    found: Records = request.getfixturevalue(request.param)
    return found


Batches = list[tuple[np.ndarray, np.ndarray]]


def batches(dataset: tf.data.Dataset) -> Batches:
    return [(images, labels) for images, labels in dataset.as_numpy_iterator()]


def epoch(
    of: Records, settings: Augment, seed: int = 0, epoch: int = 0, workers: int = 1, batch_size: int = 24
) -> Batches:
    with Augmenter(settings, seed, workers) as augmenter:
        return batches(batches.augmented(of, augmenter, SIZE, batch_size, seed, epoch))


def equal(first: Batches, second: Batches) -> bool:
    return len(first) == len(second) and all(
        np.array_equal(one, other) for a, b in zip(first, second, strict=True) for one, other in zip(a, b, strict=True)
    )


def numbers(of_epoch: Batches) -> list[int]:
    """Which pictures they are; each has to be of one colour."""
    images = np.concatenate([images for images, _ in of_epoch])
    found = images[:, 0, 0, 0].round().astype(int)
    np.testing.assert_allclose(images, np.broadcast_to(found[:, None, None, None], images.shape), atol=1e-3)
    return list(found)


def labels(of_epoch: Batches) -> list[int]:
    return [int(label) for _, labels in of_epoch for label in labels]


@pytest.mark.parametrize("settings", [HARMLESS, NONE], ids=["imgaug", "none"])
def test_every_example_comes_once_with_its_label(made: Records, settings: Augment) -> None:
    of_epoch = epoch(made, settings)
    found = numbers(of_epoch)
    assert sorted(found) == list(range(COUNT))
    assert labels(of_epoch) == [number % 2 for number in found]
    assert [len(images) for images, _ in of_epoch] == [24, 24, 24, 24, 4]
    assert all(images.dtype == np.float32 and images.shape[1:] == (SIZE, SIZE, 3) for images, _ in of_epoch)
    assert all(of_batch.dtype == np.int32 for _, of_batch in of_epoch)


def test_the_order_is_that_of_seed_and_epoch(alike: Records) -> None:
    orders = {
        (seed, number): tuple(numbers(epoch(alike, NONE, seed, number))) for seed in (0, 1) for number in (0, 1, 2)
    }
    assert len(set(orders.values())) == len(orders)
    stored = tuple(numbers(batches(batches.plain(alike, "train", SIZE, 24))))
    assert stored not in orders.values()
    # Shuffled as a whole: a batch draws from all over.
    assert max(stored.index(number) for number in orders[0, 0][:24]) > COUNT // 2
    assert min(stored.index(number) for number in orders[0, 0][-24:]) < COUNT // 2


@pytest.mark.slow
def test_equal_seed_and_epoch_give_equal_batches(made: Records) -> None:
    settings = Augment(n=2, m=9, flip=True, crop=2)
    first = epoch(made, settings, seed=3, epoch=5)
    assert equal(first, epoch(made, settings, seed=3, epoch=5, workers=2))
    assert not equal(first, epoch(made, settings, seed=3, epoch=6))
    assert not equal(first, epoch(made, settings, seed=4, epoch=5))


def test_the_batch_size_changes_no_picture(alike: Records) -> None:
    settings = Augment(n=2, m=9)
    small, large = (epoch(alike, settings, batch_size=size) for size in (7, 64))
    for one, other in zip(zip(*small, strict=True), zip(*large, strict=True), strict=True):
        np.testing.assert_array_equal(np.concatenate(one), np.concatenate(other))


def test_a_data_set_gives_the_same_again(alike: Records) -> None:
    with Augmenter(HARMLESS, 0, 1) as augmenter:
        dataset = batches.augmented(alike, augmenter, SIZE, 24, 0, 0)
        assert equal(batches(dataset), batches(dataset))


def test_pictures_that_do_not_fit_the_buffer_come_once_too(unlike: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(views, "SHUFFLE_BYTES", 10)
    of_epoch = epoch(unlike, HARMLESS)
    found = numbers(of_epoch)
    assert sorted(found) == list(range(COUNT))
    assert labels(of_epoch) == [number % 2 for number in found]
    stored = numbers(batches(batches.plain(unlike, "train", SIZE, 24)))
    # What comes i-th is from the first i + CHUNK: no more are held.
    assert all(stored.index(number) < place + CHUNK for place, number in enumerate(found))
    assert found != stored


def test_augmented_pictures_are_those_of_augment(alike: Records) -> None:
    """Augmented as stored, then resized: not the other way round."""
    settings = Augment(n=1, m=9)
    with Augmenter(settings, 0, 1) as augmenter:
        stored = [image for image, _ in alike.images("train").as_numpy_iterator()]
        expected = [batches.resize(image, SIZE).numpy() for chunk in augmenter.chunks(stored, 2) for image in chunk]
    found = np.concatenate([images for images, _ in epoch(alike, settings, 0, 2)])
    assert sorted(image.tobytes() for image in expected) == sorted(image.tobytes() for image in found)


@pytest.mark.parametrize("every", [1, 3, 5, 500])
def test_a_sample_is_taken_evenly(made: Records, every: int) -> None:
    whole, taken = (
        batches(each) for each in (batches.plain(made, "train", SIZE, COUNT), batches.sample(made, SIZE, every, 7))
    )
    np.testing.assert_array_equal(np.concatenate([images for images, _ in taken]), whole[0][0][::every])
    assert {len(images) for images, _ in taken[:-1]} <= {7}


@pytest.mark.parametrize("role", ["train", "val", "test"])
def test_plain_keeps_the_order(made: Records, role: str) -> None:
    of_role = batches(batches.plain(made, role, SIZE, 5))
    assert [f"{number:03d}" for number in numbers(of_role)] == [Path(name).stem for name in made.names(role)]
    assert labels(of_role) == made.labels(role).tolist()
    sizes = [len(images) for images, _ in of_role]
    assert sum(sizes) == made.count(role)
    assert set(sizes[:-1]) <= {5}
    assert equal(of_role, batches(batches.plain(made, role, SIZE, 5)))


@pytest.mark.parametrize("shape", [(8, 12, 3), (40, 30, 3), (16, 16, 3), (1, 1, 3)])
def test_resize_is_tensorflows_bilinear_with_smoothing(shape: tuple[int, int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    found = batches.resize(tf.constant(image), SIZE)
    assert found.dtype == tf.float32
    assert found.shape == (SIZE, SIZE, 3)
    expected = tf.image.resize(image, (SIZE, SIZE), method="bilinear", antialias=True)
    np.testing.assert_array_equal(found, expected)
    if shape[:2] == (SIZE, SIZE):
        np.testing.assert_array_equal(found, image)


@pytest.mark.parametrize("augmenting", [False, True])
def test_a_broken_record_is_one_line(augmenting: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    of = make(tmp_path, [(12, 10)])
    (shard,) = (tmp_path / "records").glob("train-*.tfrecord")
    stored = bytearray(shard.read_bytes())
    stored[len(stored) // 2] ^= 1
    shard.write_bytes(stored)

    def read() -> None:
        if augmenting:
            epoch(of, HARMLESS)
        else:
            batches(batches.plain(of, "train", SIZE, 24))

    with pytest.raises(SystemExit):
        errors.run(read)
    written = capsys.readouterr().err
    assert written.startswith(
        "error: data/records: expected complete records (`dvc repro --force prepare` writes them again)"
    )
    assert "corrupted record" in written
    assert "function_node" not in written
    assert written.count("\n") == 1


def test_a_killed_augmenting_process_is_one_line(alike: Records, capsys: pytest.CaptureFixture[str]) -> None:
    def killed() -> None:
        with Augmenter(Augment(n=1), 0, 1) as augmenter:
            augmenter.start()
            for child in multiprocessing.active_children():
                child.kill()
            list(batches.augmented(alike, augmenter, SIZE, 24, 0, 0))

    with pytest.raises(SystemExit):
        errors.run(killed)
    written = capsys.readouterr().err
    assert written.startswith(
        "error: augment: expected worker processes that run to the end (out of memory?), received: "
    )
    assert written.count("\n") == 1


def test_views_are_keyed_by_what_they_depend_on(
    alike: Records, unlike: Records, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"optimizer": "sgd", "learning_rate": 0.1, "batch_size": 4, "epochs": 1, "image_size": 32}
    base = params.parse(
        {
            "seed": 1,
            "runtime": {"engine": "tensorflow"},
            "data": {"source": "folder", "name": "source", "splits": {"train": "train", "val": "val", "test": "test"}},
            "augment": {"n": 0, "flip": True},
            "backbones": ["MobileNet025"],
            "extract": recipe,
            "select": {},
            "finetune": recipe,
            "sam": {"rho": 0.1},
            "evaluate": {},
        }
    )

    def network(size: int = 32, seed: int = 0, cut: str = "conv_dw_12") -> Classifier:
        made = classifier.create("MobileNet025", ["cat", "dog"], size, 0.0, seed, "none")
        return dataclasses.replace(made, description=dataclasses.replace(made.description, fine_tune_at=cut))

    model = network()

    def keys(
        view: int = 0,
        records: Records = alike,
        model: Classifier = model,
        share: Share | None = None,
        **sections: Any,
    ) -> tuple[str, str]:
        maker = store._Maker(
            records, model, base.model_copy(update=sections), 1, share or Share(), cast(Augmenter, None)
        )
        return maker._key(view), maker._key(None)

    def runtime_of(**changes: Any) -> dict[str, Any]:
        return {"runtime": base.runtime.model_copy(update=changes)}

    view, of_val = keys()
    assert keys() == (view, of_val)
    assert keys(evaluate=params.Evaluate(resamples=7)) == (view, of_val)
    # What augments is nothing to val's, nor how train is shared out.
    of_views = [
        keys(1),
        keys(seed=2),
        keys(augment=Augment(n=0)),
        keys(share=Share(1, 2, 1)),
        keys(share=Share(0, 2, 1)),
    ]
    assert {key for _, key in of_views} == {of_val}
    of_both = [keys(records=unlike), keys(model=network(64)), keys(model=network(seed=1))]
    of_both += [keys(model=network(cut="conv_dw_11"))]
    of_both += [keys(**runtime_of(**{name: value})) for name, value in (("matmul", "half"), ("engine", "litert"))]
    of_both += [keys(**runtime_of(deterministic=not base.runtime.deterministic))]
    monkeypatch.setattr(runtime, "machine", lambda: ["another"])
    of_both.append(keys())
    assert len({key for both in of_both for key in both} | {view, of_val}) == 2 * len(of_both) + 2
    assert len({key for key, _ in of_views} | {view}) == len(of_views) + 1


def test_activations_cut_off_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLATMIN_CACHE", str(tmp_path))
    values = np.arange(40, dtype=np.float16).reshape(10, 4)
    entry = cache.Entry("views", "0", lambda folder: np.save(folder / "boundary_00.npy", values))
    with closing(store.Activations(entry)) as activations:
        np.testing.assert_array_equal(activations.read([9, 0])[0], values[[9, 0]])
        path = entry.folder / "boundary_00.npy"
        os.truncate(path, path.stat().st_size - 2)
        np.testing.assert_array_equal(activations.read([8])[0], values[[8]])
        with pytest.raises(InputError, match="expected whole files, received one cut off"):
            activations.read([9])
