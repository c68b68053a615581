"""What is sent where, and what every answer means: the API's table of errors, spelled out."""

from __future__ import annotations

import itertools
import json
import math
import uuid
from collections.abc import Mapping
from typing import Any

import pytest
from fuzz import decipher_gives_a_value_or_our_error
from hypothesis import given
from strategies import bodies, examples, headers, statuses

from evolink_async import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    ConfigurationError,
    EvolinkError,
    InsufficientCreditsError,
    InvalidRequestError,
    InvalidResponseError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    RequestValidationError,
    ServerError,
)
from evolink_async._http.protocol import (
    BATCH_LIMIT,
    BATCH_PATH,
    CREDITS_PATH,
    TASKS_PATH,
    Submit,
    check_idempotency_key,
    decipher,
    encode,
    is_quota,
    new_idempotency_key,
    task_path,
)

REFUSED, RESEND, UNCERTAIN = Submit.REFUSED, Submit.RESEND, Submit.UNCERTAIN


def meaning(error: EvolinkError) -> tuple[bool, Submit]:
    """May a read be tried again, and what became of a submit."""
    assert not (error.resendable and error.may_have_been_accepted)
    fate = RESEND if error.resendable else REFUSED
    return error.retryable, UNCERTAIN if error.may_have_been_accepted else fate


YES, NO = True, False
API, PAGE = "the API's JSON error object", "something else"
PAGES = (b"", b"<html>503</html>", b"{}", b"[]", b'{"error": "no"}', b'{"message": "no"}', b"\xff")


def error_body(code: object = None, **more: Any) -> bytes:
    """The API's documented error object."""
    error = {"code": code, "message": "It went wrong.", "type": "some_error", **more}
    return json.dumps({"error": error}).encode()


def error_of(
    status: int, body: bytes = b"", headers: Mapping[str, str] | None = None
) -> APIStatusError:
    """The error an answer is deciphered to."""
    with pytest.raises(APIStatusError) as caught:
        decipher(status, headers or {}, body)
    return caught.value


# status, whose body, code, class, may a read be retried, what became of a submit
TABLE: list[tuple[int, str, object, type[EvolinkError], bool, Submit]] = [
    (400, API, 400, InvalidRequestError, NO, REFUSED),
    (400, PAGE, None, InvalidRequestError, NO, REFUSED),
    (401, API, 401, AuthenticationError, NO, REFUSED),
    (402, API, 402, InsufficientCreditsError, NO, REFUSED),
    (402, API, "insufficient_quota", InsufficientCreditsError, NO, REFUSED),
    (402, PAGE, None, InsufficientCreditsError, NO, REFUSED),
    (429, API, "insufficient_quota", InsufficientCreditsError, NO, REFUSED),
    (429, API, "key_daily_quota_exhausted", InsufficientCreditsError, NO, REFUSED),
    (403, API, 403, PermissionDeniedError, NO, REFUSED),
    (403, API, "key_model_not_allowed", PermissionDeniedError, NO, REFUSED),
    (404, API, 404, NotFoundError, NO, REFUSED),
    (413, API, 413, RequestTooLargeError, NO, REFUSED),
    (413, PAGE, None, RequestTooLargeError, NO, REFUSED),
    (429, API, 429, RateLimitError, YES, RESEND),
    (429, API, "no_available_channel", RateLimitError, YES, RESEND),
    (503, API, 503, ServerError, YES, RESEND),
    (503, API, "no_available_channel", ServerError, YES, RESEND),
    (503, PAGE, None, ServerError, YES, UNCERTAIN),
    (500, API, 500, ServerError, YES, UNCERTAIN),
    (500, PAGE, None, ServerError, YES, UNCERTAIN),
    (502, API, 502, ServerError, YES, UNCERTAIN),
    (502, PAGE, None, ServerError, YES, UNCERTAIN),
    (408, API, 408, ServerError, YES, UNCERTAIN),
    (408, PAGE, None, ServerError, YES, UNCERTAIN),
    (504, API, 504, ServerError, YES, UNCERTAIN),
    (504, PAGE, None, ServerError, YES, UNCERTAIN),
    *((status, PAGE, None, ServerError, YES, UNCERTAIN) for status in range(520, 530)),
    (501, API, 501, ServerError, YES, UNCERTAIN),
    (599, PAGE, None, ServerError, YES, UNCERTAIN),
    (405, PAGE, None, InvalidRequestError, NO, REFUSED),
    (409, API, "idempotency_conflict", InvalidRequestError, NO, REFUSED),
    (418, PAGE, None, InvalidRequestError, NO, REFUSED),
    (422, API, 422, InvalidRequestError, NO, REFUSED),
    (425, PAGE, None, InvalidRequestError, NO, REFUSED),
    (300, PAGE, None, APIStatusError, NO, UNCERTAIN),
    (301, PAGE, None, APIStatusError, NO, UNCERTAIN),
    (302, API, 302, APIStatusError, NO, UNCERTAIN),
    (307, PAGE, None, APIStatusError, NO, UNCERTAIN),
    (308, PAGE, None, APIStatusError, NO, UNCERTAIN),
    (399, PAGE, None, APIStatusError, NO, UNCERTAIN),
    # Beside the table: what a proxy says of the key or the task is not the API's last word.
    (401, PAGE, None, AuthenticationError, YES, REFUSED),
    (403, PAGE, None, PermissionDeniedError, YES, REFUSED),
    (404, PAGE, None, NotFoundError, YES, REFUSED),
    # A status HTTP does not have says nothing.
    (0, PAGE, None, ServerError, YES, UNCERTAIN),
    (100, PAGE, None, ServerError, YES, UNCERTAIN),
    (600, PAGE, None, ServerError, YES, UNCERTAIN),
]


