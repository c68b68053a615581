"""Every fault, as a client meets it."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Coroutine
from email.utils import parsedate_to_datetime
from typing import Any

import aiohttp
import pytest
from attrs import evolve
from emulator_caller import Answer, Caller, calling

from evolink_async.emulator import Emulator, ManualClock, faults
from evolink_async.emulator.faults import (
    Endless,
    Fault,
    FewerResults,
    Garbled,
    Latency,
    NotAPicture,
    Outage,
    ProgressFallsBack,
    RateLimit,
    Reset,
    SlowDrip,
    Stalled,
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


@pytest.fixture
def clock() -> ManualClock:
    """Time that only the test moves."""
    return ManualClock(autoadvance=False)


@pytest.fixture
async def emulator(clock: ManualClock) -> AsyncIterator[Emulator]:
    """An emulator with generations of 100 s."""
    async with Emulator(clock=clock, pictures="tiny", duration=100, credits=10**6) as emulator:
        yield emulator


@pytest.fixture
async def api(emulator: Emulator) -> AsyncIterator[Caller]:
    """A caller of that emulator."""
    async with calling(emulator) as caller:
        yield caller


async def result_of(api: Caller, emulator: Emulator) -> str:
    """The link to the result of a completed task."""
    name = await api.task()
    emulator.complete(name)
    return emulator.books.task(name).result_urls[0]


# Where and when


async def test_a_fault_strikes_its_route_only(api: Caller, emulator: Emulator) -> None:
    """A fault for reads leaves submits alone; the books name it."""
    emulator.faults.add(Status(503, route="read"))
    name = await api.task()
    assert (await api.get(f"/v1/tasks/{name}")).status == 503
    assert [(entry.status, entry.faults) for entry in emulator.books.requests()] == [
        (200, ()),
        (503, ("Status",)),
    ]


async def test_a_fault_strikes_the_nth_and_so_many_times(api: Caller, emulator: Emulator) -> None:
    """`nth` counts the requests that fit, `times` bounds how many are struck."""
    emulator.faults.add(Status(500, nth=(1, 3)), Status(502, route="credits", times=2))
    assert [(await api.get("/v1/credits")).status for _ in range(4)] == [500, 502, 500, 200]


async def test_a_fault_strikes_one_task_or_prompt(api: Caller, emulator: Emulator) -> None:
    """A fault may be about one task, or about all tasks with a text in their prompt."""
    one, other = [await api.task(prompt=prompt) for prompt in ("a lake", "a fox")]
    emulator.faults.add(Status(500, task=one), Status(502, prompt="fox"))
    assert [(await api.get(f"/v1/tasks/{name}")).status for name in (one, other)] == [500, 502]
    assert (await api.post("/v1/tasks/batch", {"task_ids": [other]})).status == 502
    assert (await api.submit(prompt="two foxes: fox, fox")).status == 502
    assert (await api.get("/v1/credits")).status == 200


async def test_a_share_is_struck_the_same_for_the_same_seed() -> None:
    """A rate is drawn with the emulator's seed."""

    async def struck(seed: int) -> list[int]:
        async with (
            Emulator(pictures="tiny", seed=seed, faults=(Status(500, rate=0.5),)) as emulator,
            calling(emulator) as api,
        ):
            return [(await api.get("/v1/credits")).status for _ in range(40)]

    one = await struck(1)
    assert one == await struck(1)
    assert one != await struck(2)
    assert 8 < one.count(500) < 32


