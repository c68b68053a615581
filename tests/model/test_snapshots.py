"""Answers about tasks: read as documented, and of any other shape read safely."""

from __future__ import annotations

import json
import math
import pickle
from typing import Any

import pytest
from fuzz import from_json_gives_a_value_or_our_error, values_survive_json
from hypothesis import given
from strategies import READERS, Reader, examples, nested, values, values_for

from evolink_async import (
    Credits,
    GenerationResult,
    InvalidResponseError,
    TaskSnapshot,
    TaskSummary,
    Usage,
)
from evolink_async._model.json import parse_json
from evolink_async._model.snapshots import RESUBMITTABLE, RUNNING, TERMINAL

HUGE = pytest.param(10**5000, id="huge")  # Python refuses to show it

# The 200 answer of the contract page, letter for letter.
SUBMITTED = {
    "created": 1757156493,
    "id": "task-unified-1757156493-imcg5zqt",
    "model": "wan2.5-text-to-image",
    "object": "image.generation.task",
    "progress": 0,
    "status": "pending",
    "task_info": {"can_cancel": True, "estimated_time": 30},
    "type": "image",
    "usage": {"billing_rule": "per_call", "credits_reserved": 1, "user_group": "default"},
}


# -- snapshots ---------------------------------------------------------------------------------


def test_the_documented_answer_is_read() -> None:
    """Each field of the contract page's example is where it belongs."""
    snapshot = TaskSnapshot.from_json(SUBMITTED)
    assert snapshot.id == "task-unified-1757156493-imcg5zqt"
    assert (snapshot.status, snapshot.progress, snapshot.is_terminal) == ("pending", 0, False)
    assert (snapshot.model, snapshot.type) == ("wan2.5-text-to-image", "image")
    assert (snapshot.created, snapshot.estimated_time) == (1757156493, 30)
    assert snapshot.usage == Usage(
        credits_reserved=1, billing_rule="per_call", user_group="default"
    )
    assert (snapshot.urls, snapshot.duration) == ((), None)
    assert (snapshot.error_code, snapshot.error_message) == (None, None)
    assert snapshot.raw == SUBMITTED


@pytest.mark.parametrize("said", [-0.1, 1.1e9, 1e308, math.nan, math.inf, True, "1"])
def test_what_cannot_be_a_cost_counts_as_not_said(said: object) -> None:
    """A negative or absurd cost would falsify every total."""
    given = {"credits_reserved": said, "credits_used": said, "cost": said}
    assert Usage.from_json(given) == Usage()


def test_the_end_of_a_task_is_read() -> None:
    """Results, duration and final cost of a completed task; code and message of a failed one."""
    done = TaskSnapshot.from_json(
        SUBMITTED
        | {
            "status": "completed",
            "progress": 100,
            "results": ["https://r.example/1.png", "https://r.example/2.png"],
            "duration": 12.5,
            "usage": {"credits_used": 0.5, "cost": 0.04},
        }
    )
    assert (done.is_terminal, done.progress, done.duration) == (True, 100, 12.5)
    assert done.urls == ("https://r.example/1.png", "https://r.example/2.png")
    assert (done.usage.credits_used, done.usage.cost) == (0.5, 0.04)
    result = GenerationResult.from_snapshot(done)
    assert (result.task_id, result.urls) == (done.id, done.urls)
    assert (result.model, result.usage, result.duration) == (done.model, done.usage, 12.5)
    failed = TaskSnapshot.from_json(
        SUBMITTED | {"status": "failed", "error": {"code": "service_error", "message": "later"}}
    )
    assert (failed.error_code, failed.error_message) == ("service_error", "later")


def test_the_words_for_states() -> None:
    """The documented states, and the task errors after which a repeat makes sense."""
    assert {"pending", "processing"} == RUNNING
    assert {"completed", "failed", "cancelled"} == TERMINAL
    assert {
        "generation_timeout",
        "service_error",
        "service_unavailable",
        "resource_exhausted",
        "quota_exceeded",
    } == RESUBMITTABLE


