"""Which values faults and settings take, and how all others are refused."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Coroutine, Iterator
from typing import Any

import aiohttp
import pytest
from attrs import evolve, fields
from emulator_caller import Answer, Caller, calling

from evolink_async.emulator import FEATURES, Emulator, ManualClock, RealClock, faults
from evolink_async.emulator._rules import Rule
from evolink_async.emulator.faults import (
    CallbackDelayed,
    CallbackDuplicated,
    CallbackForged,
    Endless,
    Fault,
    FewerResults,
    Garbled,
    Latency,
    NotAPicture,
    Outage,
    RateLimit,
    RequestFault,
    Reset,
    SlowDrip,
    Status,
    TaskCancelled,
    TaskFails,
    TaskHangs,
    TaskLags,
    TaskVanishes,
    Truncated,
    UnknownStatus,
    WrongLength,
)

KINDS = faults.kinds()
SHARED = {each.name for each in fields(Fault)}
NEVER: tuple[Any, ...] = (
    b"x", {}, [[]], {"a": 1}, 1j, object(), math.nan, math.inf, -math.inf, -(10**18), 10**400,
    [None], [True], Status, len,
)  # fmt: skip
JSON = (
    "null", "true", "-1", "0", "1", "0.5", "99999", "1e308", "1e999", "-1e999", "NaN", '""',
    '"x"', r'"a\r\nSet-Cookie: b"', r'"\u0000"', r'"\ud800"', '"\xe4"', "[]", "[1, 2]", "{}",
    '["read", 1]', "1" * 400,
)  # fmt: skip


def every_field() -> Iterator[Any]:
    """Each field of each fault; the common ones on a few faults only."""
    for name, kind in KINDS.items():
        for each in fields(kind):
            if each.name not in SHARED or name in {"Status", "TaskFails", "CallbackDropped"}:
                yield pytest.param(kind, each.name, id=f"{name}-{each.name}")


def test_every_field_has_a_rule() -> None:
    """Every field of every fault has a validator."""
    for kind in KINDS.values():
        assert [each.name for each in fields(kind) if not isinstance(each.validator, Rule)] == []


@pytest.mark.parametrize(("kind", "field"), tuple(every_field()))
def test_what_no_field_may_be_is_refused(kind: type[Fault], field: str) -> None:
    """Wrong types and numbers out of bounds are refused, naming the field and the rule."""
    for value in NEVER:
        with pytest.raises(
            ValueError, match=rf"^{kind.__name__}: {field} must be .+, not "
        ) as info:
            kind(**{field: value})
        assert len(str(info.value)) < 400


@pytest.mark.parametrize(
    ("kind", "name", "value", "words"),
    [
        (Status, "route", "everywhere", "one or several of submit, read"),
        (Status, "route", (), "one or several of"),
        (Status, "task", "", "a text that is not empty, or None"),
        (Status, "prompt", "", "a text that is not empty, or None"),
        (Status, "nth", 0, "a whole number from 1 to 1000000000, or several"),
        (Status, "nth", (), "a whole number from 1"),
        (Status, "nth", (1, 2.0), "a whole number from 1"),
        (Status, "times", 0, "a whole number from 1"),
        (Status, "times", True, "a whole number from 1"),
        (Status, "rate", 1.5, "a number from 0 to 1"),
        (Status, "rate", None, "a number from 0 to 1"),
        (Status, "between", 5, "two numbers of seconds"),
        (Status, "between", (1, None), "two numbers of seconds"),
        (Status, "between", (1, 2, 3), "two numbers of seconds"),
        (Status, "between", (20, 10), "the second above the first"),
        (Status, "between", (0, math.inf), "two numbers of seconds"),
        (Status, "status", 99999, "a whole number from 200 to 599"),
        (Status, "status", 100, "a whole number from 200 to 599"),
        (Status, "status", "503", "a whole number from 200 to 599"),
        (Status, "message", None, "a text"),
        (Status, "code", "", "a text that is not empty"),
        (Status, "kind", 1, "a text that is not empty"),
        (Status, "retry_after", -1, r"a number from 0 to 1e\+10, or None"),
        (Status, "retry_after", True, "a number from 0"),
        (Status, "as_date", 1, "True or False"),
        (Status, "body", "\ud800", "a text that UTF-8 can encode"),
        (Status, "location", "/a\r\nSet-Cookie: b", "printable ASCII without blanks"),
        (Status, "location", "/\xe4", "printable ASCII without blanks"),
        (Status, "processed", "no", "True or False"),
        (Latency, "seconds", -0.1, "a number from 0 to 86400"),
        (Latency, "when", "during", "'before' or 'after'"),
        (Reset, "when", "never", "'before' or 'during' or 'after'"),
        (Truncated, "at", 1.5, "a whole number"),
        (WrongLength, "by", "1", "a whole number"),
        (Garbled, "body", "\udfff", "a text that UTF-8 can encode"),
        (SlowDrip, "chunk", 0, "a whole number from 1"),
        (SlowDrip, "pause", math.inf, "a number from 0 to 86400"),
        (NotAPicture, "content_type", "image/png\r\nA: b", "a media type such as image/png"),
        (NotAPicture, "content_type", "picture", "a media type such as image/png"),
        (RateLimit, "requests", -1, "a whole number from 0"),
        (RateLimit, "per", 0, "a number above 0"),
        (Outage, "start", -1, "a number from 0"),
        (Outage, "seconds", 0, "a number above 0"),
        (Outage, "status", 0, "a whole number from 200 to 599, or None"),
        (TaskFails, "code", "", "a text that is not empty"),
        (TaskFails, "at", -5, "a number from 0 to 1"),
        (TaskCancelled, "at", math.nan, "a number from 0 to 1"),
        (TaskHangs, "progress", 101, "a whole number from 0 to 100"),
        (TaskVanishes, "at", 2, "a number from 0 to 1"),
        (TaskLags, "seconds", 0, "a number above 0"),
        (UnknownStatus, "word", "", "a text that is not empty"),
        (FewerResults, "made", 4, "a whole number from 0 to 3"),
        (CallbackDelayed, "seconds", -1, "a number from 0"),
        (CallbackDuplicated, "copies", 1, "a whole number from 2 to 1000"),
        (CallbackForged, "status", None, "a text that is not empty"),
    ],
)
def test_what_a_field_may_not_be_is_refused(
    kind: type[Fault], name: str, value: Any, words: str
) -> None:
    """A value that could never strike, or break the emulator, is refused with what is allowed."""
    with pytest.raises(ValueError, match=rf"^{kind.__name__}: {name} must be .*{words}.*, not "):
        kind(**{name: value})


@pytest.mark.parametrize(
    ("kind", "values", "error"),
    [
        (Status, {"task": "task-1", "route": "submit"}, "Status: task cannot be 'task-1': of a"),
        (Status, {"task": "task-1", "route": ("list", "credits")}, "only of read, batch, result"),
        (Status, {"prompt": "a", "route": "credits"}, "no prompt is known, only of submit, read"),
        (Status, {"as_date": True}, "as_date cannot be True: there is no retry_after"),
        (Outage, {"between": (1, 2)}, "between cannot be .*: start and seconds say when"),
        (TaskFails, {"route": "read"}, "route cannot be .*: a task has no route"),
        (TaskFails, {"task": "task-1", "prompt": "a"}, "prompt cannot be 'a': with task"),
        (TaskFails, {"task": "task-1", "nth": 2}, "nth cannot be .*: with task"),
        (TaskFails, {"task": "task-1", "rate": 0.5}, "rate cannot be 0.5: with task"),
        (TaskLags, {"task": "task-1"}, "TaskLags: task cannot be .*use prompt or nth"),
        (CallbackDelayed, {"route": "submit"}, "a callback goes to no route"),
        (CallbackForged, {"task": "task-1"}, "task cannot be .*use prompt or nth"),
    ],
)
def test_what_can_never_fit_together_is_refused(
    kind: type[Fault], values: dict[str, Any], error: str
) -> None:
    """Selectors that would silently have no effect are refused, with what to do instead."""
    with pytest.raises(ValueError, match=error):
        kind(**values)


def test_selectors_that_may_fit_are_taken() -> None:
    """A fault of several routes needs only one of which the task is known."""
    assert Status(task="task-1", route=("submit", "read")).task == "task-1"
    assert Status(prompt="a", route="submit").prompt == "a"
    assert Status(nth=range(1, 3)).nth == (1, 2)
    assert TaskFails(task="task-1").task == "task-1"


@pytest.mark.parametrize(
    ("base", "derived"),
    [
        ("Fault", {"CallbackFault", "RequestFault", "TaskFault"}),
        ("RequestFault", {"Endless", "Latency", "Status"}),
        ("TaskFault", {"FewerResults", "TaskFails"}),
        ("CallbackFault", {"CallbackDelayed", "CallbackForged"}),
    ],
)
def test_a_base_is_no_fault(base: str, derived: set[str]) -> None:
    """A base of faults cannot be made, and the error names the classes based on it."""
    with pytest.raises(TypeError) as info:
        getattr(faults, base)()
    words, _, names = str(info.value).partition(": ")
    assert words == f"{base} is only what these have in common"
    assert derived <= set(names.split(", "))


def test_a_fault_of_ones_own_may_be_made() -> None:
    """A class derived from a base elsewhere is a fault."""

    class Mine(RequestFault):
        pass

    assert evolve(Mine(), route="read").route == ("read",)


@pytest.mark.parametrize("kind", [Status, Endless])
def test_forgotten_parentheses_are_named(kind: Any) -> None:
    """A fault that is given a function, as by a mark without parentheses, says so."""
    with pytest.raises(
        TypeError, match=rf"{kind.__name__} was given test_.*write {kind.__name__}\("
    ):
        kind(test_a_fault_of_ones_own_may_be_made)


# Over HTTP


@pytest.fixture
async def emulator() -> AsyncIterator[Emulator]:
    """An emulator with generations of one second."""
    async with Emulator(
        clock=ManualClock(), pictures="tiny", duration=1, credits=10**9,
        callback_origin="http://127.0.0.1:9",
    ) as emulator:  # fmt: skip
        yield emulator


@pytest.fixture
async def api(emulator: Emulator) -> AsyncIterator[Caller]:
    """A caller of that emulator."""
    async with calling(emulator) as caller:
        yield caller


@pytest.mark.parametrize("name", KINDS)
async def test_any_json_is_taken_or_refused(
    api: Caller, emulator: Emulator, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Over HTTP a value of a field is refused by name, or the server goes on working with it."""
    link = emulator.books.task(await ended(api, emulator)).result_urls[0]
    shared = SHARED if name in {"Status", "TaskFails", "CallbackDropped"} else set()
    for field in [each.name for each in fields(KINDS[name])]:
        for value in JSON if field not in SHARED or field in shared else ():
            body = f'{{"fault": "{name}", "{field}": {value}}}'
            answer = await api.call("POST", "/_emulator/faults", data=body.encode())
            if answer.status == 400:
                assert answer.error["message"].startswith(f"{name}: "), body
                assert field in answer.error["message"], body
            else:
                assert answer.status == 200, body
                await struck(api, link)
                assert (await api.call("DELETE", "/_emulator/faults")).status == 200
            assert caplog.records == [], body
    assert (await api.get("/v1/credits")).status == 200


