"""Limits on the size of a request's head and on the time to receive a request, over a real socket."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn

from api import http_protocol
from api.http_protocol import MAX_HEAD_BYTES, MAX_HEADERS, BoundedHttpProtocol


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Any:
        yield


async def _echo_length(scope: Any, receive: Any, send: Any) -> None:
    size = 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return
        size += len(message["body"])
        if not message["more_body"]:
            break
    if (b"x-slow", b"1") in scope["headers"]:
        await asyncio.sleep(0.3)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
    await send({"type": "http.response.body", "body": b"%9d" % size})


@pytest.fixture
async def port() -> AsyncIterator[int]:
    config = uvicorn.Config(_echo_length, port=0, http=BoundedHttpProtocol, lifespan="off", log_level="error")
    server = _Server(config)
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await task


async def answer(port: int, *parts: bytes) -> bytes:
    """Send `parts` one after the other, and return what the server sends until it answers or closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for part in parts:
            writer.write(part)
            await asyncio.sleep(0.02)
        said = b""
        while not said or (b"connection: close" not in said and len(parts) > 1 and parts[-1] == b"\r\n"):
            part = await asyncio.wait_for(reader.read(4096), 5)
            said += part
            if not part:
                break
        return said
    except ConnectionError:
        return b"reset"
    finally:
        writer.close()


def post(body: bytes, *headers: bytes) -> bytes:
    head = [b"POST / HTTP/1.1", b"host: x", b"content-length: %d" % len(body), *headers]
    return b"\r\n".join(head) + b"\r\n\r\n" + body


async def test_ordinary_requests_pass(port: int) -> None:
    assert (await answer(port, post(b"x" * 70_000))).endswith(b"    70000")
    whole = post(b"abc")
    assert (await answer(port, whole[:9], whole[9:30], whole[30:])).endswith(b"        3")


async def test_a_second_request_on_the_connection_passes(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for _ in range(3):
        writer.write(post(b"abc", b"x-filler: " + b"x" * (MAX_HEAD_BYTES // 2)))
        assert b"200" in await reader.readuntil(b"        3")
    writer.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        post(b"", b"x-large: " + b"x" * (MAX_HEAD_BYTES + 1)),
        post(b"", *(b"x-%d: 1" % index for index in range(MAX_HEADERS))),
        b"GET /" + b"x" * (MAX_HEAD_BYTES + 1) + b" HTTP/1.1\r\nhost: x\r\n\r\n",
    ],
    ids=["large header", "many headers", "long path"],
)
async def test_a_head_that_is_too_large_is_refused(port: int, request_bytes: bytes) -> None:
    assert b"431" in await answer(port, request_bytes)
    assert b"200" in await answer(port, post(b""))


async def test_a_header_that_never_ends_is_refused(port: int) -> None:
    assert b"431" in await answer(port, b"GET / HTTP/1.1\r\nx-endless: ", b"x" * (MAX_HEAD_BYTES + 1))


async def test_trailers_count_as_well(port: int) -> None:
    head = b"POST / HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n"
    assert b"        3" in await answer(port, head + b"x-trailer: 1\r\n\r\n")
    refused = await answer(port, head + b"".join(b"x-%d: %b\r\n" % (i, b"y" * 1000) for i in range(80)) + b"\r\n")
    assert b"431" in refused or refused in (b"", b"reset")


async def test_requests_in_a_pipeline_are_answered_in_order(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(post(b"x" * 5, b"x-slow: 1") + post(b"x" * 70_000, b"x-slow: 1") + post(b"xyz")[:-1])
    await reader.readuntil(b"        5")
    await reader.readuntil(b"    70000")
    writer.write(b"z")
    await reader.readuntil(b"        3")
    writer.close()


async def test_the_clock_of_a_second_request_does_not_cut_the_first(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "RECEIPT_DEADLINE_S", 0.1)
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(post(b"abc", b"x-slow: 1") + post(b"x" * 9)[:-1])
    assert b"408" not in await reader.readuntil(b"        3"), "the first takes three times its deadline"
    assert b"HTTP/1.1 408" in await asyncio.wait_for(reader.read(4096), 5)
    writer.close()


async def test_what_is_no_http_is_a_400(port: int) -> None:
    assert b"HTTP/1.1 400" in await answer(port, b"hello\r\n\r\n")


@pytest.mark.parametrize(
    "parts",
    [[], [b"GET / HT"], [post(b"x" * 100)[:-1]], [post(b"abc"), b"\r\n"]],
    ids=["nothing", "half a head", "half a body", "line breaks after a request"],
)
async def test_a_request_must_arrive_in_time(port: int, parts: list[bytes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_protocol, "RECEIPT_DEADLINE_S", 0.2)
    assert b"HTTP/1.1 408" in await answer(port, *parts)
