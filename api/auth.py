"""The API key. A route is closed unless it says `OPEN`."""

import hashlib
import hmac
from typing import Any

from litestar.connection import ASGIConnection
from litestar.exceptions import NotAuthorizedException
from litestar.handlers import BaseRouteHandler

# Set as a handler's `opt`: probes and scrapers carry no key.
OPEN = {"open": True}


class KeyGuard:
    """Litestar guard that wants `Authorization: Bearer KEY`; without a key everything is open."""

    def __init__(self, api_key: str | None) -> None:
        self._digest = None if api_key is None else _digest(api_key.encode())

    def __call__(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        """Raise 401 unless the key fits. Compares digests in constant time."""
        if self._digest is None or handler.opt.get("open"):
            return
        scheme, _, key = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = connection.headers.get("x-api-key", "")  # as Anthropic's clients send it
        if not hmac.compare_digest(_digest(key.encode("latin-1", "replace")), self._digest):
            raise NotAuthorizedException("missing or wrong API key; send 'Authorization: Bearer KEY'")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
