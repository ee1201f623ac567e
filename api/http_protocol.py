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

    _refusal = HTTPStatus.BAD_REQUEST
    _in_head = True
    _receiving = False
    _unparsed_bytes = 0
    _fields_bytes = 0
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
        """The parser keeps a header to itself until it is whole: what it holds back counts as well."""
        holding = self._receiving and self._in_head
        super().data_received(data)
        if self.transport.is_closing():
            return
        if holding and self._in_head:
            self._unparsed_bytes += len(data)
            if self._unparsed_bytes > MAX_HEAD_BYTES:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif not self._responding:
            # Line breaks between requests stop uvicorn's clock and start no request.
            self._start_deadline()

    def on_message_begin(self) -> None:
        """A request starts, and its clock: at once, or when the one before it is answered."""
        super().on_message_begin()
        self._in_head = self._receiving = True
        self._unparsed_bytes = self._fields_bytes = 0
        if not self._responding:
            self._start_deadline()

    def on_url(self, url: bytes) -> None:
        """See uvicorn."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a trailer of a chunked body."""
        self._count(len(name) + len(value))
        if len(self.headers) >= MAX_HEADERS:
            self._count(MAX_HEAD_BYTES)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """The request is there in full."""
        self._receiving = False
        self._stop_deadline()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """What has begun to arrive meanwhile gets its time from here."""
        super().on_response_complete()
        if self._receiving and not self.transport.is_closing():
            self._start_deadline()

    def send_400_response(self, msg: str) -> None:
        """What uvicorn calls on a parser error."""
        self._refuse(self._refusal)

    @property
    def _responding(self) -> bool:
        cycle: Any = self.cycle
        return cycle is not None and not cycle.response_complete

    def _count(self, num_bytes: int) -> None:
        self._fields_bytes += num_bytes
        if self._fields_bytes > MAX_HEAD_BYTES:
            self._refusal = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
            raise _HeadTooLarge

    def _refuse(self, status: HTTPStatus) -> None:
        """Answer with OpenAI's error object and close; only close where another answer is under way or given."""
        cycle: Any = self.cycle
        refused_early = self._receiving and not self._in_head and cycle.response_started
        answered = refused_early or (self._responding and (self._in_head or cycle.response_started))
        if not (answered or self.pipeline):
            body = b'{"error":{"message":"%b","type":"invalid_request_error","param":null,"code":null}}' % (
                status.phrase.encode()
            )
            head = f"HTTP/1.1 {status.value} {status.phrase}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(head.encode() + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        self.transport.close()

    def _start_deadline(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(RECEIPT_DEADLINE_S, self._on_deadline)

    def _stop_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _on_deadline(self) -> None:
        self._deadline = None
        self._refuse(HTTPStatus.REQUEST_TIMEOUT)
