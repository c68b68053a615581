"""Every error this package raises, in one tree.

``except EvolinkError`` catches all of it::

    EvolinkError
      ConfigurationError (ValueError)          a setting is wrong or missing, e.g. the API key
      RequestValidationError (ValueError)      a request breaks a rule of the API; not sent
      APIConnectionError                       no answer; the request did not get through
        APITimeoutError (TimeoutError)         ... in time
      APIStatusError                           the API answered with an error
        InvalidRequestError                    400
        AuthenticationError                    401
        InsufficientCreditsError               402, and 429 with a quota code
        PermissionDeniedError                  403
        NotFoundError                          404
        RequestTooLargeError                   413
        RateLimitError                         429
        ServerError                            5xx
      InvalidResponseError                     an answer that is not what the API documents
      SubmitUncertainError                     a submit that may have been accepted
      TaskError                                about one task; carries ``task_id`` and ``snapshot``
        TaskFailedError                        the generation failed
        TaskCancelledError                     the generation was cancelled
        TaskTimeoutError (TimeoutError)        it did not end in time; it may still be running
      SessionClosedError                       the session was closed first
      DownloadError                            a result could not be saved
      LedgerError                              a batch's ledger cannot be used

All of them can be pickled, compared by identity, and carry their data as
attributes of the same name as the keyword they were made with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

    from evolink_async._model.requests import ImageRequest, RawRequest
    from evolink_async._model.snapshots import TaskSnapshot

__all__ = [
    "APIConnectionError",
    "APIStatusError",
    "APITimeoutError",
    "AuthenticationError",
    "ConfigurationError",
    "DownloadError",
    "EvolinkError",
    "InsufficientCreditsError",
    "InvalidRequestError",
    "InvalidResponseError",
    "LedgerError",
    "NotFoundError",
    "PermissionDeniedError",
    "RateLimitError",
    "RequestTooLargeError",
    "RequestValidationError",
    "ServerError",
    "SessionClosedError",
    "SubmitUncertainError",
    "TaskCancelledError",
    "TaskError",
    "TaskFailedError",
    "TaskTimeoutError",
]


def _restore(cls: type[EvolinkError], message: str, data: dict[str, Any]) -> EvolinkError:
    error = cls.__new__(cls)
    error.args = (message,)  # OSError's own constructor, behind TimeoutError, does not set them
    error.__dict__.update(data)
    return error


class EvolinkError(Exception):
    """Base of everything this package raises.

    Attributes:
        advice: What to do about it; the message ends with it. ``""`` if there is nothing to
            add.
        way_past: Name of the argument that avoids it, e.g. ``"validate"``; None if there is
            none.
        retryable: True if the same call may succeed later.
        resendable: True if a submit that ended so was certainly not accepted, and may be
            sent again unchanged.
        may_have_been_accepted: True if a submit that ended so may be paid for.
        is_throttle: True if it asks the whole session to wait before the next request.
    """

    advice = ""
    way_past: str | None = None
    retryable = False
    resendable = False
    may_have_been_accepted = False
    is_throttle = False

    def __init__(self, message: str) -> None:
        super().__init__(f"{message}; {self.advice}" if self.advice else message)

    @property
    def problem(self) -> str:
        """The message without the advice that may end it."""
        return str(self).removesuffix(f"; {self.advice}") if self.advice else str(self)

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls cls(*args), which cannot pass keyword-only data.
        return _restore, (type(self), str(self), self.__dict__.copy())


class ConfigurationError(EvolinkError, ValueError):
    """A setting given to this package is missing or unusable; nothing was sent.

    Attributes:
        field: Name of the setting, None if the message is about none by name.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        advice: str = "",
        way_past: str | None = None,
    ) -> None:
        self.advice = advice
        super().__init__(message)
        self.field = field
        self.way_past = way_past


class RequestValidationError(EvolinkError, ValueError):
    """A request breaks a rule of the API's page; nothing was sent.

    The API decides in the end: ``validate=False`` sends a request unchecked.

    Attributes:
        field: Name of the offending field, as in the API.
        value: What was given.
        allowed: What the API's page allows, in words.
    """

    def __init__(
        self,
        message: str,
        *,
        field: str,
        value: object,
        allowed: str,
        advice: str = "",
        way_past: str | None = None,
    ) -> None:
        self.advice = advice
        super().__init__(message)
        self.way_past = way_past
        self.field = field
        self.value = value
        self.allowed = allowed


class APIConnectionError(EvolinkError):
    """No answer arrived: the connection could not be made, or broke.

    Attributes:
        sent: False if the request cannot have left; True if it may have.
    """

    retryable = True

    def __init__(self, message: str, *, sent: bool = False) -> None:
        super().__init__(message)
        self.sent = sent
        self.resendable = not sent
        self.may_have_been_accepted = sent


class APITimeoutError(APIConnectionError, TimeoutError):
    """No complete answer arrived in time (see `Timeout`)."""