async def test_a_fault_may_have_its_time(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """`between` counts seconds since the start of the emulator."""
    emulator.faults.add(Status(500, between=(10, 20)))
    seen = []
    for _ in range(3):
        seen.append((await api.get("/v1/credits")).status)
        clock.advance(10)
    assert seen == [200, 500, 200]


async def test_faults_can_be_listed_counted_and_cleared(api: Caller, emulator: Emulator) -> None:
    """The faults in place are known, and how many times each struck."""
    fault = Status(500)
    emulator.faults.add(fault)
    await api.get("/v1/credits")
    assert (emulator.faults.active, emulator.faults.struck(fault)) == ((fault,), 1)
    emulator.faults.clear()
    assert (await api.get("/v1/credits")).status == 200


async def test_a_fault_about_one_task_strikes_all_that_name_it(
    api: Caller, emulator: Emulator
) -> None:
    """`task` chooses reads, batch reads and results of one task, whatever the route."""
    url = await result_of(api, emulator)
    name = emulator.books.tasks()[0].id
    other = await api.task()
    emulator.faults.add(Status(500, task=name))
    assert (await api.get(f"/v1/tasks/{name}")).status == 500
    assert (await api.post("/v1/tasks/batch", {"task_ids": [other, name]})).status == 500
    assert (await api.get(url)).status == 500
    assert (await api.get(f"/v1/tasks/{other}")).status == 200
    assert (await api.post("/v1/tasks/batch", {"task_ids": [other]})).status == 200


async def test_only_faults_are_faults(emulator: Emulator) -> None:
    """Only faults can be added: a text is refused, and so is a class of faults."""
    with pytest.raises(TypeError, match="is no fault"):
        emulator.faults.add("Status")  # type: ignore[arg-type]  # the point
    with pytest.raises(TypeError, match=r"Status is a class, not a fault; write Status\(\)"):
        emulator.faults.add(Status)  # type: ignore[arg-type]  # the point


PROMPT = "a slow and odd lake, forbidden to four"


async def attempted(call: Coroutine[Any, Any, Answer]) -> Answer | None:
    """The answer, or None unless it comes whole within a moment."""
    try:
        async with asyncio.timeout(0.1):
            return await call
    except (aiohttp.ClientError, ConnectionError, TimeoutError):
        return None


def told(answer: Answer | None) -> tuple[Any, ...]:
    """What an answer says about a task."""
    if answer is None or answer.status != 200:
        return (answer and answer.status,)
    try:
        task = answer.json
    except ValueError:
        return (answer.body,)
    return task["status"], task["progress"], len(task.get("results", ())), task.get("error")


async def story(example: str = "") -> tuple[list[Any], set[str]]:
    """What a small client sees, and the names of the faults that struck its requests.

    It submits eleven times, reads the first three tasks every 3 s, five times, fetches one
    result and waits for the callbacks. Ids, times and durations are the same in each run.
    """
    clock = ManualClock()
    async with (
        Emulator(clock=clock, pictures="tiny", callback_origin="http://127.0.0.1:9") as emulator,
        calling(emulator) as api,
    ):
        late = "task.id" in example
        if example and not late:
            emulator.faults.add(eval(example, vars(faults)))  # noqa: S307 - our own docstring
        with clock.hold():
            for _ in range(11):
                await attempted(api.submit(prompt=PROMPT, n=4, callback_url="https://a.io/b"))
        names = [task.id for task in emulator.books.tasks()[:3]]
        if late:
            first = {"task": emulator.books.task(names[0])}
            emulator.faults.add(eval(example, vars(faults), first))  # noqa: S307 - see above
        seen: list[Any] = []
        for _ in range(5):
            await clock.sleep_until(clock.now() + 3)
            with clock.hold():
                seen += [told(await attempted(api.get(f"/v1/tasks/{name}"))) for name in names]
        for url in [url for name in names for url in emulator.books.task(name).result_urls][:1]:
            await attempted(api.get(url))
        await clock.sleep_until(clock.now() + 100)
        calls = [(each.time, each.task_id, each.forged) for each in emulator.books.callbacks()]
        met = {name for entry in emulator.books.requests() for name in entry.faults}
        return [*seen, *calls], met


@pytest.mark.parametrize("name", faults.kinds())
async def test_the_example_of_each_fault_strikes(name: str) -> None:
    """The example in the first line of a fault's docstring strikes a small ordinary client."""
    kind = faults.kinds()[name]
    first_line = (kind.__doc__ or "").partition("\n")[0]
    example = first_line.partition("``")[2].partition("``")[0]
    assert example.startswith(f"{name}("), first_line
    seen, met = await story(example)
    if issubclass(kind, faults.RequestFault):
        assert met == {name}
    else:
        assert seen != (await story())[0]


async def test_what_strikes_nothing_leaves_the_story_as_it_was() -> None:
    """The story is the same in each run, so that a difference is the fault's."""
    assert await story() == await story() == await story("TaskFails(prompt='sea')")
    assert (await story("TaskLags(3.0)"))[0] == (await story())[0]


def test_every_fault_can_be_found() -> None:
    """Each class that strikes is among the kinds; the bases are not."""
    bases = {"Fault", "RequestFault", "TaskFault", "CallbackFault"}
    classes = {name for name in faults.__all__ if inspect.isclass(getattr(faults, name))}
    assert set(faults.kinds()) == classes - bases - {"Armed", "Faults"}


# Request faults


async def test_a_status_comes_in_the_apis_own_form(api: Caller, emulator: Emulator) -> None:
    """A status carries the documented type, the given code, and Retry-After."""
    emulator.faults.add(
        Status(429, "slow down", code="key_daily_quota_exhausted", retry_after=7, nth=1),
        Status(503, retry_after=7, as_date=True, nth=2),
        Status(502, body="<h1>Bad Gateway</h1>", nth=3),
        Status(302, location="https://elsewhere.example/", nth=4),
        Status(503, kind="a_new_type", replayed=True, nth=5),
    )
    limited = await api.get("/v1/credits")
    assert limited.status == 429
    assert limited.headers["Retry-After"] == "7"
    assert limited.error["code"] == "key_daily_quota_exhausted"
    assert limited.error["type"] == "rate_limit_error"
    dated = await api.get("/v1/credits")
    wait = parsedate_to_datetime(dated.headers["Retry-After"]) - parsedate_to_datetime(
        dated.headers["Date"]
    )
    assert wait.total_seconds() == 7
    page = await api.get("/v1/credits")
    assert (page.status, page.body) == (502, b"<h1>Bad Gateway</h1>")
    away = await api.get("/v1/credits", allow_redirects=False)
    assert (away.status, away.headers["Location"]) == (302, "https://elsewhere.example/")
    last = await api.get("/v1/credits")
    assert last.error["type"] == "a_new_type"
    assert last.headers["Idempotency-Replayed"] == "true"


async def test_a_status_may_come_after_the_fact(api: Caller, emulator: Emulator) -> None:
    """A processed submit answered with 500 was accepted; one refused before was not."""
    emulator.faults.add(Status(500, processed=True, route="submit", nth=2))
    emulator.faults.add(Status(500, route="submit", nth=1))
    assert [(await api.submit()).status for _ in range(2)] == [500, 500]
    assert emulator.books.accepted == 1


@pytest.mark.parametrize("when", ["before", "after"])
async def test_an_answer_may_be_late(api: Caller, emulator: Emulator, when: str) -> None:
    """A client that gives up before a late answer has submitted all the same."""
    late = Latency(0.03, when, route="submit")
    emulator.faults.add(late)
    await left_alone(emulator, late, api.submit())
    await finished(emulator, 1)
    assert emulator.books.accepted == 1
    assert (await api.submit()).status == 200


@pytest.mark.parametrize(("when", "accepted"), [("before", 0), ("during", 1), ("after", 1)])
async def test_a_connection_may_be_reset(
    api: Caller, emulator: Emulator, when: str, accepted: int
) -> None:
    """A reset connection leaves open whether a submit was accepted; the books tell."""
    emulator.faults.add(Reset(when, route="submit"))
    with pytest.raises((aiohttp.ClientError, ConnectionError)):
        await api.submit()
    assert emulator.books.accepted == accepted
    assert [entry.status for entry in emulator.books.submits()] == [None]


@pytest.mark.parametrize("fault", [Reset("after"), Truncated(5), WrongLength(-5), Endless()])
async def test_a_client_may_leave_before_a_fault_strikes(
    api: Caller, emulator: Emulator, fault: Fault
) -> None:
    """A fault that strikes after the client has left does no harm."""
    emulator.faults.add(Latency(0.05), fault)
    await left_alone(emulator, fault, api.get("/v1/credits"))
    await finished(emulator, 1)
    emulator.faults.clear()
    assert (await api.get("/v1/credits")).status == 200


@pytest.mark.parametrize("fault", [Truncated(20), Truncated(-1), WrongLength(50)])
async def test_a_body_may_end_early(api: Caller, emulator: Emulator, fault: Fault) -> None:
    """A body shorter than its length is an error of the connection."""
    emulator.faults.add(fault)
    with pytest.raises(aiohttp.ClientPayloadError):
        await api.get("/v1/credits")
    assert [entry.status for entry in emulator.books.requests()] == [200]


async def test_a_length_may_be_too_short(api: Caller, emulator: Emulator) -> None:
    """A body longer than its length is cut by the client."""
    url = await result_of(api, emulator)
    whole = (await api.get(url)).body
    emulator.faults.add(WrongLength(-100, route="result"))
    assert (await api.get(url)).body == whole[:-100]


async def test_a_body_may_make_no_sense(api: Caller, emulator: Emulator) -> None:
    """A garbled body has the right length, or is the given one."""
    emulator.faults.add(Garbled(nth=1), Garbled("[]", nth=2))
    garbled = await api.get("/v1/credits")
    with pytest.raises(ValueError, match="utf-8"):
        garbled.json  # noqa: B018 - it raises
    assert len(garbled.body) > 100
    assert (await api.get("/v1/credits")).body == b"[]"


async def test_a_body_may_drip(api: Caller, emulator: Emulator) -> None:
    """A dripping body arrives whole if the client waits, and ends when it leaves."""
    drip = SlowDrip(1, 0.005, nth=2)
    emulator.faults.add(SlowDrip(64, 0.001, nth=1), drip)
    assert (await api.get("/v1/credits")).json["success"] is True
    await left_alone(emulator, drip, api.get("/v1/credits"))
    await finished(emulator, 2)
    assert [entry.status for entry in emulator.books.requests()] == [200, None]


@pytest.mark.parametrize("fault", [Endless(), Stalled()])
async def test_a_body_may_never_end(api: Caller, emulator: Emulator, fault: Fault) -> None:
    """A body without an end goes on until the client leaves."""
    emulator.faults.add(fault)
    await left_alone(emulator, fault, api.get("/v1/credits"))
    await finished(emulator, 1)
    assert [entry.status for entry in emulator.books.requests()] == [None]


async def left_alone(emulator: Emulator, fault: Fault, call: Coroutine[Any, Any, Answer]) -> None:
    """Leave a *call* soon after *fault* has struck it."""
    calling = asyncio.create_task(call)
    while not emulator.faults.struck(fault):  # noqa: ASYNC110 - there is no event for it
        await asyncio.sleep(0.001)
    await asyncio.sleep(0.01)
    calling.cancel()
    await asyncio.gather(calling, return_exceptions=True)


async def finished(emulator: Emulator, requests: int) -> None:
    """Wait until the emulator is done with so many requests."""
    while len(emulator.books.requests()) < requests:  # noqa: ASYNC110 - books tell nobody
        await asyncio.sleep(0.002)


async def test_closing_does_not_wait_for_a_stalled_answer() -> None:
    """An emulator closes although a client waits for an answer that never ends."""
    async with (
        Emulator(pictures="tiny", faults=(Stalled(),)) as emulator,
        calling(emulator) as api,
    ):
        waiting = asyncio.create_task(api.get("/v1/credits"))
        await asyncio.sleep(0.02)
        await emulator.aclose()
        with pytest.raises((aiohttp.ClientError, ConnectionError)):
            await waiting


async def test_a_result_may_be_no_picture(api: Caller, emulator: Emulator) -> None:
    """A page may come where a picture should be, and say it is one."""
    url = await result_of(api, emulator)
    emulator.faults.add(NotAPicture(nth=1), Status(403, route="result", nth=2))
    answer = await api.get(url)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "image/png")
    assert answer.body.startswith(b"<html>")
    assert (await api.get(url)).status == 403


