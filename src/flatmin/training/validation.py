"""Scores on val after each epoch, and how far cached activations are from the images that they stand for."""

from __future__ import annotations

import numpy as np

from flatmin.inputs.records import Records
from flatmin.models.classifier import Classifier
from flatmin.models.scores import score
from flatmin.training.batch_sources import BatchSource, logits_from_images

COMPARED_IMAGES = 1000


class Validator:
    """Scores the trained layers, with the weights that they have now, on val."""

    def __init__(self, source: BatchSource, model: Classifier, records: Records, batch_size: int) -> None:
        self._source, self._model, self._records, self._batch_size = source, model, records, batch_size

    def scores(self) -> dict[str, float]:
        """val_accuracy and val_top5_accuracy (fractions) and val_loss (nats)."""
        scores = score(self._source.val_logits(), self._records.labels("val"))
        return {f"val_{key}": value for key, value in scores.items()}

    def compare_with_images(self, val_logits: np.ndarray) -> dict[str, float]:
        """Compare val's accuracy by the assembled network on images with that by the source, on val's first images.

        The two differ by the engine that runs the frozen layers and by rounding to float16.

        val_logits: the source's, of all val images.
        """
        count = min(COMPARED_IMAGES, self._records.count("val"))
        labels = self._records.labels("val")[:count]
        logits = logits_from_images(self._model, self._records, self._batch_size, count)
        from_images = score(logits, labels)["accuracy"]
        from_source = score(val_logits[:count], labels)["accuracy"]
        return {"images": count, "accuracy": from_images, "accuracy_difference": from_images - from_source}