@pytest.mark.parametrize(("status", "whose", "code", "kind", "read", "fate"), TABLE)
def test_the_table_of_answers(
    *, status: int, whose: str, code: object, kind: type[EvolinkError], read: bool, fate: Submit
) -> None:
    """Each answer has its class, says whether a read is retried, and what became of a submit."""
    for body in (error_body(code),) if whose is API else PAGES:
        error = error_of(status, body)
        assert type(error) is kind
        assert meaning(error) == (read, fate)
        assert error.status == status
        assert error.from_api is (whose is API)


def test_a_rate_limit_page_of_a_proxy_is_retried_by_reads_only() -> None:
    """A 429 that is not the API's own is an "other 4xx" to a submit, and passing to a read."""
    error = error_of(429, b"<html>slow down</html>")
    assert type(error) is RateLimitError
    assert meaning(error) == (YES, REFUSED)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"", "not JSON"),
        (b"<html>", "not JSON"),
        (b'{"id": "task-1", "status"', "not JSON"),
        (b"\xff", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[" * 500 + b"]" * 500, "nested"),
    ],
    ids=range(6),
)
@pytest.mark.parametrize("status", [200, 201, 204, 299])
def test_a_success_without_json_is_uncertain(status: int, body: bytes, text: str) -> None:
    """A 2xx whose body cannot be used: a read is retried, a submit was probably paid for."""
    with pytest.raises(InvalidResponseError, match=text) as caught:
        decipher(status, {"X-Request-Id": "req-1"}, body)
    assert meaning(caught.value) == (YES, UNCERTAIN)
    assert (caught.value.status, caught.value.request_id) == (status, "req-1")
    assert str(caught.value).startswith(f"HTTP {status}, but ")


def test_a_success_is_its_json() -> None:
    """A 2xx gives the body's JSON, whatever it is; its reader decides whether it will do."""
    assert decipher(200, {}, b'{"id": "task-1"}') == {"id": "task-1"}
    assert decipher(201, {}, b"null") is None
    assert decipher(200, {}, error_body(500))["error"]["code"] == 500


@pytest.mark.parametrize(
    ("status", "told", "throttle"),
    [
        (429, {}, True),
        (503, {}, True),
        (503, {"code": "no_available_channel"}, True),
        (429, {"code": "insufficient_quota"}, False),
        (429, {"type": "insufficient_quota_error"}, False),
        (402, {}, False),
        (500, {}, False),
    ],
    ids=str,
)
@pytest.mark.parametrize("from_api", [True, False])
def test_what_asks_the_session_to_wait(
    *, status: int, told: dict[str, str], throttle: bool, from_api: bool
) -> None:
    """429 and 503 do, whoever says so, unless the API's code is that the quota is used up."""
    body = json.dumps({"error": {"message": "no", **told}}) if from_api else "no"
    with pytest.raises(APIStatusError) as caught:
        decipher(status, {}, body.encode())
    assert caught.value.is_throttle is (throttle or (status == 429 and not from_api))


NO_ANSWER: list[tuple[EvolinkError, bool, Submit]] = [
    (APIConnectionError("refused", sent=False), YES, RESEND),
    (APITimeoutError("no connection", sent=False), YES, RESEND),
    (APIConnectionError("broken", sent=True), YES, UNCERTAIN),
    (APITimeoutError("no answer", sent=True), YES, UNCERTAIN),
    (ConfigurationError("a setting"), NO, REFUSED),
]