async def test_a_rate_may_be_limited(api: Caller, emulator: Emulator, clock: ManualClock) -> None:
    """Beyond the rate the answer is 429; after `Retry-After` the next request passes."""
    limit = RateLimit(2, 1.5, route="credits")
    emulator.faults.add(limit)
    answers = [await api.get("/v1/credits") for _ in range(3)]
    assert [answer.status for answer in answers] == [200, 200, 429]
    assert answers[2].headers["Retry-After"] == "2"
    clock.advance(2)
    assert (await api.get("/v1/credits")).status == 200
    assert emulator.faults.struck(limit) == 1
    emulator.faults.clear()
    emulator.faults.add(RateLimit(0, retry_after=False))
    assert "Retry-After" not in (await api.get("/v1/credits")).headers


async def test_the_service_may_be_out(api: Caller, emulator: Emulator, clock: ManualClock) -> None:
    """During an outage a proxy's page answers, or every connection is reset."""
    emulator.faults.add(Outage(10, 10), Outage(20, 10, status=None))
    assert (await api.get("/v1/credits")).status == 200
    clock.advance(10)
    answer = await api.get("/v1/credits")
    assert (answer.status, answer.headers["Content-Type"]) == (503, "text/html; charset=utf-8")
    clock.advance(10)
    with pytest.raises((aiohttp.ClientError, ConnectionError)):
        await api.get("/v1/credits")
    clock.advance(10)
    assert (await api.get("/v1/credits")).status == 200


