"""The exceptions that cross a package boundary.

    JaxserveError
    ├── RequestError          the client's fault: 400, names the field
    │   ├── NotFoundError     unknown model or adapter: 404
    │   └── AdapterError      an adapter that cannot be loaded: 400
    ├── OverloadedError       the queue is full: 429, retry here later
    ├── UnavailableError      loading, draining or engine lost: 503
    └── LaunchError           bad flag, bad checkpoint, busy port: the launcher exits

`api.errors` alone maps these to HTTP status codes.
"""

from enum import IntEnum


class JaxserveError(Exception):
    """Base class of all exceptions here."""


class RequestError(JaxserveError):
    """A request that cannot be served as it is.

    Attributes:
        param: name of the offending field, or None when the body as a whole is at fault.
        code: short machine-readable reason such as `context_length_exceeded`.
    """

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class NotFoundError(RequestError):
    """The request names a model or adapter that is not served."""


class AdapterError(RequestError):
    """An adapter that cannot be read, or does not fit the model."""


class OverloadedError(JaxserveError):
    """The waiting queue is full; the client may retry after `retry_after_s`."""

    def __init__(self, message: str, *, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class UnavailableError(JaxserveError):
    """This instance cannot serve: it is loading or draining, or has lost its engine."""

    def __init__(self, message: str, *, retry_after_s: int = 5) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ExitCode(IntEnum):
    """Exit codes of the launcher."""

    OK = 0
    BAD_CONFIG = 2
    PORT_IN_USE = 3
    ENGINE_LOST = 70


class LaunchError(JaxserveError):
    """The server cannot start; the message says what to change."""

    def __init__(self, message: str, *, exit_code: ExitCode = ExitCode.BAD_CONFIG) -> None:
        super().__init__(message)
        self.exit_code = exit_code