@pytest.mark.parametrize(("error", "read", "fate"), NO_ANSWER, ids=str)
def test_the_table_where_no_answer_came(*, error: EvolinkError, read: bool, fate: Submit) -> None:
    """A submit that never left may be resent; one that may have arrived is uncertain."""
    assert meaning(error) == (read, fate)


@pytest.mark.parametrize(
    ("code", "quota"),
    [
        ("insufficient_quota", True),
        ("key_daily_quota_exhausted", True),
        ("quota_exceeded", True),
        ("429", False),
        ("rate_limit", False),
        (None, False),
    ],
)
def test_quota_codes(*, code: str | None, quota: bool) -> None:
    """A code with quota in it means that nothing is left, not that we are too fast."""
    assert is_quota(code) is quota


# -- what an error carries ---------------------------------------------------------------------


def test_the_documented_error_is_read() -> None:
    """Each field of the API's error object and the headers reaches the error."""
    body = json.dumps(
        {
            "error": {
                "code": 429,
                "message": "Too many requests.",
                "type": "rate_limit_error",
                "param": "model",
                "fallback_suggestion": "retry after 60 seconds",
            }
        }
    ).encode()
    given_headers = {
        "Retry-After": "60",
        "X-Request-Id": "req-7",
        "Idempotency-Replayed": "true",
    }
    error = error_of(429, body, given_headers)
    assert (error.status, error.code, error.type) == (429, "429", "rate_limit_error")
    assert (error.param, error.suggestion) == ("model", "retry after 60 seconds")
    assert (error.retry_after, error.request_id) == (60, "req-7")
    assert error.replayed
    assert str(error) == "HTTP 429: Too many requests.; retry after 60 seconds"


def test_a_named_code_is_shown() -> None:
    """A code that says more than the status stands in the message."""
    assert str(error_of(429, error_body("no_available_channel"))).startswith(
        "HTTP 429 (no_available_channel): It went wrong."
    )


@pytest.mark.parametrize(
    ("status", "advice"), [(401, "EVOLINK_API_KEY"), (402, "top up"), (403, "permissions")]
)
def test_an_error_says_what_to_do(status: int, advice: str) -> None:
    """Where the API suggests nothing, the message does."""
    assert advice in str(error_of(status, error_body(status)))


def test_a_page_is_shown_by_its_head() -> None:
    """A body that is not the API's is quoted, cut and without control characters."""
    error = error_of(502, b"<html>\x1b[31m" + b"x" * 500)
    assert str(error).startswith("HTTP 502: not the API's own answer: <html> [31mxxx")
    assert len(str(error)) < 200
    assert str(error_of(502)) == "HTTP 502: empty answer"


def test_server_text_is_harmless() -> None:
    """Control characters in any field of an error are gone before anybody sees them."""
    evil = "\x1b]0;owned\x07\u202e"
    body = error_body(evil, message=evil, type=evil, param=evil, fallback_suggestion=evil)
    error = error_of(400, body, {"X-Request-Id": evil})
    for text in (error.code, error.type, error.param, error.suggestion, error.request_id):
        assert text == " ]0;owned  "
    assert "\x1b" not in str(error)


@pytest.mark.parametrize(
    "error",
    [
        *(None, [], "text", 5, {}, {"code": None, "message": ""}, {"type": "x"}),
        *({"code": []}, {"message": {}}, {"code": True}, {"code": "", "message": 0.5}),
    ],
    ids=range(11),
)
def test_what_is_not_the_apis_error(error: object) -> None:
    """An error without a usable code or message is not known to be the API's."""
    found = error_of(503, json.dumps({"error": error}).encode())
    assert not found.from_api
    assert meaning(found)[1] is UNCERTAIN


@pytest.mark.parametrize("error", [{"message": "Busy."}, {"code": "busy"}, {"code": 0}])
def test_an_error_with_a_code_or_a_message_is_the_apis(error: dict[str, Any]) -> None:
    """Either of the two documented fields is enough."""
    assert error_of(503, json.dumps({"error": error}).encode()).from_api


@pytest.mark.parametrize("value", [[], {}, True, 1.5, None, ""])
def test_fields_of_other_types_read_as_absent(value: object) -> None:
    """One field of an unexpected type costs that field and nothing else."""
    found = error_of(400, error_body(value, type=value, param=value, fallback_suggestion=value))
    assert (found.code, found.type, found.param, found.suggestion) == (None,) * 4
    assert "It went wrong." in str(found)


