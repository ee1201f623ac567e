"""The host runs the smallest sampling program that suffices for the rows of a step."""

from typing import Any

import numpy as np
import pytest

from jaxserve.runner.batch import BatchLayout, RowTable
from jaxserve.sampling_params import SamplingParams
from jaxserve.step import NewRow, ScheduledRow, SchedulerOutput
from kernels_pallas.sampling.api import SamplingMode

LAYOUT = BatchLayout(max_rows=2, page_size=16, num_pages=8, pages_per_row=4, vocab_size=100)
EOS = (1,)


@pytest.mark.parametrize(
    ("sampling", "mode"),
    [
        ({}, SamplingMode.PLAIN),
        ({"temperature": 0}, SamplingMode.PLAIN),
        # Greedy rows need no filter.
        ({"temperature": 0, "top_p": 0.5}, SamplingMode.PLAIN),
        ({"top_k": 1, "min_p": 0.1}, SamplingMode.PLAIN),
        ({"top_k": 100}, SamplingMode.PLAIN),
        ({"top_k": 99}, SamplingMode.LISTED),
        ({"top_p": 0.9}, SamplingMode.LISTED),
        ({"min_p": 0.1}, SamplingMode.LISTED),
        ({"temperature": 0, "num_logprobs": 0}, SamplingMode.LISTED),
        ({"frequency_penalty": 0.1}, SamplingMode.ADJUSTED),
        ({"presence_penalty": -0.1}, SamplingMode.ADJUSTED),
        ({"temperature": 0, "repetition_penalty": 1.1}, SamplingMode.ADJUSTED),
        ({"logit_bias": {3: 1.0}}, SamplingMode.ADJUSTED),
        ({"min_tokens": 1}, SamplingMode.ADJUSTED),
    ],
)
def test_mode_of_a_row_beside_a_plain_one(sampling: dict[str, Any], mode: SamplingMode) -> None:
    table = RowTable(LAYOUT)
    for row, options in enumerate(({}, sampling)):
        params = SamplingParams(**{"temperature": 1.0, "top_p": 1.0, "top_k": -1, **options})
        table.admit(NewRow(row=row, sampling=params, seed=0, eos_token_ids=EOS))
    rows = tuple(
        ScheduledRow(row=row, token_ids=(5,), num_computed_tokens=0, samples=True, new_page_ids=(row,))
        for row in range(2)
    )
    batch = table.sample_batch(SchedulerOutput(step=0, new_rows=(), rows=rows), np.arange(2), 4)
    assert batch.mode(LAYOUT.vocab_size) == mode
