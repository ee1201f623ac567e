"""The compiled programs of a step, by bucket.

All are compiled before the engine is ready, two at a time: tracing holds the interpreter lock, the compiler does
not.
"""

import logging
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeAlias

import jax

from jaxserve.runner.buckets import Bucket, pick_bucket

logger = logging.getLogger(__name__)

Lower: TypeAlias = Callable[[Bucket], jax.stages.Lowered]
Progress: TypeAlias = Callable[[Iterable[Bucket]], Iterable[Bucket]]

_COMPILE_THREADS = 2


class CompiledSteps:
    """Programs that are ready to run."""

    def __init__(self, buckets: tuple[Bucket, ...], lower: Lower) -> None:
        self._buckets = buckets
        self._lower = lower
        self._lower_lock = threading.Lock()
        self._programs: dict[Bucket, jax.stages.Compiled] = {}

    def compile_all(self, progress: Progress) -> None:
        """Compile every bucket, two at a time."""
        with ThreadPoolExecutor(_COMPILE_THREADS, thread_name_prefix="compile") as pool:
            futures = [pool.submit(self._compile, bucket) for bucket in self._buckets]
            for bucket in progress(future.result() for future in as_completed(futures)):
                logger.debug("compiled %s", bucket)

    def pick(self, num_tokens: int, num_rows: int, *, single_tokens: bool) -> Bucket:
        """The smallest compiled shape that holds a step."""
        return pick_bucket(self._programs, num_tokens, num_rows, single_tokens=single_tokens)

    def __getitem__(self, bucket: Bucket) -> Callable[..., Any]:
        """The compiled step."""
        return self._programs[bucket]

    def _compile(self, bucket: Bucket) -> Bucket:
        with self._lower_lock:
            lowered = self._lower(bucket)
        self._programs[bucket] = lowered.compile()
        return bucket
