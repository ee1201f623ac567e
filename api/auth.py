"""API keys. A route requires a key unless its `opt` is `OPEN`."""

import hashlib
import hmac
from typing import Any

from litestar.connection import ASGIConnection
from litestar.exceptions import NotAuthorizedException, PermissionDeniedException
from litestar.handlers import BaseRouteHandler

# Passed as a handler's `opt`: health probes and metrics scrapers send no key.
OPEN = {"open": True}
# Routes that affect other clients: they require the admin key if one is configured.
CONTROL = {"control": True}


class KeyGuard:
    """Litestar guard that requires `Authorization: Bearer KEY`; without a configured key every route is open.

    Args:
        api_key: key of every route that is not `OPEN`.
        admin_api_key: key of the control routes, which then reject `api_key`; all other routes accept both keys.
    """

    def __init__(self, api_key: str | None, admin_api_key: str | None = None) -> None:
        self._user = None if api_key is None else _digest(api_key.encode())
        self._admin = None if admin_api_key is None else _digest(admin_api_key.encode())

    def __call__(self, connection: ASGIConnection[Any, Any, Any, Any], handler: BaseRouteHandler) -> None:
        """Raise 401 if the key is missing or wrong, 403 if the route needs the admin key instead.

        Digests of the keys are compared in constant time.
        """
        wanted = self._admin if handler.opt.get("control") and self._admin is not None else self._user
        if wanted is None or handler.opt.get("open"):
            return
        scheme, _, key = connection.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = connection.headers.get("x-api-key", "")  # the header that Anthropic's clients use
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
