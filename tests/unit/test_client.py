"""Streams of token deltas end each choice once, and callers that wait get an error when the engine ends."""

import asyncio
import threading

import pytest

from jaxserve.engine.client import Streams
from jaxserve.engine.in_process_client import InProcessEngineClient
from jaxserve.errors import UnavailableError
from jaxserve.request import AdapterSource, FinishReason, Request, TokenDelta
from jaxserve.runner_protocol import LoadedAdapter
from jaxserve.sampling_params import SamplingParams
from tests.support.fakes import FakeEngineClient, make_engine, shift_adapter


async def test_a_failure_ends_the_open_choices_only() -> None:
    streams = Streams()
    request = Request(id="a", prompt_token_ids=(1,), sampling=SamplingParams(), num_choices=3)
    stream = streams.add(request, lambda _: None)
    streams.deliver(TokenDelta(request_id="a", choice=1, finish_reason=FinishReason.STOP))
    streams.fail_all("gone")
    streams.deliver(TokenDelta(request_id="a", choice=0, token_ids=(5,)))
    ends = [(delta.choice, delta.finish_reason) async for delta in stream]
    assert ends == [(1, FinishReason.STOP), (0, FinishReason.ERROR), (2, FinishReason.ERROR)]
    assert streams.num_live == 0
    assert not streams.remove("a")


async def test_who_waits_for_an_adapter_gets_an_error_when_the_engine_ends() -> None:
    go_on = threading.Event()

    def read(folder: str) -> LoadedAdapter:
        assert go_on.wait(30)
        return shift_adapter(0)

    engine, _ = make_engine(num_slots=2, read=read, executor=None)
    client = InProcessEngineClient(engine, FakeEngineClient(256).info)
    loading = asyncio.create_task(client.load_adapter(AdapterSource(key="a", folder="a")))
    await asyncio.sleep(0.05)
    assert not loading.done()
    await asyncio.to_thread(client.stop)
    go_on.set()
    with pytest.raises(UnavailableError, match="the engine was stopped"):
        await loading