def test_an_unknown_status_counts_as_running() -> None:
    """A state the API has added since is kept, and does not end a wait."""
    snapshot = TaskSnapshot.from_json({"id": "task-1", "status": "dreaming", "mood": "calm"})
    assert (snapshot.status, snapshot.is_terminal) == ("dreaming", False)
    assert snapshot.raw["mood"] == "calm"


@pytest.mark.parametrize(
    ("given_progress", "progress"),
    [
        *((0, 0), (100, 100), (55.4, 55), (99.9, 100), (0.0, 0)),
        *((-1, None), (101, None), (100.1, None), (math.nan, None), (math.inf, None)),
        *((True, None), ("50", None), (None, None), (10**400, None), ([], None)),
    ],
    ids=range(15),
)
def test_progress_is_0_to_100_or_unknown(given_progress: object, progress: int | None) -> None:
    """Progress of another type or range reads as unknown."""
    value = {"id": "task-1", "status": "processing", "progress": given_progress}
    assert TaskSnapshot.from_json(value).progress == progress


@pytest.mark.parametrize(
    ("value", "links"),
    [
        ({"results": ["a", "", 5, None, "b"]}, ("a", "b")),
        ({"results": "https://not.a/list"}, ()),
        ({"results": []}, ()),
        (
            {"result_data": [{"image_url": "a"}, {"video_url": "b"}, {"audio_url": "c"}]},
            ("a", "b", "c"),
        ),
        ({"results": [], "result_data": [{"url": "a"}, 5, {"image_url": 7}]}, ("a",)),
        ({"results": ["a"], "result_data": [{"image_url": "b"}]}, ("a",)),
        ({"result_data": {"image_url": "a"}}, ()),
    ],
    ids=range(7),
)
def test_result_links(value: dict[str, Any], links: tuple[str, ...]) -> None:
    """Links are the texts among the results; result_data only where there are none."""
    assert TaskSnapshot.from_json({"id": "task-1", "status": "completed", **value}).urls == links


@pytest.mark.parametrize(
    ("error", "code"),
    [
        *(({"code": "x"}, "x"), ({"code": 429}, "429"), ({"code": ""}, None)),
        *(({"code": True}, None), ({"code": None}, None), ({}, None)),
        *((None, None), ("text", None), ([], None)),
    ],
)
def test_codes_of_failed_tasks(error: object, code: str | None) -> None:
    """A code may be a word or a number; anything else is none."""
    snapshot = TaskSnapshot.from_json({"id": "task-1", "status": "failed", "error": error})
    assert snapshot.error_code == code


@pytest.mark.parametrize(
    "value",
    [
        *(None, [], "task-1", 5, True, {}),
        *({"id": "task-1"}, {"id": "task-1", "status": ""}, {"id": "task-1", "status": 5}),
        *({"status": "pending"}, {"id": "", "status": "pending"}, {"id": 5, "status": "pending"}),
        *({"id": "../../etc", "status": "x"}, {"id": "....", "status": "x"}),
        {"id": "task-1", "status": "x", "deep": nested(5000, objects=True)},
        {"id": "task-1", "status": "x", "deep": nested(150, objects=False)},
        {"id": "task-1", "status": "x", "huge": 10**5000},
        {"error": {"code": 500, "message": "an error under HTTP 200"}},
    ],
    ids=range(18),
)
def test_what_is_not_a_task(value: object) -> None:
    """Without a usable id and status, or too deep to be kept, it is no task."""
    with pytest.raises(InvalidResponseError) as caught:
        TaskSnapshot.from_json(value)
    assert len(str(caught.value)) < 300


def test_a_status_may_be_assumed() -> None:
    """A task without a status is read if the caller says what to assume."""
    snapshot = TaskSnapshot.from_json({"id": "task-1", "status": None}, status="pending")
    assert snapshot.status == "pending"