async def ended(api: Caller, emulator: Emulator) -> str:
    """The id of a completed task."""
    name = await api.task()
    emulator.complete(name)
    return name


async def struck(api: Caller, link: str) -> None:
    """Send one request of each kind; the answers do not matter."""
    await briefly(api.submit(callback_url="https://app.example.com/hook"))
    await briefly(api.get("/v1/tasks", allow_redirects=False))
    await briefly(api.get(link, allow_redirects=False))


async def briefly(call: Coroutine[Any, Any, Answer]) -> None:
    try:
        async with asyncio.timeout(0.02):
            await call
    except (aiohttp.ClientError, ConnectionError, TimeoutError):
        pass


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ('{"fault": "TaskFault"}', "fault must be one of Callback"),
        ('{"fault": "Faults"}', "fault must be one of"),
        ('{"fault": ["Status"]}', "fault must be one of"),
        ("{}", "fault must be one of"),
        ('{"fault": "Status", "colour": 1}', "Status has no 'colour', only route, task, prompt"),
        ('{"fault": "Status", "status": 99999}', "status must be a whole number from 200 to 599"),
        ('{"fault": "TaskHangs", "task": "task-1"}', "no task 'task-1' has been accepted"),
    ],
)
async def test_what_is_no_fault_is_refused_over_http(api: Caller, body: str, words: str) -> None:
    """A body that is no fault is a 400 that says what one is."""
    answer = await api.call("POST", "/_emulator/faults", data=body)
    assert (answer.status, answer.error["param"] in {"fault", "task"}) == (400, True)
    assert words in answer.error["message"]


