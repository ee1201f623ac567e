"""uvicorn's HTTP protocol with limits that it lacks: on the size of a request's head and the time to receive a request.

Without them a client can hold a connection open forever by sending nothing, or fill memory with headers.
"""

import asyncio
from http import HTTPStatus
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEADERS = 100
MAX_HEAD_BYTES = 64 << 10
RECEIPT_DEADLINE_S = 60.0


class _HeadTooLarge(Exception):
    """Raised in a callback to abort parsing; the parser converts it to its own error."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One HTTP connection. Public attributes are uvicorn's; those with an underscore are defined here."""

    _refusal = HTTPStatus.BAD_REQUEST
    _in_head = True
    _receiving = False
    _unparsed_bytes = 0
    _fields_bytes = 0
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the deadline, which also applies to a client that never sends a byte."""
        super().connection_made(transport)
        self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the deadline."""
        self._stop_deadline()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse data, and count the bytes of an unfinished header, which the parser buffers until it is complete."""
        holding = self._receiving and self._in_head
        super().data_received(data)
        if self.transport.is_closing():
            return
        if holding and self._in_head:
            self._unparsed_bytes += len(data)
            if self._unparsed_bytes > MAX_HEAD_BYTES:
                self._refuse(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
        elif not self._responding:
            # Line breaks between requests cancel uvicorn's keep-alive timeout without starting a request.
            self._start_deadline()

    def on_message_begin(self) -> None:
        """Start a request; its deadline starts now, or once the previous request has been answered."""
        super().on_message_begin()
        self._in_head = self._receiving = True
        self._unparsed_bytes = self._fields_bytes = 0
        if not self._responding:
            self._start_deadline()

    def on_url(self, url: bytes) -> None:
        """Count the bytes of the URL."""
        self._count(len(url))
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Count the bytes of a header, or of a trailer of a chunked body."""
        self._count(len(name) + len(value))
        if len(self.headers) >= MAX_HEADERS:
            self._count(MAX_HEAD_BYTES)
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Mark the head as received."""
        self._in_head = False
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        """Mark the request as received and stop its deadline."""
        self._receiving = False
        self._stop_deadline()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Start the deadline of a request that began to arrive during the response."""
        super().on_response_complete()
        if self._receiving and not self.transport.is_closing():
            self._start_deadline()

    def send_400_response(self, msg: str) -> None:
        """Refuse the request; uvicorn calls this on a parser error."""
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
        """Send OpenAI's error object and close; only close if another response was sent or is in progress."""
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
