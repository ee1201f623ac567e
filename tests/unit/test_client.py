"""Streams of deltas: each choice ends once, whoever ends it."""

from jaxserve.client import Streams
from jaxserve.request import FinishReason, Request, SamplingParams, TokenDelta


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
