"""The API keys. A route is closed unless it says `OPEN`."""

import hashlib
import hmac
from typing import Any

from litestar.connection import ASGIConnection
from litestar.exceptions import NotAuthorizedException, PermissionDeniedException
from litestar.handlers import BaseRouteHandler

# Set as a handler's `opt`: probes and scrapers carry no key.
OPEN = {"open": True}
# Routes that change what the server does for others: the admin's, where there is an admin's key.
CONTROL = {"control": True}


class KeyGuard:
    """Litestar guard that wants `Authorization: Bearer KEY`; without a key everything is open.

    Args:
        api_key: the key of every route that is not open.
        admin_api_key: the key of control routes, which `api_key` then does not open; it opens the other routes, too.
    """

    def __init__(self, api_key: str | None, admin_api_key: str | None = None) -> None:
        self._user = None if api_key is None else _digest(api_key.encode())
        self._admin = None if admin_api_key is None else _digest(admin_api_key.encode())

    def __call__(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        """Raise 401 unless a key fits, 403 where only the admin's would. Compares digests in constant time."""
        wanted = self._admin if handler.opt.get("control") and self._admin is not None else self._user
        if wanted is None or handler.opt.get("open"):
            return
        scheme, _, key = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = connection.headers.get("x-api-key", "")  # as Anthropic's clients send it
        given = _digest(key.encode("latin-1", "replace"))
        if not key:
            raise NotAuthorizedException("missing API key; send 'Authorization: Bearer KEY'")
        is_admin = self._admin is not None and hmac.compare_digest(given, self._admin)
        if is_admin or hmac.compare_digest(given, wanted):
            return
        if self._user is not None and hmac.compare_digest(given, self._user):
            raise PermissionDeniedException("this route needs the admin's API key")
        raise NotAuthorizedException("wrong API key; send 'Authorization: Bearer KEY'")


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()