def test_the_other_request_id_header() -> None:
    """The gateway's second spelling of the request id is read where the first is missing."""
    assert error_of(500, headers={"X-Oneapi-Request-Id": "one"}).request_id == "one"
    both = {"X-Request-Id": "two", "X-Oneapi-Request-Id": "one"}
    assert error_of(500, headers=both).request_id == "two"
    assert error_of(500).request_id is None


@pytest.mark.parametrize(
    ("given_value", "seconds"),
    [
        *(("60", 60.0), ("0", 0.0), ("1.5", 1.5), (" 7 ", 7.0), ("-5", 0.0), ("86400", 86400.0)),
        *(("nan", None), ("inf", None), ("1e999", None), ("", None), ("soon", None)),
        *(("Wed, 21 Oct 2015 07:28:30 GMT", 30.0), ("Wed, 21 Oct 2015 07:27:00 GMT", 0.0)),
        *(("Wed, 99 Oct 2015 07:28:00 GMT", None), ("21 Oct", None)),
    ],
)
def test_retry_after(given_value: str, seconds: float | None) -> None:
    """Seconds, or a date read against the answer's own Date; nonsense is as if it were absent."""
    given_headers = {"Retry-After": given_value, "Date": "Wed, 21 Oct 2015 07:28:00 GMT"}
    assert error_of(429, headers=given_headers).retry_after == seconds


@pytest.mark.parametrize("date", [None, "", "yesterday"])
def test_a_retry_after_date_without_a_date(date: str | None) -> None:
    """Without a usable Date of the answer, its Retry-After is read against our own clock."""
    given_headers = {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}
    if date is not None:
        given_headers["Date"] = date
    seconds = error_of(503, headers=given_headers).retry_after
    assert seconds is not None
    assert 1e8 < seconds < 3e9


@pytest.mark.parametrize("value", ["true", "True", "TRUE"])
def test_a_replayed_answer(value: str) -> None:
    """The gateway's repeat of its first answer is marked as one."""
    assert error_of(429, error_body(429), {"Idempotency-Replayed": value}).replayed
    assert not error_of(429, error_body(429), {"Idempotency-Replayed": "false"}).replayed
    assert not error_of(429, error_body(429)).replayed


@examples(4100)
@given(statuses, headers, bodies)
def test_any_answer_gives_a_value_or_our_error(
    status: int, headers: Mapping[str, str], body: bytes
) -> None:
    """Any status, headers and bytes give JSON or an EvolinkError the table has a row for."""
    decipher_gives_a_value_or_our_error(status, headers, body)


# -- what is sent ------------------------------------------------------------------------------


def test_where_things_are() -> None:
    """The endpoints are those of the API's pages."""
    assert (TASKS_PATH, CREDITS_PATH) == ("/v1/tasks", "/v1/credits")
    assert (BATCH_PATH, BATCH_LIMIT) == ("/v1/tasks/batch", 50)
    assert task_path("task-unified-1:a.b_c") == "/v1/tasks/task-unified-1:a.b_c"


def test_a_body_is_compact_json() -> None:
    """Bodies are ASCII JSON without white space; what JSON cannot say is not sent."""
    assert encode({"prompt": "호수", "n": 1}) == b'{"prompt":"\\ud638\\uc218","n":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        encode({"a": math.nan})


def test_new_keys_are_new_and_taken() -> None:
    """Every logical submit gets a key of its own that the gateway takes."""
    keys = {new_idempotency_key() for _ in range(100)}
    assert len(keys) == 100
    assert all(check_idempotency_key(key) == key for key in keys)


@pytest.mark.parametrize("key", ["x" * 16, "y" * 96, "A-Z.a_z-0123456789", str(uuid.UUID(int=0))])
def test_keys_the_gateway_takes(key: str) -> None:
    """16 to 96 characters of its alphabet."""
    assert check_idempotency_key(key) == key


@pytest.mark.parametrize(
    "key",
    [
        *("x" * 15, "x" * 97, "", "x" * 16 + "\n", "x" * 16 + " ", "x:" * 8, "ключ" * 4),
        *(None, 1234567890123456, b"x" * 16, 10**5000),
    ],
    ids=range(11),
)
def test_keys_the_gateway_would_refuse(key: object) -> None:
    """Other keys are refused before anything is sent."""
    with pytest.raises(RequestValidationError) as caught:
        check_idempotency_key(key)
    assert caught.value.field == "idempotency_key"


def test_the_table_has_no_contradiction() -> None:
    """No answer is listed above twice with different meanings."""
    rows = sorted(TABLE, key=lambda row: (row[0], row[1], str(row[2])))
    for one, two in itertools.pairwise(rows):
        if one[:3] == two[:3]:
            assert one == two
