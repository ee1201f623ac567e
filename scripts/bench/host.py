"""Measure host time per step without a device (schedule + batch + update), and API time per token delta.

PYTHONPATH=. python scripts/bench/host.py
"""

import asyncio
import statistics
import time
from types import SimpleNamespace
from typing import Any

import numpy as np

from api.chat.build import build_chat
from api.chat.routes import _Chat
from api.chat.schemas import ChatCompletionRequest, ChatMessage, FunctionDefinition, ToolDefinition
from api.requests.builder import RequestBuilder, SeedSource
from api.requests.running import RunningRequest
from jaxserve.config import CacheConfig, SchedulerConfig
from jaxserve.engine.client import TokenStream
from jaxserve.request import FinishReason, Request, TokenDelta
from jaxserve.runner.batch import BatchLayout, RowTable
from jaxserve.runner.buckets import Bucket
from jaxserve.sampling_params import SamplingParams
from jaxserve.scheduling.scheduler import Scheduler
from jaxserve.step import StepOutput
from tests.api.conftest import make_server
from tests.support.fakes import FakeEngineClient
from tests.support.tiny import VOCAB_SIZE


def step_times(num_rows: int, context: int, num_steps: int = 200) -> float:
    """Return median milliseconds of schedule + batch build + update with every row decoding."""
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


async def microseconds_per_delta(name: str, **settings: Any) -> float:
    """Return microseconds from a token delta to its event's bytes on one core: detokenizer, parsers, JSON.

    Each token is a character of a long answer: plain, with thinking in it, or a tool call.
    """
    server = make_server(FakeEngineClient(VOCAB_SIZE), **settings)
    builder = RequestBuilder(server.model, SeedSource(0))
    tool = ToolDefinition(FunctionDefinition("f", parameters={"type": "object"}))
    tools = [tool] if name == "tool call" else None
    body = ChatCompletionRequest(messages=[ChatMessage("user", "x")], stream=True, tools=tools)
    prepared = build_chat(builder, body)
    long = "some words and more, " * 100
    text = {
        "thinking": f"<think>{long}</think>{long}",
        "tool call": f'<tool_call>{{"name": "f", "arguments": {{"a": "{long}"}}}}</tool_call>',
    }.get(name, long)
    stream = TokenStream(prepared.request, lambda _: None)
    for token in text.encode():
        stream.deliver(TokenDelta(request_id=prepared.request.id, token_ids=(token,)))
    stream.deliver(TokenDelta(request_id=prepared.request.id, finish_reason=FinishReason.STOP))
    server.client = SimpleNamespace(submit=lambda _: stream, check_capacity=lambda _: None, check_ready=lambda: None)
    chat = _Chat(server, body, RunningRequest(server, "chat", "id", [prepared]))
    start = time.perf_counter()
    async for _ in chat.events():
        pass
    return (time.perf_counter() - start) / len(text) * 1e6


if __name__ == "__main__":
    for rows in (32, 256):
        print(f"{rows} rows x 256 tokens: {step_times(rows, 256):.2f} ms of host time per step")
    for name, settings in (
        ("plain", {}),
        ("thinking", {"reasoning_parser": "qwen3"}),
        ("tool call", {"reasoning_parser": "qwen3", "tool_call_parser": "hermes"}),
    ):
        costs = [asyncio.run(microseconds_per_delta(name, **settings)) for _ in range(5)]
        print(f"{name}: {statistics.median(costs):.1f} us from a token delta to its event")