async def test_faults_come_as_they_can_be_posted(api: Caller, emulator: Emulator) -> None:
    """Each entry of the list of faults can be POSTed to make the same fault."""
    made = tuple(kind(prompt="a", nth=2) for name, kind in KINDS.items() if name != "Outage")
    emulator.faults.add(*made, Outage(1, 2))
    listed = (await api.get("/_emulator/faults")).json["data"]
    await api.call("DELETE", "/_emulator/faults")
    for each in listed:
        assert (await api.post("/_emulator/faults", each)).status == 200
    assert emulator.faults.active == (*made, Outage(1, 2))


# Settings


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("host", "", "printable ASCII"),
        ("port", 65536, "a whole number from 0 to 65535"),
        ("port", "80", "a whole number from 0 to 65535"),
        ("api_key", "", "printable ASCII without blanks"),
        ("api_key", "a\nb", "printable ASCII without blanks"),
        ("credits", -1, "a number from 0"),
        ("credits", math.nan, "a number from 0"),
        ("price", "1", "a number from 0"),
        ("duration", -1, r"a number from 0 to 1e\+10, two of them as \(least, most\), or a"),
        ("duration", math.inf, "a number from 0"),
        ("duration", (5, 2), "two of them"),
        ("duration", (1, 2, 3), "two of them"),
        ("estimate", -1, "a number from 0"),
        ("time_scale", 0, "a number above 0"),
        ("clock", ManualClock, r"a clock such as ManualClock\(\)"),
        ("pictures", "large", "'full' or 'tiny'"),
        ("seed", 1.5, "a whole number"),
        ("models", "wan3", "a tuple, each a text"),
        ("without", "list", "a tuple, each one of batch"),
        ("without", ("everything",), "a tuple, each one of batch"),
        ("string_codes", "yes", "True or False"),
        ("faults", Status(), "a tuple of faults"),
        ("callback_origin", "ftp://127.0.0.1", "an origin such as"),
        ("callback_origin", "http://127.0.0.1:99999", "an origin such as"),
        ("callback_origin", "http://127.0.0.1/hooks", "an origin such as"),
        ("callback_origin", "http://user@127.0.0.1", "an origin such as"),
        ("max_body", 0, "a whole number from 1"),
    ],
)
def test_settings_are_checked(name: str, value: Any, words: str) -> None:
    """A setting that is not allowed is refused at once, with what is allowed."""
    settings: dict[str, Any] = {"pictures": "tiny", name: value}
    with pytest.raises(ValueError, match=f"^{name} must be .*{words}.*, not "):
        Emulator(**settings)


