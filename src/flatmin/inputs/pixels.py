"""From stored images to one array at the network's size: what a worker does, in one pass, without TensorFlow."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

from flatmin import images
from flatmin.images import Fit
from flatmin.inputs.augment import Augmentation, augment
from flatmin.inputs.records import StoredImage

# A chunk's pictures are decoded and augmented together as long as their values (pixels times channels) are no more
# than these; a larger picture is alone. Another number changes the augmented images of chunks that have more.
GROUP_VALUES = 2**24
# What a pixel takes while its picture is decoded, turned and resized, and while it is also augmented, with what malloc
# does not give back at once: measured with photos of 12 megapixels.
_BYTES_READING, _BYTES_AUGMENTING = 12, 36


class Task(NamedTuple):
    """Images to read: consecutive ones of a role, a whole chunk of train where they are to be augmented.

    Attributes:
        images: where they lie.
        size: of the network's input, in pixels.
        fit: how a picture meets the network's square.
        augmentation: None reads them as they are.
    """

    images: list[StoredImage]
    size: int
    fit: Fit
    augmentation: Augmentation | None = None

    @property
    def result_bytes(self) -> int:
        """The size of what `run` returns."""
        return len(self.images) * self.size**2 * 3

    @property
    def working_bytes(self) -> int:
        """The memory that `run` takes beside its result, roughly."""
        if self.augmentation is None:
            return _BYTES_READING * max(_pixels(each) for each in self.images)
        return _BYTES_AUGMENTING * max(sum(map(_pixels, group)) for group in _groups(self.images))

    def run(self) -> np.ndarray:
        """Read, augment and resize: uint8 [images, size, size, 3]."""
        made = np.empty((len(self.images), self.size, self.size, 3), np.uint8)
        for place, picture in enumerate(self._pictures()):
            made[place] = images.to_square(picture, self.size, self.fit)
        return made

    def _pictures(self) -> Iterator[Image.Image]:
        if self.augmentation is None:
            yield from (each.read() for each in self.images)
            return
        for number, group in enumerate(_groups(self.images)):
            decoded = [np.asarray(each.read()) for each in group]
            for image in augment(decoded, *self.augmentation, number):
                yield Image.fromarray(image)


def _pixels(image: StoredImage) -> int:
    return image.height * image.width


def _groups(stored: list[StoredImage]) -> Iterator[list[StoredImage]]:
    """Divide a chunk into consecutive images that are augmented together."""
    group: list[StoredImage] = []
    values = 0
    for image in stored:
        added = 3 * _pixels(image)
        if group and values + added > GROUP_VALUES:
            yield group
            group, values = [], 0
        group.append(image)
        values += added
    if group:
        yield group
