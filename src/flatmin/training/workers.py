"""The processes that train together: values gathered from all of them, and one line when one of them is lost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import tensorflow as tf

from flatmin import runtime
from flatmin.common.errors import InputError, first_line

# TensorFlow raises these when another worker is gone.
LOST_WORKER = (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError, tf.errors.InternalError)


class Workers:
    """The workers of a strategy, as one of them sees them.

    Attributes:
        number: this worker's number; 0 is the chief, which writes the outputs.
        count: the number of workers.
        replicas: the number of replicas of each worker.
        writes_outputs: whether this worker writes models, metrics and plots.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self.number, self.count = runtime.worker(strategy)
        self.replicas = strategy.num_replicas_in_sync // self.count
        self.writes_outputs = runtime.writes_outputs(self.number)
        self._strategy = strategy

    @property
    def _several(self) -> bool:
        return isinstance(self._strategy, tf.distribute.MultiWorkerMirroredStrategy)

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """Gather `values` from every worker: float64 [replicas, len(values)], [1, len(values)] with one worker.

        The replicas of a worker repeat its values.
        """
        if not self._several:
            return np.array([values], np.float64)

        def own() -> tf.Tensor:
            return tf.constant([values], tf.float64)

        by_replica = tf.function(lambda: self._strategy.run(own), autograph=False)()
        return self._strategy.gather(by_replica, axis=0).numpy()

    def barrier(self) -> None:
        """Wait until every worker has come here."""
        self.gather([0.0])

    @contextmanager
    def explain_lost_worker(self, name: str) -> Iterator[None]:
        """Turn TensorFlow's errors of a lost worker, raised within a minute, into an `InputError` of one line."""
        try:
            yield
        except LOST_WORKER as error:
            if not self._several:
                raise
            raise InputError(
                f"{name}: expected all workers to the end, lost one; start all of them again, and the training resumes "
                f"after the last epoch that all have saved ({first_line(str(error))[:200]})"
            ) from None
