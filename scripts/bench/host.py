"""Host time per step without a device: schedule + batch + update; and token deltas that the API side serialises.

PYTHONPATH=. python scripts/bench/host.py
"""

import asyncio
import statistics
import time

import numpy as np

from api.chat import _Chat
from api.params import RequestBuilder, SeedSource, answer_id
from api.running import RunningRequest
from api.schemas import ChatCompletionRequest, ChatMessage
from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.generation_config import GenerationConfig
from jaxserve.request import Request, SamplingParams
from jaxserve.runner.batch import BatchLayout, RowTable
from jaxserve.runner.buckets import Bucket
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.step import StepOutput
from tests.api.conftest import make_server
from tests.fakes import FakeEngineClient
from tests.tiny import VOCAB_SIZE


def step_times(num_rows: int, context: int, num_steps: int = 200) -> float:
    """Median milliseconds of schedule + batch build + update with every row decoding."""
    page_size = 64
    pages_per_row = -(-8192 // page_size)
    num_pages = num_rows * (context // page_size + 8)
    scheduler = Scheduler(
        SchedulerConfig(max_rows=num_rows, max_step_tokens=max(512, num_rows), context_length=8192),
        CacheConfig(page_size=page_size, num_pages=num_pages),
    )
    table = RowTable(BatchLayout(num_rows, page_size, num_pages, pages_per_row, 49152))
    rng = np.random.default_rng(0)
    for index in range(num_rows):
        prompt = tuple(rng.integers(0, 49152, context).tolist())
        scheduler.add(Request(id=str(index), prompt_token_ids=prompt, sampling=SamplingParams(max_tokens=400)))
    times: list[float] = []
    pending: StepOutput | None = None
    while len(times) < num_steps:
        start = time.perf_counter()
        plan = scheduler.schedule()
        assert plan is not None
        for new in plan.new_rows:
            table.admit(new)
        num_tokens = max(512, num_rows) if plan.num_tokens > num_rows else num_rows
        table.build(plan, Bucket(num_tokens, num_rows))
        if pending is not None:
            scheduler.update(pending)
        scheduler.take_deltas()
        if plan.num_tokens == num_rows:
            times.append(time.perf_counter() - start)
        count = len(plan.rows)
        pending = StepOutput(
            token_ids_B=np.ones(count, np.int32), finite_B=np.ones(count, bool), logprobs_B=np.zeros(count, np.float32)
        )
    return statistics.median(times) * 1e3


async def serialised_per_second(num_requests: int = 32, num_tokens: int = 400) -> float:
    """Chat chunks encoded a second, from token deltas to event bytes, on one core."""
    engine = FakeEngineClient(VOCAB_SIZE)
    server = make_server(engine)
    builder = RequestBuilder(server.tokenizer, engine.info, SeedSource(0), GenerationConfig())
    body = ChatCompletionRequest(
        messages=[ChatMessage(role="user", content="x")], max_tokens=num_tokens, stream=True, ignore_eos=True
    )

    async def one() -> int:
        running = RunningRequest(server, "chat", answer_id("chatcmpl-", None), [builder.chat(body)])
        count = 0
        async for _ in _Chat(server, body, "tiny", running).events():
            count += 1
        running.close()
        return count

    start = time.perf_counter()
    counts = await asyncio.gather(*(one() for _ in range(num_requests)))
    return sum(counts) / (time.perf_counter() - start)


if __name__ == "__main__":
    for rows in (32, 256):
        print(f"{rows} rows x 256 tokens: {step_times(rows, 256):.2f} ms of host time per step")
    rate = asyncio.run(serialised_per_second())
    print(f"{rate:.0f} chat chunks a second, a fake engine's stepping included")