async def test_faults_strike_together(api: Caller, emulator: Emulator) -> None:
    """Several faults may strike one request; the first that sends ends it."""
    emulator.faults.add(Latency(0), Garbled("x"), Truncated(0), Reset("after"))
    with pytest.raises(aiohttp.ClientPayloadError):
        await api.get("/v1/credits")
    (entry,) = emulator.books.requests()
    assert entry.faults == ("Latency", "Garbled", "Truncated", "Reset")


# Task faults


@pytest.mark.parametrize(
    "code", ["content_policy_violation", "generation_timeout", "quota_exceeded", "brand_new"]
)
async def test_a_task_may_fail(
    api: Caller, emulator: Emulator, clock: ManualClock, code: str
) -> None:
    """A task with a fitting prompt fails with the given code, and is refunded."""
    emulator.faults.add(TaskFails(code, "no", prompt="bad"))
    bad, good = [await api.task(prompt=prompt) for prompt in ("a bad thing", "a good thing")]
    clock.advance(60)
    body = await api.read(bad)
    assert (body["status"], body["progress"]) == ("failed", 99)
    assert (body["error"]["code"], body["error"]["message"]) == (code, "no")
    assert emulator.books.task(bad).refunded == 1
    assert (await api.read(good))["status"] == "processing"


