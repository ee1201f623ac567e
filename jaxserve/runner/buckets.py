"""The few shapes a step is compiled for."""

from collections.abc import Iterable
from typing import NamedTuple

from jaxserve.config import SchedulerConfig
from kernels_pallas.sampling.api import SamplingMode

_FIRST_TOKENS = 32


class Bucket(NamedTuple):
    """Shape of one program: packed tokens and rows. If the two are equal, every row runs a single token."""

    num_tokens: int
    num_rows: int

    @property
    def single_tokens(self) -> bool:
        """Whether every row runs a single token."""
        return self.num_tokens == self.num_rows


class ForwardShape(NamedTuple):
    """Key of a compiled forward pass.

    Attributes:
        bucket: shape of the step.
        adapted: whether some rows have an adapter.
        mha_prefill: whether MLA prompts take the MHA form; see `jaxserve.layers.mla_prefill`.
    """

    bucket: Bucket
    adapted: bool = False
    mha_prefill: bool = False


class SampleShape(NamedTuple):
    """Key of a compiled sampling program.

    Attributes:
        num_rows: rows of logits of a replica.
        mode: what its rows need at most.
    """

    num_rows: int
    mode: SamplingMode


class StepShapes(NamedTuple):
    """The shapes that a platform compiles: more of them cost compile time at start-up, fewer cost time in steps.

    Attributes:
        first_rows: rows of the smallest decode bucket.
        token_factor: ratio of the token counts of consecutive mixed buckets.
        sample_modes: modes with a sampling program of their own, in order; the last one is `ADJUSTED`.
    """

    first_rows: int
    token_factor: int
    sample_modes: tuple[SamplingMode, ...]


# A CPU pays for every padded token, and XLA's bfloat16 products there are far slower with one row than with two.
# Conditions that skip work cost a CPU nothing, so that programs of two modes suffice.
CPU_SHAPES = StepShapes(first_rows=2, token_factor=2, sample_modes=(SamplingMode.PLAIN, SamplingMode.ADJUSTED))
ACCELERATOR_SHAPES = StepShapes(first_rows=8, token_factor=4, sample_modes=tuple(SamplingMode))


def make_buckets(config: SchedulerConfig, shapes: StepShapes) -> tuple[Bucket, ...]:
    """Return buckets that cover every step within the limits, widest first.

    Decode buckets have as many tokens as rows, and their sizes grow by a factor of four. A bucket for steps with prompt
    tokens has the largest of these row counts that is below its number of tokens.
    """
    rows = _powers(shapes.first_rows, 4, config.max_rows)
    tokens = _powers(_FIRST_TOKENS, shapes.token_factor, max(config.max_step_tokens, rows[-1] + 1))
    decode = [Bucket(num_rows, num_rows) for num_rows in rows]
    mixed = [Bucket(num_tokens, max(r for r in rows if r < num_tokens)) for num_tokens in tokens]
    return tuple(sorted(decode + mixed, reverse=True))


def pick_bucket(buckets: Iterable[Bucket], num_tokens: int, num_rows: int, *, single_tokens: bool) -> Bucket:
    """Return the smallest bucket that holds a step.

    Args:
        buckets: the candidates.
        num_tokens: number of tokens in the step.
        num_rows: number of rows in the step, or of rows of logits if that is larger.
        single_tokens: whether every row runs one token, so that a decode bucket suffices.

    Raises:
        ValueError: no bucket is large enough; the scheduler's limits and the buckets disagree.
    """
    fitting = [
        bucket
        for bucket in buckets
        if bucket.num_tokens >= num_tokens
        and bucket.num_rows >= num_rows
        and (single_tokens or not bucket.single_tokens)
    ]
    if not fitting:
        raise ValueError(f"no compiled step holds {num_tokens} tokens in {num_rows} rows")
    return min(fitting)


def _powers(first: int, factor: int, last: int) -> list[int]:
    """Return `first`, `first * factor`, ... and `last`."""
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= factor
    return [*sizes, max(last, first)]
