"""Generate images on EvoLink from asyncio.

A `Session` submits generations, each comes back as an awaitable `Task`, and one shared
poller watches them all::

    async with Session() as session:
        task = await session.submit("A serene lake at sunset", size="1280x1280")
        paths = await task.download("out/")
"""

from __future__ import annotations

import typing

from evolink_async import errors
from evolink_async._clock import Clock
from evolink_async._http.retry import RetryPolicy, Timeout
from evolink_async._map import Outcome
from evolink_async._model.requests import ImageRequest, RawRequest
from evolink_async._model.snapshots import (
    Credits,
    GenerationResult,
    TaskSnapshot,
    TaskSummary,
    Usage,
)
from evolink_async._polling.policy import PollPolicy
from evolink_async._session import Session
from evolink_async._stats import Stats
from evolink_async._task import Task
from evolink_async.errors import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    ConfigurationError,
    DownloadError,
    EvolinkError,
    InsufficientCreditsError,
    InvalidRequestError,
    InvalidResponseError,
    LedgerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    RequestValidationError,
    ServerError,
    SessionClosedError,
    SubmitUncertainError,
    TaskCancelledError,
    TaskError,
    TaskFailedError,
    TaskTimeoutError,
)

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "Clock",
    "ConfigurationError",
    "Credits",
    "DownloadError",
    "EvolinkError",
    "GenerationResult",
    "ImageRequest",
    "InsufficientCreditsError",
    "InvalidRequestError",
    "InvalidResponseError",
    "LedgerError",
    "NotFoundError",
    "Outcome",
    "PermissionDeniedError",
    "PollPolicy",
    "RateLimitError",
    "RawRequest",
    "RequestTooLargeError",
    "RequestValidationError",
    "RetryPolicy",
    "ServerError",
    "Session",
    "SessionClosedError",
    "Stats",
    "SubmitUncertainError",
    "Task",
    "TaskCancelledError",
    "TaskError",
    "TaskFailedError",
    "TaskSnapshot",
    "TaskSummary",
    "TaskTimeoutError",
    "Timeout",
    "Usage",
    "errors",
]


if typing.TYPE_CHECKING:
    __version__: str
else:

    def __getattr__(name):  # noqa: ANN001, ANN202 - type checkers are told above
        if name == "__version__":
            from importlib.metadata import version  # noqa: PLC0415 - reads files; few ask

            return version("evolink-async")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
