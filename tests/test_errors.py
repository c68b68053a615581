"""The tree of errors: one base, data kept through pickling and copying."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
from pathlib import Path
from typing import Any

import pytest

from evolink_async import ImageRequest, TaskSnapshot, errors
from evolink_async.errors import EvolinkError

SNAPSHOT = TaskSnapshot.from_json({"id": "task-1", "status": "failed"})
STATUS = {
    "status": 429,
    "code": "insufficient_quota",
    "type": "insufficient_quota_error",
    "param": "n",
    "suggestion": "top up",
    "request_id": "req-1",
    "retry_after": 7.5,
    "from_api": True,
    "replayed": True,
    "retryable": True,
    "resendable": True,
    "may_have_been_accepted": True,
    "is_throttle": True,
}
ADVICE = {"advice": "", "way_past": "validate"}
TASK = {"task_id": "task-1", "snapshot": SNAPSHOT}
# Every class with all the data it can carry, and the built-in errors it also is.
DATA: dict[type[EvolinkError], dict[str, Any]] = {
    errors.EvolinkError: {},
    errors.ConfigurationError: {"field": "n", **ADVICE},
    errors.RequestValidationError: {"field": "n", "value": 3, "allowed": "1, 2 or 4", **ADVICE},
    errors.APIConnectionError: {"sent": True},
    errors.APITimeoutError: {"sent": True},
    errors.APIStatusError: STATUS,
    errors.InvalidRequestError: STATUS,
    errors.AuthenticationError: STATUS,
    errors.InsufficientCreditsError: STATUS,
    errors.PermissionDeniedError: STATUS,
    errors.NotFoundError: STATUS,
    errors.RequestTooLargeError: STATUS,
    errors.RateLimitError: STATUS,
    errors.ServerError: STATUS,
    errors.InvalidResponseError: {"status": 200, "head": "<html>", "request_id": "req-1"},
    errors.SubmitUncertainError: {
        "request": ImageRequest("A lake", n=2, extra={"seed": 7}),
        "idempotency_key": "0123456789abcdef",
    },
    errors.TaskError: TASK,
    errors.TaskFailedError: {
        **TASK,
        "code": "service_error",
        "reason": "the provider is down",
        "retryable": True,
    },
    errors.TaskCancelledError: TASK,
    errors.TaskTimeoutError: TASK,
    errors.SessionClosedError: {"task_id": "task-1"},
    errors.DownloadError: {
        "url": "https://r.example/1.png",
        "path": Path("out/1.png"),
        "saved": (Path("out/2.png"),),
        "status": 403,
        "expired": True,
        "task_id": "task-1",
        **ADVICE,
    },
    errors.LedgerError: {"path": Path("ledger.db")},
}
# What follows from the data, and is an attribute as well.
DERIVED = {"sent": {"resendable": False, "may_have_been_accepted": True}}
every_error = pytest.mark.parametrize("kind", DATA, ids=lambda kind: kind.__name__)


def attributes(kind: type[EvolinkError]) -> dict[str, Any]:
    """The data of an error, and what follows from it."""
    data = DATA[kind]
    return data | {k: v for name in data for k, v in DERIVED.get(name, {}).items()}


def test_every_error_is_in_the_table() -> None:
    """The table of these tests has every error there is, and all of them are listed."""
    classes = {name for name, value in vars(errors).items() if inspect.isclass(value)}
    assert {kind.__name__ for kind in DATA} == set(errors.__all__) == classes - {"Any"}


def test_the_tree_is_as_drawn() -> None:
    """Each error has the parents that the module's docstring draws: its users catch it by them."""
    drawn: dict[str, list[str]] = {}
    path: list[tuple[int, str]] = [(0, "Exception")]
    line = r"^( {4,})(\w+Error)\b(?: \((\w+)\))?"
    for indent, name, builtin in re.findall(line, errors.__doc__ or "", re.MULTILINE):
        while path[-1][0] >= len(indent):
            path.pop()
        drawn[name] = [path[-1][1], *([builtin] if builtin else [])]
        path.append((len(indent), name))
    real = {kind.__name__: [base.__name__ for base in kind.__bases__] for kind in DATA}
    assert drawn == real


@every_error
def test_data_is_kept(kind: type[EvolinkError]) -> None:
    """What an error is made with are its attributes, and its text is the message."""
    error = kind("It went wrong.", **DATA[kind])
    assert str(error) == "It went wrong."
    assert vars(error) == attributes(kind)


@every_error
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_errors_survive_pickling(kind: type[EvolinkError], protocol: int) -> None:
    """Class, message, data and notes come back from a pickle."""
    error = kind("It went wrong.", **DATA[kind])
    error.add_note("while testing")
    again = pickle.loads(pickle.dumps(error, protocol))  # noqa: S301 - just made here
    assert type(again) is kind
    assert str(again) == "It went wrong."
    assert again.args == error.args
    assert vars(again) == {**attributes(kind), "__notes__": ["while testing"]}


@every_error
def test_errors_can_be_copied(kind: type[EvolinkError]) -> None:
    """A copy says the same and shares no attributes with the original."""
    error = kind("It went wrong.", **DATA[kind])
    for again in (copy.copy(error), copy.deepcopy(error)):
        assert type(again) is kind
        assert str(again) == str(error)
        assert repr(again) == repr(error)
        assert vars(again) == attributes(kind)
        again.add_note("only here")
        assert not hasattr(error, "__notes__")


@every_error
def test_data_is_passed_by_keyword(kind: type[EvolinkError]) -> None:
    """Only the message has a position, so that data can be added later."""
    first, *others = inspect.signature(kind).parameters.values()
    assert first.name == "message"
    assert all(other.kind is inspect.Parameter.KEYWORD_ONLY for other in others)
    assert {other.name for other in others} == set(DATA[kind])


@every_error
def test_data_is_documented(kind: type[EvolinkError]) -> None:
    """Each attribute is described by the class, or by the parent that has it."""
    documented = "".join(
        base.__doc__ or "" for base in kind.__mro__ if base.__module__ == errors.__name__
    )
    for name in DATA[kind]:
        assert re.search(rf"^ +{name}: ", documented, re.MULTILINE), name


def test_advice_ends_the_message() -> None:
    """A message says what to do last, so that a face can word that part itself."""
    error = errors.ConfigurationError("No key", advice="pass one", way_past="api_key")
    assert str(error) == "No key; pass one"
    assert error.problem == "No key"
    assert pickle.loads(pickle.dumps(error)).problem == "No key"  # noqa: S301 - just made here
    assert errors.ConfigurationError("No key").problem == "No key"
