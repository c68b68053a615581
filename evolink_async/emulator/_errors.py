"""The API's error answers: one exception, and the JSON it becomes."""

from __future__ import annotations

from typing import Any

from attrs import define, field

__all__ = ["ApiError"]

# status -> (type, string code, suggestion), after docs.evolink.ai "error codes".
_KINDS = {
    400: ("invalid_request_error", "invalid_request", "correct the request and send it again"),
    401: ("authentication_error", "invalid_api_key", "check the API key"),
    402: ("insufficient_quota_error", "insufficient_quota", "top up the account"),
    403: ("permission_error", "permission_denied", "ask for access"),
    404: ("not_found_error", "not_found", "check the id or the model name"),
    405: ("invalid_request_error", "method_not_allowed", "use another method"),
    409: ("invalid_request_error", "conflict", "use a new Idempotency-Key"),
    413: ("request_too_large_error", "request_too_large", "send a smaller body"),
    429: ("rate_limit_error", "rate_limit_exceeded", "retry after {retry_after} seconds"),
    500: ("internal_server_error", "internal_error", "try again later"),
    502: ("upstream_error", "upstream_error", "try again later"),
    503: ("service_unavailable_error", "service_unavailable", "retry after {retry_after} seconds"),
}


@define
class ApiError(Exception):
    """An answer other than 200.

    Attributes:
        status: The HTTP status; its documented ``type`` and ``code`` follow from it.
        message: The text for people.
        param: The field that is wrong.
        code: A string code instead of the status's own; always sent as it is, because
            codes of this kind exist only as strings.
        kind: The ``type``, if it is not the one that goes with *status*.
        retry_after: Seconds for the ``Retry-After`` header.
    """

    status: int
    message: str
    param: str | None = field(default=None, kw_only=True)
    code: str | None = field(default=None, kw_only=True)
    kind: str | None = field(default=None, kw_only=True)
    retry_after: float | None = field(default=None, kw_only=True)

    def body(self, *, string_codes: bool = False) -> dict[str, Any]:
        """The JSON body; ``code`` is the status unless *string_codes* or a code of its own."""
        kind, word, suggestion = _KINDS.get(self.status, ("api_error", "error", "try again later"))
        error: dict[str, Any] = {
            "code": self.code or (word if string_codes else self.status),
            "message": self.message,
            "type": self.kind or kind,
            "fallback_suggestion": suggestion.format(
                retry_after=60 if self.retry_after is None else f"{self.retry_after:.15g}"
            ),
        }
        if self.param is not None:
            error["param"] = self.param
        return {"error": error}
