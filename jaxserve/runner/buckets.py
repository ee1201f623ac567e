"""The few shapes a step is compiled for."""

from collections.abc import Iterable
from typing import NamedTuple

from jaxserve.config import SchedulerConfig


class Bucket(NamedTuple):
    """Shape of one program: packed tokens and rows. With as many rows as tokens, every row runs a single token."""

    num_tokens: int
    num_rows: int


def make_buckets(config: SchedulerConfig, token_factor: int) -> tuple[Bucket, ...]:
    """Programs that cover every step within the limits, widest first.

    Rows come in steps of four times; a decode step has as many tokens as rows. Steps with prompt tokens in them
    come with few rows or with all.

    Args:
        config: the limits.
        token_factor: between one size of a mixed step and the next; small where padding costs time, large where
            programs cost more.
    """
    rows = _powers(8, 4, config.max_rows)
    tokens = _powers(4 * rows[0], token_factor, max(config.max_step_tokens, rows[-1] + 1))
    decode = {Bucket(num_rows, num_rows) for num_rows in rows}
    mixed = {Bucket(num_tokens, r) for num_tokens in tokens for r in (rows[0], rows[-1]) if num_tokens > r}
    return tuple(sorted(decode | mixed, reverse=True))


def pick_bucket(buckets: Iterable[Bucket], num_tokens: int, num_rows: int, *, single_tokens: bool) -> Bucket:
    """The smallest bucket that holds a step.

    Args:
        buckets: to choose from.
        num_tokens: of the step.
        num_rows: its rows or draws, whichever are more.
        single_tokens: every row runs one token, so a decode step will do.

    Raises:
        ValueError: none does; the scheduler's limits and the buckets disagree.
    """
    fitting = [
        bucket
        for bucket in buckets
        if bucket.num_tokens >= num_tokens
        and bucket.num_rows >= num_rows
        and (single_tokens or bucket.num_tokens > bucket.num_rows)
    ]
    if not fitting:
        raise ValueError(f"no compiled step holds {num_tokens} tokens in {num_rows} rows")
    return min(fitting)


def _powers(first: int, factor: int, last: int) -> list[int]:
    """first, first * factor, ... and last."""
    sizes = []
    size = first
    while size < last:
        sizes.append(size)
        size *= factor
    return [*sizes, max(last, first)]
