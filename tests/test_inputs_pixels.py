"""What a worker does with a task: reads, augments in groups, and brings to the network's size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from pictures import folder_data, write_picture
from PIL import Image

from flatmin import images
from flatmin.common.params import Augment
from flatmin.data import writer
from flatmin.images import Fit
from flatmin.inputs import pixels
from flatmin.inputs.augment import Augmentation, augment
from flatmin.inputs.pixels import Task
from flatmin.inputs.records import Records

COUNT, SIZE = 10, 16
AUGMENTATION = Augmentation(Augment(engine="imgaug", n=2, m=9, flip=True, crop=3), 1, 2, 0)


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Records:
    """Noise of 12 by 8 pixels, the last one of 30 by 9."""
    folder = tmp_path_factory.mktemp("pixels")
    for split, count in (("train", COUNT), ("val", 2), ("test", 2)):
        for number in range(count):
            write_picture(folder / f"source/{split}/{('cat', 'dog')[number % 2]}/{number:03d}.png", number)
    noise = np.random.default_rng(9).integers(0, 256, (9, 30, 3), np.uint8)
    Image.fromarray(noise).save(folder / "source/train/dog/999.png")
    writer.write(folder_data(folder / "source", val="val"), folder / "records")
    return Records(folder / "records")


def task(records: Records, augmentation: Augmentation | None = None, fit: Fit = "squash") -> Task:
    return Task(records.stored("train", range(COUNT + 1)), SIZE, fit, augmentation)


def squares(pictures: list[np.ndarray], fit: Fit = "squash") -> np.ndarray:
    return np.stack([np.asarray(images.to_square(Image.fromarray(each), SIZE, fit)) for each in pictures])


def stored(records: Records) -> list[np.ndarray]:
    return [np.asarray(each.read()) for each in task(records).images]


@pytest.mark.parametrize("fit", ["squash", "crop", "pad"])
def test_run_plain_is_the_stored_pictures_in_squares(fit: Fit, records: Records) -> None:
    received = task(records, fit=fit).run()
    assert received.dtype == np.uint8
    np.testing.assert_array_equal(received, squares(stored(records), fit))


@pytest.mark.slow
def test_run_augments_at_stored_size_all_together(records: Records) -> None:
    expected = squares(augment(stored(records), *AUGMENTATION))
    np.testing.assert_array_equal(task(records, AUGMENTATION).run(), expected)


@pytest.mark.slow
def test_run_large_pictures_are_augmented_in_groups(records: Records, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pixels, "GROUP_VALUES", 3 * 8 * 12 * 3 + 5)  # three small pictures
    pictures = stored(records)
    groups = [pictures[:3], pictures[3:4], pictures[4:5], pictures[5:8], pictures[8:]]
    assert [[len(each) for each in group] for group in groups] == [[8, 8, 8], [8], [9], [8, 8, 8], [8, 8, 8]]
    expected = [augment(group, *AUGMENTATION, number) for number, group in enumerate(groups)]
    np.testing.assert_array_equal(task(records, AUGMENTATION).run(), squares(list(itertools.chain(*expected))))
    monkeypatch.setattr(pixels, "GROUP_VALUES", 1)
    expected = [augment([each], *AUGMENTATION, number) for number, each in enumerate(pictures)]
    np.testing.assert_array_equal(task(records, AUGMENTATION).run(), squares(list(itertools.chain(*expected))))


def test_bytes_grow_with_the_result_and_with_what_is_decoded_at_once(records: Records) -> None:
    plain, augmenting = task(records), task(records, AUGMENTATION)
    assert plain.result_bytes == augmenting.result_bytes == plain.run().nbytes
    assert plain.working_bytes == pixels._BYTES_READING * 9 * 30
    assert augmenting.working_bytes == pixels._BYTES_AUGMENTING * (COUNT * 8 * 12 + 9 * 30)
    many = augmenting._replace(images=[augmenting.images[0]._replace(height=3000, width=4000)] * 32)
    assert many.working_bytes == pixels._BYTES_AUGMENTING * 3000 * 4000  # of one after the other
