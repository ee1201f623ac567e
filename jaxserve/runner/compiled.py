"""The compiled programs of a step: forward passes by bucket, sampling by number of rows and mode.

All are compiled before the engine is ready, several at a time: tracing holds the GIL, the compiler does not.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, TypeAlias

import jax

from jaxserve.runner.buckets import Bucket, ForwardShape, SampleShape, pick_bucket

logger = logging.getLogger(__name__)

Lower: TypeAlias = Callable[[Any], jax.stages.Lowered]
Progress: TypeAlias = Callable[[Iterable[str]], Iterable[str]]

# A compilation keeps one or two cores busy; more threads would only cost memory.
_COMPILE_THREADS = max(2, min(8, (os.cpu_count() or 1) // 2))


class ProgramCache:
    """Compiles the programs of a step and holds them by shape.

    Args:
        shapes: shapes of the forward passes.
        sample_shapes: shapes of the sampling programs.
        lower_forward: lowers the forward pass of a `ForwardShape`.
        lower_sample: lowers the sampling program of a `SampleShape`.
    """

    def __init__(
        self, shapes: list[ForwardShape], sample_shapes: list[SampleShape], lower_forward: Lower, lower_sample: Lower
    ) -> None:
        self._shapes = shapes
        self._sample_shapes = sample_shapes
        self._buckets = {shape.bucket for shape in shapes}
        self._lower_forward = lower_forward
        self._lower_sample = lower_sample
        self._lower_lock = threading.Lock()
        self._forwards: dict[ForwardShape, jax.stages.Compiled] = {}
        self._samples: dict[SampleShape, jax.stages.Compiled] = {}

    @property
    def num_programs(self) -> int:
        """Number of programs to compile."""
        return len(self._shapes) + len(self._sample_shapes)

    def compile_all(self, progress: Progress) -> None:
        """Compile every program, several at a time."""
        with ThreadPoolExecutor(_COMPILE_THREADS, thread_name_prefix="compile") as pool:
            futures = [pool.submit(self._compile, shape, self._lower_forward, self._forwards) for shape in self._shapes]
            futures += [
                pool.submit(self._compile, shape, self._lower_sample, self._samples) for shape in self._sample_shapes
            ]
            for name in progress(future.result() for future in as_completed(futures)):
                logger.debug("compiled %s", name)

    def pick(self, num_tokens: int, num_rows: int, *, single_tokens: bool) -> Bucket:
        """Return the smallest compiled bucket that holds a step; see `pick_bucket`."""
        return pick_bucket(self._buckets, num_tokens, num_rows, single_tokens=single_tokens)

    def forward(self, shape: ForwardShape) -> Callable[..., Any]:
        """Return the compiled forward pass of a shape."""
        return self._forwards[shape]

    def sample(self, shape: SampleShape) -> Callable[..., Any]:
        """Return the compiled sampling program of a shape."""
        return self._samples[shape]

    def _compile(self, shape: Any, lower: Lower, programs: dict[Any, jax.stages.Compiled]) -> str:
        with self._lower_lock:
            lowered = lower(shape)
        programs[shape] = lowered.compile()
        return str(shape)