def test_snapshots_are_compared_by_what_they_say() -> None:
    """White space and charset of a body make no difference; any value does."""
    value = {"id": "task-1", "status": "pending", "name": "호수", "odd": math.nan}
    compact = TaskSnapshot.from_json(value)
    spaced = TaskSnapshot.from_json(value, body=json.dumps(value, indent=2).encode("utf-16"))
    assert compact == spaced
    assert hash(compact) == hash(spaced)
    assert compact != TaskSnapshot.from_json(value | {"name": "lake"})
    assert pickle.loads(pickle.dumps(spaced)) == compact  # noqa: S301 - just made here


def test_raw_is_nobody_elses() -> None:
    """Changing one caller's parsed body changes nothing for the next."""
    snapshot = TaskSnapshot.from_json(SUBMITTED)
    snapshot.raw["usage"]["credits_reserved"] = 99
    assert snapshot.usage.credits_reserved == 1


# -- other answers -----------------------------------------------------------------------------


def test_credits_are_read() -> None:
    """The documented example is read, and given back in the same shape."""
    answer = {
        "success": True,
        "message": "",
        "data": {
            "user": {"remaining_credits": 1095.39, "used_credits": 135.9},
            "token": {
                "remaining_credits": 99416.44,
                "used_credits": 583.55,
                "unlimited_credits": False,
            },
        },
    }
    left = Credits.from_json(answer)
    assert (left.remaining, left.used) == (1095.39, 135.9)
    assert (left.token_remaining, left.token_used, left.token_unlimited) == (
        99416.44,
        583.55,
        False,
    )
    assert left.to_json() == {"data": answer["data"]}


@pytest.mark.parametrize("remaining", [None, "5", True, math.nan, math.inf, [], 10**400])
def test_credits_must_say_what_is_left(remaining: object) -> None:
    """An answer without a finite number of credits is not one."""
    with pytest.raises(InvalidResponseError, match="credits remain"):
        Credits.from_json({"data": {"user": {"remaining_credits": remaining}}})


def test_a_row_of_the_task_list_is_read() -> None:
    """Each observed field of a row is where it belongs."""
    row = {
        "id": "task-1",
        "model": "m",
        "type": "image",
        "status": "completed",
        "progress": 100,
        "created_at": 1757156493,
        "duration": 12,
        "has_results": True,
        "result_count": 2,
        "has_error": False,
        "credits_used": 0.5,
    }
    summary = TaskSummary.from_json(row)
    assert (summary.id, summary.status, summary.model, summary.type) == (
        *("task-1", "completed", "m"),
        "image",
    )
    assert (summary.progress, summary.created, summary.duration) == (100, 1757156493, 12)
    assert (summary.result_count, summary.credits_used) == (2, 0.5)
    assert summary.to_json() == row


@pytest.mark.parametrize("row", [None, {}, {"id": "task-1"}, {"id": "/", "status": "x"}, [], "x"])
def test_what_is_not_a_row(row: object) -> None:
    """A row without a usable id or status is refused."""
    with pytest.raises(InvalidResponseError):
        TaskSummary.from_json(row)


def test_nesting_that_is_still_read() -> None:
    """A hundred levels are read; a value from that deep can be parsed far down a call stack."""
    body = b"[" * 101 + b"]" * 101
    assert parse_json(body)
    value = b'{"id":"task-1","status":"x","d":' + b"[" * 99 + b"]" * 99 + b"}"
    snapshot = TaskSnapshot.from_json(parse_json(value), body=value)

    def deep_in_the_stack(levels: int) -> object:
        return snapshot.raw if levels == 0 else deep_in_the_stack(levels - 1)

    assert deep_in_the_stack(500) == json.loads(value)


# -- any JSON ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", READERS, ids=lambda reader: reader.name)
def test_any_json_gives_a_value_or_our_error(reader: Reader) -> None:
    """Every from_json gives a usable value or an EvolinkError, whatever JSON it is handed."""

    @examples(850)
    @given(values_for(reader.name))
    def check(value: object) -> None:
        from_json_gives_a_value_or_our_error(reader, value)

    check()


@examples(1200)
@given(values)
def test_values_survive_json(value: Any) -> None:
    """from_json(to_json(x)) == x for every value class."""
    values_survive_json(value)