def test_settings_that_can_be_are_taken() -> None:
    """The bounds themselves are allowed."""
    Emulator(
        pictures="tiny", duration=0, estimate=0, credits=0, price=0, port=65535,
        without=FEATURES, models=("a",), callback_origin="http://[::1]:8080/", clock=RealClock(60),
    )  # fmt: skip


def test_one_clock_is_enough() -> None:
    """A time scale beside a clock would have no effect, and is refused."""
    with pytest.raises(ValueError, match="time_scale is for the real time: leave out clock"):
        Emulator(pictures="tiny", time_scale=60, clock=ManualClock())


@pytest.mark.parametrize("law", [lambda *_: -1.0, lambda *_: math.nan])
async def test_a_law_of_durations_is_checked(law: Any, caplog: pytest.LogCaptureFixture) -> None:
    """A function that returns no duration is named in the server's log."""
    async with Emulator(pictures="tiny", duration=law) as emulator, calling(emulator) as api:
        assert (await api.submit()).status == 500
    assert "what duration(prompt, random) returns must be a number from 0" in caplog.text
    assert emulator.books.accepted == 0


def test_a_refusal_says_it_shortly() -> None:
    """A value of any length is shown with its beginning only."""
    with pytest.raises(ValueError, match=r"not 'xxx.*\.\.\.$") as info:
        Status(status="x" * 10**6)  # type: ignore[arg-type]  # the point
    assert len(str(info.value)) < 250
    assert json.dumps(str(info.value)).isascii()