async def test_a_task_may_be_cancelled(api: Caller, emulator: Emulator, clock: ManualClock) -> None:
    """A cancelled task says so, and is refunded."""
    emulator.faults.add(TaskCancelled(0.25))
    name = await api.task()
    clock.advance(30)
    body = await api.read(name)
    assert (body["status"], body["error"]["code"]) == ("cancelled", "request_cancelled")
    assert emulator.books.task(name).refunded == 1


async def test_a_task_may_hang(api: Caller, emulator: Emulator, clock: ManualClock) -> None:
    """A hanging task stays where it is for ever, and holds its reservation."""
    emulator.faults.add(TaskHangs(40))
    name = await api.task()
    clock.advance(10**6)
    body = await api.read(name)
    assert (body["status"], body["progress"]) == ("processing", 40)
    assert emulator.books.running == 1


async def test_a_task_may_vanish_or_lag(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """A task may be unknown at first, or from some time on, everywhere."""
    emulator.faults.add(TaskLags(3, nth=1), TaskVanishes(0.5, nth=1))
    name = await api.task()

    async def seen() -> tuple[int, int, int]:
        batch = await api.post("/v1/tasks/batch", {"task_ids": [name]})
        listed = await api.get("/v1/tasks")
        single = await api.get(f"/v1/tasks/{name}")
        return single.status, len(batch.json["data"]), listed.json["total"]

    assert await seen() == (404, 0, 0)
    clock.advance(3)
    assert await seen() == (200, 1, 1)
    clock.advance(50)
    assert await seen() == (404, 0, 0)


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (TaskFails("quota_exceeded"), ("failed", 99)),
        (TaskCancelled(), ("cancelled", 99)),
        (TaskHangs(70), ("processing", 70)),
        (TaskVanishes(), None),
        (UnknownStatus("dreaming"), ("dreaming", 77)),
        (ProgressFallsBack(), ("processing", 22)),
    ],
)
async def test_a_running_task_may_be_changed(
    api: Caller,
    emulator: Emulator,
    clock: ManualClock,
    fault: Fault,
    expected: tuple[str, int] | None,
) -> None:
    """A task fault about one task changes it at once, although it has been accepted before."""
    name, other = [await api.task() for _ in range(2)]
    clock.advance(60)
    emulator.faults.add(fault := evolve(fault, task=name))
    assert emulator.faults.struck(fault) == 1
    clock.advance(18)
    answer = await api.get(f"/v1/tasks/{name}")
    if expected is None:
        assert answer.status == 404
    else:
        assert (answer.json["status"], answer.json["progress"]) == expected
    assert (await api.read(other))["status"] == "processing"
    await api.task()
    assert emulator.faults.struck(fault) == 1