class APIStatusError(EvolinkError):
    """The API, or a proxy before it, answered with an error status.

    Attributes:
        status: HTTP status code.
        code: The API's ``error.code`` as a string, None if the answer had none.
        type: The API's ``error.type``, e.g. ``"rate_limit_error"``.
        param: The request field the API objects to.
        suggestion: The API's ``error.fallback_suggestion``.
        request_id: The API's id for this exchange; quote it to their support.
        retry_after: Seconds the API asked to wait, None if it did not.
        from_api: True if the body was the API's documented JSON error object;
            False if it was something else, such as a proxy's page.
        replayed: True if the answer is the stored one of an earlier request
            with the same idempotency key.

    What an answer means is decided by one table, in ``_http/protocol.py``: it states
    ``retryable``, ``resendable``, ``may_have_been_accepted`` and ``is_throttle``.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str | None = None,
        type: str | None = None,  # noqa: A002 - the API's own word
        param: str | None = None,
        suggestion: str | None = None,
        request_id: str | None = None,
        retry_after: float | None = None,
        from_api: bool = False,
        replayed: bool = False,
        retryable: bool | None = None,
        resendable: bool | None = None,
        may_have_been_accepted: bool | None = None,
        is_throttle: bool | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.type = type
        self.param = param
        self.suggestion = suggestion
        self.request_id = request_id
        self.retry_after = retry_after
        self.from_api = from_api
        self.replayed = replayed
        if retryable is not None:
            self.retryable = retryable
        if resendable is not None:
            self.resendable = resendable
        if may_have_been_accepted is not None:
            self.may_have_been_accepted = may_have_been_accepted
        if is_throttle is not None:
            self.is_throttle = is_throttle


class InvalidRequestError(APIStatusError):
    """400, and other refusals of the request itself: the API did not take it."""


class AuthenticationError(APIStatusError):
    """401: the API key is missing, wrong or revoked."""


class InsufficientCreditsError(APIStatusError):
    """402, or 429 with a quota code: the account or the key has nothing left to spend."""


class PermissionDeniedError(APIStatusError):
    """403: the key may not do this, e.g. use this model."""


class NotFoundError(APIStatusError):
    """404: an unknown or expired task, or an unknown model."""


class RequestTooLargeError(APIStatusError):
    """413: the request body is too large."""


class RateLimitError(APIStatusError):
    """429: too many requests; ``retry_after`` says when to come back."""

    retryable = True
    is_throttle = True


class ServerError(APIStatusError):
    """5xx: the API, its provider or a proxy failed."""

    retryable = True
    may_have_been_accepted = True


class InvalidResponseError(EvolinkError):
    """An answer arrived that is not what the API documents.

    Attributes:
        status: HTTP status code of that answer, None if it did not come over HTTP.
        head: The first characters of its body.
        request_id: The API's id for this exchange.
    """

    retryable = True
    may_have_been_accepted = True

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        head: str = "",
        request_id: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.head = head
        self.request_id = request_id


class SubmitUncertainError(EvolinkError):
    """A submit that may have been accepted, and paid for; its task id is not known.

    Nothing was resent. Ask again with the same key when you choose to, and the
    gateway answers a repeat with the first response instead of charging again::

        task = await session.submit(error.request, idempotency_key=error.idempotency_key)

    (Observed behaviour of the gateway; the API's page does not promise it.)
    `Session.list` shows the account's recent tasks.

    Attributes:
        request: The request that was sent.
        idempotency_key: The key it was sent with.
    """

    may_have_been_accepted = True

    def __init__(
        self, message: str, *, request: ImageRequest | RawRequest, idempotency_key: str
    ) -> None:
        super().__init__(message)
        self.request = request
        self.idempotency_key = idempotency_key


class TaskError(EvolinkError):
    """About one task. ``session.task(error.task_id)`` makes a handle of it again.

    Attributes:
        task_id: The task's id.
        snapshot: What was last read of it, None if it never was.
    """

    def __init__(self, message: str, *, task_id: str, snapshot: TaskSnapshot | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id
        self.snapshot = snapshot


class TaskFailedError(TaskError):
    """The generation failed. The API returns its reserved credits (observed, not documented).

    Attributes:
        code: The API's ``error.code``, e.g. ``"content_policy_violation"``;
            ``"unknown_error"`` if it gave none.
        reason: The API's own message, ``""`` if it gave none.
        retryable: True if submitting the same request again makes sense, by
            the API's table of task errors.
    """

    def __init__(
        self,
        message: str,
        *,
        task_id: str,
        snapshot: TaskSnapshot | None = None,
        code: str,
        reason: str = "",
        retryable: bool = False,
    ) -> None:
        super().__init__(message, task_id=task_id, snapshot=snapshot)
        self.code = code
        self.reason = reason
        self.retryable = retryable


class TaskCancelledError(TaskError):
    """The generation was cancelled on the server. Not an `asyncio.CancelledError`."""


class TaskTimeoutError(TaskError, TimeoutError):
    """The task did not end in time. It may still be running, and is still paid for."""


class SessionClosedError(EvolinkError):
    """The session was closed while, or before, this was asked of it.

    Attributes:
        task_id: The task that was being waited for, which goes on; None if there was none.
    """

    def __init__(self, message: str, *, task_id: str | None = None) -> None:
        super().__init__(message)
        self.task_id = task_id


class DownloadError(EvolinkError):
    """A result could not be saved; nothing was left under its final name.

    Attributes:
        url: The result's URL without its query, which may hold a signature.
        path: The file it was meant for, None if it had no name yet.
        status: HTTP status code of the result host, None if there was none.
        expired: True if the link seems to have passed its 24 hours.
        task_id: The task it belongs to, None if unknown.
        saved: Files of the same result that were saved nevertheless.
    """

    def __init__(
        self,
        message: str,
        *,
        url: str,
        path: Path | None = None,
        status: int | None = None,
        expired: bool = False,
        task_id: str | None = None,
        saved: tuple[Path, ...] = (),
        advice: str = "",
        way_past: str | None = None,
    ) -> None:
        self.advice = advice
        super().__init__(message)
        self.way_past = way_past
        self.saved = saved
        self.url = url
        self.path = path
        self.status = status
        self.expired = expired
        self.task_id = task_id


class LedgerError(EvolinkError):
    """A batch's ledger cannot be used: in use elsewhere, of a newer format, or damaged.

    Attributes:
        path: The ledger file.
    """

    def __init__(self, message: str, *, path: Path) -> None:
        super().__init__(message)
        self.path = path
