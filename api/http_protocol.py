"""uvicorn's HTTP protocol with limits that it lacks: on the size of a request's head, and on the time to send it all.

Without them a client can hold a connection open for ever by sending nothing, or fill memory with headers.
"""

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADERS = 100
MAX_HEAD_BYTES = 64 << 10
RECEIPT_DEADLINE_S = 60.0


class _HeadTooLarge(Exception):
    """Ends parsing; the parser turns it into an error of its own."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection. Attributes are uvicorn's, and a few of ours with an underscore."""

    _status = HTTPStatus.BAD_REQUEST
    _head_bytes = 0
    _in_head = True
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """The clock runs from here: also for a client that never sends a byte."""
        super().connection_made(transport)
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """See uvicorn."""
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """A head that is not complete yet counts in full; the parser only reports whole headers."""
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)

    def on_message_begin(self) -> None:
        """A request starts; on a kept connection that starts a clock of its own."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0
        if self._deadline is None:
            self._start_deadline()

    def on_headers_complete(self) -> None:
        """The head is there: check it before anything runs."""
        self._in_head = False
        size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
        if len(self.headers) > MAX_HEADERS or size > MAX_HEAD_BYTES:
            self._status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise _HeadTooLarge
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is there in full."""
        self._stop_deadline()
        super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls on a parser error, with OpenAI's error object."""
        self._refuse(self._status)

    def _refuse(self, status: HTTPStatus) -> None:
        body = b'{"error":{"message":"%b","type":"invalid_request_error","param":null,"code":null}}' % (
            status.phrase.encode()
        )
        head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(head.encode() + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        self.transport.close()

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(RECEIPT_DEADLINE_S, self._on_deadline)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        cycle: Any = self.cycle
        if cycle is not None and cycle.response_started and not cycle.response_complete:
            self.transport.close()  # it is being answered without its body; no second answer
        else:
            self._refuse(HTTPStatus.REQUEST_TIMEOUT)