async def test_a_task_failed_late_has_failed_when_it_was_told_to(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """A task past the share at which it is to fail fails at once, and is refunded."""
    name = await api.task()
    clock.advance(60)
    emulator.faults.add(TaskFails(at=0.1, task=name))
    record = emulator.books.task(name)
    assert (record.status, record.ends_at, record.refunded) == ("failed", clock.now(), 1)


async def test_a_task_that_ends_before_it_starts_made_no_progress(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """A task that fails while pending, or the instant it starts, shows a progress of 0."""
    emulator.faults.add(TaskFails(at=0, prompt="at once"))
    by_hand, at_once = await api.task(), await api.task(prompt="at once")
    emulator.fail(by_hand)
    clock.advance(50)
    for name in (by_hand, at_once):
        body = await api.read(name)
        assert (body["status"], body["progress"]) == ("failed", 0)


async def test_only_a_running_task_can_be_changed(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """A task fault about a task that is not there, or has ended, is refused."""
    with pytest.raises(ValueError, match="TaskHangs: no task 'task-1' has been accepted; prompt="):
        emulator.faults.add(TaskHangs(task="task-1"))
    name = await api.task()
    clock.advance(100)
    with pytest.raises(ValueError, match=f"TaskHangs: task '{name}' has ended"):
        emulator.faults.add(TaskHangs(task=name))
    assert emulator.faults.active == ()
    body = {"fault": "TaskHangs", "task": name}
    answer = await api.post("/_emulator/faults", body)
    assert (answer.status, "has ended" in answer.error["message"]) == (400, True)


async def test_a_hanging_task_reaches_no_share(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """A task with both faults, one to hang and one to fail, hangs."""
    emulator.faults.add(TaskHangs(), TaskFails(at=0), TaskVanishes(0.5))
    name = await api.task()
    clock.advance(10**6)
    assert (await api.read(name))["status"] == "processing"


async def test_a_long_retry_after_is_written_out(api: Caller, emulator: Emulator) -> None:
    """`Retry-After` is a number without an exponent, in the header and in the advice."""
    emulator.faults.add(Status(429, retry_after=2592000))
    answer = await api.get("/v1/credits")
    assert answer.headers["Retry-After"] == "2592000"
    assert answer.error["fallback_suggestion"] == "retry after 2592000 seconds"


async def test_progress_may_go_back(api: Caller, emulator: Emulator, clock: ManualClock) -> None:
    """Progress may fall in the second half."""
    emulator.faults.add(ProgressFallsBack())
    name = await api.task()
    seen = []
    for _ in range(4):
        clock.advance(24)
        seen.append((await api.read(name))["progress"])
    assert seen[0] < seen[1] > seen[2] > seen[3]


async def test_a_status_may_be_a_new_word(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """A task may show an unknown status word, and complete all the same."""
    emulator.faults.add(UnknownStatus("moderating"))
    name = await api.task()
    clock.advance(50)
    assert (await api.read(name))["status"] == "moderating"
    clock.advance(50)
    assert (await api.read(name))["status"] == "completed"


async def test_there_may_be_fewer_results(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """Only the pictures made are charged."""
    emulator.faults.add(FewerResults(1))
    name = await api.task(n=4)
    clock.advance(100)
    assert len((await api.read(name))["results"]) == 1
    assert (emulator.books.charged, emulator.books.refunded) == (1, 3)
