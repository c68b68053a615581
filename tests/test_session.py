"""Sessions and tasks over real HTTP, against the emulator, in virtual time."""

from __future__ import annotations

import asyncio
import gc
import pickle
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from evolink_async import (
    APIConnectionError,
    AuthenticationError,
    ConfigurationError,
    DownloadError,
    EvolinkError,
    ImageRequest,
    InvalidResponseError,
    NotFoundError,
    Outcome,
    PollPolicy,
    RawRequest,
    RequestValidationError,
    RetryPolicy,
    Session,
    SessionClosedError,
    Stats,
    SubmitUncertainError,
    TaskCancelledError,
    TaskFailedError,
    TaskTimeoutError,
    Timeout,
)
from evolink_async.emulator import Emulator, ManualClock, faults


def connect(emulator: Emulator, **settings: Any) -> Session:
    settings.setdefault("clock", emulator.clock)
    return Session(emulator.api_key, base_url=emulator.base_url, **settings)


async def wait_until(condition: Any) -> None:
    """Let the loop run until *condition()* holds."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0)


# -- one generation ----------------------------------------------------------------------------


async def test_generate_and_download(session: Session, emulator: Emulator, tmp_path: Path) -> None:
    """A prompt becomes files on disk, named after the task."""
    result = await session.generate("A serene lake at sunset", size="1280x1280", n=2)
    paths = await session.download(result, tmp_path / "out")
    assert [path.name for path in paths] == [f"{result.task_id}-{k}.png" for k in (1, 2)]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
    assert len(result.urls) == 2
    assert result.model == "wan2.5-text-to-image"
    assert result.usage.credits_used == 2
    assert result.duration is not None
    (record,) = emulator.books.tasks()
    assert (record.status, record.charged) == ("completed", 2)


async def test_a_task_is_awaited_often_and_from_many_places(session: Session) -> None:
    """Every awaiter gets the same result, together or later."""
    task = await session.submit("A peaceful lake")
    assert not task.done()
    results = await asyncio.gather(task, task, task.wait(), asyncio.shield(task))
    assert await task == results[0]
    assert {r.task_id for r in results} == {task.id}
    assert task.done()
    assert task.status == "completed"
    assert task.progress == 100


async def test_asyncio_takes_a_task_as_it_is(session: Session) -> None:
    """wait_for, timeout, as_completed and task groups work with it."""
    tasks = [await session.submit(f"Lake {i}") for i in range(4)]
    first = await asyncio.wait_for(tasks[0], 10)
    async with asyncio.timeout(10):
        assert await tasks[0] == first
    for done in asyncio.as_completed(tasks[:2]):
        await done
    async with asyncio.TaskGroup() as group:
        child = group.create_task(tasks[2].wait())
    await asyncio.wait({asyncio.create_task(tasks[3].wait())})
    assert child.result().task_id == tasks[2].id


async def test_updates_show_each_change_once(emulator: Emulator) -> None:
    """updates() yields changes of status or progress, ends with the end, and can be repeated."""
    async with connect(emulator, poll=PollPolicy(max_interval=0.5)) as session:
        task = await session.submit("A peaceful lake")
        seen = [(s.status, s.progress) async for s in task.updates()]
        assert seen[0][0] == "pending"
        assert ("processing" in {status for status, _ in seen}) is True
        assert seen[-1] == ("completed", 100)
        assert all(a != b for a, b in pairwise(seen))
        assert [s.status async for s in task.updates()] == ["completed"]


async def test_refresh_looks_now(session: Session, emulator: Emulator) -> None:
    """refresh() costs one read while the task runs and none after."""
    task = await session.submit("A peaceful lake")
    snapshot = await task.refresh()
    assert snapshot is task.snapshot
    assert len(emulator.books.reads(task.id)) == 1
    await task
    reads = len(emulator.books.reads(task.id))
    assert (await task.refresh()).status == "completed"
    assert len(emulator.books.reads(task.id)) == reads


async def test_reprs(session: Session, emulator: Emulator) -> None:
    """What is printed in a debugger says what is going on, and never the key."""
    task = await session.submit("A peaceful lake")
    assert repr(task) == f"<Task {task.id} pending 0 %>"
    assert repr(session) == f"<Session {emulator.base_url} open, 1 running>"
    assert repr(session.task("task-unknown")) == "<Task task-unknown not read yet>"
    await task
    assert repr(task) == f"<Task {task.id} completed 100 %>"
    await session.aclose()
    assert "closed" in repr(session)
    assert emulator.api_key not in repr(session) + repr(vars(session))
    assert "not opened" in repr(Session("k" * 20))


# -- how tasks end -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "retryable", "advice"),
    [
        ("content_policy_violation", False, "change the prompt"),
        ("service_error", True, "again later"),
        ("something_new", False, "something_new"),
    ],
)
async def test_failed_tasks_say_why(
    emulator: Emulator, *, code: str, retryable: bool, advice: str
) -> None:
    """A failed task raises its code, message and whether resubmitting as is makes sense."""
    emulator.faults.add(faults.TaskFails(code, "the server's own words"))
    async with connect(emulator) as session:
        task = await session.submit("A lake")
        with pytest.raises(TaskFailedError, match="the server's own words") as caught:
            await task
        error = caught.value
        assert (error.code, error.retryable, error.task_id) == (code, retryable, task.id)
        assert advice in str(error)
        assert error.snapshot is not None
        with pytest.raises(TaskFailedError) as again:
            await task
        assert again.value is not error
        assert [s.status async for s in task.updates()] == ["failed"]
        copied = pickle.loads(pickle.dumps(error))  # noqa: S301 - made here
        assert repr(copied) == repr(error)


async def test_cancelled_tasks(session: Session, emulator: Emulator) -> None:
    """A task cancelled on the server raises TaskCancelledError, not CancelledError."""
    task = await session.submit("A lake")
    emulator.cancel(task.id)
    with pytest.raises(TaskCancelledError, match=task.id):
        await task


async def test_the_deadline_ends_the_watch_and_frees_the_slot(emulator: Emulator) -> None:
    """A task that hangs is given up; its slot is free; a new handle picks it up again."""
    emulator.faults.add(faults.TaskHangs(prompt="slow"))
    async with connect(emulator, poll=PollPolicy(deadline=300), max_in_flight=1) as session:
        task = await session.submit("a slow lake")
        with pytest.raises(TaskTimeoutError, match=r"session\.task") as caught:
            await task
        assert isinstance(caught.value, TimeoutError)
        assert "given up: TaskTimeoutError" in repr(task)
        with pytest.raises(TaskTimeoutError):
            _ = [s async for s in task.updates()]
        await session.generate("a fast lake")
        emulator.complete(task.id)
        assert (await session.task(task.id)).task_id == task.id
        assert (await task.refresh()).status == "completed"
        assert (await task).task_id == task.id


async def test_wait_with_a_timeout_is_the_callers_own(emulator: Emulator) -> None:
    """wait(timeout=) raises for that caller only, in the session's time; the watch goes on."""
    emulator.faults.add(faults.TaskHangs())
    async with connect(emulator) as session:
        task = await session.submit("A lake")
        start = emulator.clock.now()
        with pytest.raises(TaskTimeoutError, match="after waiting 40 s"):
            await task.wait(timeout=40)
        assert emulator.clock.now() - start == pytest.approx(40)
        assert not task.done()
        with pytest.raises(TaskTimeoutError):
            await task.wait(timeout=0)
        emulator.complete(task.id)
        assert await task.wait(timeout=1000) == await task
        assert await task.wait(timeout=0) == await task


@pytest.mark.parametrize(
    "seconds",
    [-1, float("nan"), "5", True, float("inf"), 10**400, 10**5000],
    ids=["-1", "nan", "5", "True", "inf", "1e400", "1e5000"],
)
async def test_a_timeout_must_be_seconds(session: Session, seconds: Any) -> None:
    """A timeout that is none is refused by name."""
    task = await session.submit("A lake")
    with pytest.raises(ConfigurationError, match="timeout"):
        await task.wait(timeout=seconds)


async def test_cancelling_an_awaiter_stops_that_awaiter_only(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    """One awaiter cancelled: the others and the watch go on; generate names the id it left."""
    task = await session.submit("A lake")
    one, other = asyncio.create_task(task.wait()), asyncio.create_task(task.wait())
    await asyncio.sleep(0)
    one.cancel()
    assert (await other).task_id == task.id
    left = asyncio.create_task(session.generate("Another lake"))
    await wait_until(lambda: session.tasks)
    (running,) = session.tasks
    left.cancel()
    with pytest.raises(asyncio.CancelledError):
        await left
    assert running.id in caplog.text
    await running


async def test_a_ten_minute_generation_takes_milliseconds(clock: ManualClock) -> None:
    """Virtual time is deterministic: two runs read at the same moments."""

    async def run() -> tuple[list[float], float]:
        clock = ManualClock()
        async with (
            Emulator(clock=clock, duration=600, pictures="tiny") as emulator,
            connect(emulator, poll=PollPolicy(max_interval=20)) as session,
        ):
            start = clock.now()
            await session.generate("A lake")
            reads = [record.time - start for record in emulator.books.requests("read")]
            return reads, clock.now() - start

    first, second = await run(), await run()
    assert first == second
    assert 600 <= first[1] <= 620


# -- tasks by id -------------------------------------------------------------------------------


async def test_a_task_by_its_id(session: Session, emulator: Emulator) -> None:
    """A handle sends nothing until it is used, and shares the watch of its id."""
    original = await session.submit("A lake")
    handle = session.task(original.id)
    assert handle.snapshot is original.snapshot
    assert handle.idempotency_key == original.idempotency_key
    async with connect(emulator) as other:
        found = other.task(original.id)
        assert (found.status, found.request, found.idempotency_key) == (None, None, None)
        assert found.done() is False
        assert other.tasks == ()
        reads = len(emulator.books.reads())
        assert await found == await other.task(original.id)
        assert len(emulator.books.reads()) > reads
    assert (await handle).task_id == original.id


@pytest.mark.parametrize("task_id", ["", "abc", "../../credits", "a/b?c", "....", "x" * 129, 5])
def test_ids_that_cannot_be_are_refused(task_id: Any) -> None:
    """An id is checked before it gets anywhere near a path."""
    with pytest.raises(RequestValidationError, match="task_id"):
        Session("k" * 20).task(task_id)


async def test_an_unknown_id(session: Session, emulator: Emulator) -> None:
    """An id the API does not know raises NotFoundError, after a second opinion."""
    with pytest.raises(NotFoundError):
        await session.task("task-that-never-was")
    assert len(emulator.books.requests("read")) >= 2
    with pytest.raises(NotFoundError):
        await session.task("task-that-never-was").refresh()


async def test_list_and_credits(session: Session, emulator: Emulator) -> None:
    """The account's tasks are walked page by page, newest first; credits are read."""
    ids = [(await session.submit(f"Lake {i}")).id for i in range(32)]
    await asyncio.gather(*session.tasks)
    ids += [(await session.submit(f"Lake {i}")).id for i in range(32, 60)]
    rows = [row async for row in session.list()]
    assert [row.id for row in rows] == ids[::-1]
    assert [row.id async for row in session.list(limit=3)] == ids[:-4:-1]
    assert {row.status async for row in session.list(status="completed")} == {"completed"}
    assert [row async for row in session.list(model="another")] == []
    assert rows[-1].credits_used == 1
    balance = await session.credits()
    assert balance.remaining == emulator.books.remaining
    with pytest.raises(ConfigurationError, match="limit"):
        await anext(session.list(limit=0))


async def test_other_endpoints(session: Session, emulator: Emulator) -> None:
    """Any generation endpoint's tasks are watched alike."""
    request = RawRequest("/v1/videos/generations", body={"model": "veo", "prompt": "A lake"})
    result = await session.generate(request)
    assert result.snapshot.type == "video"
    by_mapping = await session.submit(request.to_json())
    assert by_mapping.request == request
    assert len(emulator.books.submits()) == 2


# -- concurrency -------------------------------------------------------------------------------


async def test_never_more_than_max_in_flight(clock: ManualClock) -> None:
    """2 000 submitted at once with room for 200: the server sees 200 running, never 201."""
    loop = asyncio.get_running_loop()
    before = asyncio.all_tasks()
    async with Emulator(
        clock=clock, duration=(20, 40), pictures="tiny", credits=10_000
    ) as emulator:
        policy = PollPolicy(min_interval=10)
        async with connect(emulator, max_in_flight=200, poll=policy) as session:
            results = await asyncio.gather(
                *(session.generate(f"Lake {i}", validate=False) for i in range(2000))
            )
            assert session.tasks == ()
            assert session.stats.waiting == 0
        assert len({result.task_id for result in results}) == 2000
        assert emulator.books.peak_running == 200
        assert len(emulator.books.submits()) == 2000
    await asyncio.sleep(0)
    left = asyncio.all_tasks(loop) - before
    assert not left


async def test_submitting_without_awaiting_makes_progress(clock: ManualClock) -> None:
    """A loop that submits and never awaits is slowed to the pace of the slots, not stopped."""
    count = 1000
    async with Emulator(clock=clock, duration=5, pictures="tiny", credits=count) as emulator:
        async with connect(emulator, max_in_flight=50) as session:
            for i in range(count):
                await session.submit(f"Lake {i}")
            await asyncio.gather(*session.tasks)
        assert emulator.books.peak_running == 50
        assert len(emulator.books.tasks(status="completed")) == count


async def test_slots_are_served_in_order_and_leak_nothing(emulator: Emulator) -> None:
    """Waiters for a slot get it in their order; cancelled ones leave it to the next."""
    async with connect(emulator, max_in_flight=1) as session:
        running = await session.submit("first")
        queue = [asyncio.create_task(session.submit(f"lake {i}")) for i in range(6)]
        await asyncio.sleep(0)
        for cancelled in queue[1::2]:
            cancelled.cancel()
        await running
        submitted = [await queue[i] for i in (0, 2, 4)]
        await asyncio.gather(*submitted)
        await session.generate("last")
    prompts = [record.prompt for record in emulator.books.submits()]
    assert prompts == ["first", "lake 0", "lake 2", "lake 4", "last"]


async def test_a_failed_submit_gives_its_slot_back(emulator: Emulator) -> None:
    """Refused, uncertain or not even sent: the slot is free at once."""
    emulator.faults.add(faults.Status(400, route="submit", nth=1))
    emulator.faults.add(faults.Reset("after", route="submit", nth=2))
    async with connect(emulator, max_in_flight=1) as session:
        with pytest.raises(EvolinkError):
            await session.submit("one")
        with pytest.raises(SubmitUncertainError):
            await session.submit("two")
        await session.generate("three")


@pytest.mark.parametrize("moment", range(20))
async def test_a_submit_cancelled_at_any_moment(
    emulator: Emulator, caplog: pytest.LogCaptureFixture, moment: int
) -> None:
    """Accepted submits are those the session knows plus those reported uncertain, each time."""
    async with connect(emulator, timeout=Timeout(submit=5)) as session:
        submit = asyncio.create_task(session.submit("A lake"))
        for _ in range(moment):
            await asyncio.sleep(0)
        submit.cancel()
        returned = await asyncio.gather(submit, return_exceptions=True)
        await wait_until(lambda: not session._submitter._running)
        known = {task.id for task in session.tasks}
        if not isinstance(returned[0], BaseException):
            known.add(returned[0].id)
        accepted = {record.id for record in emulator.books.tasks()}
        assert accepted == known
        assert session._submitter._slots._value == 32 - len(known)
        assert session._limiter._submits == 0
        if returned[0] is not None and isinstance(returned[0], asyncio.CancelledError):
            assert all(task_id in caplog.text for task_id in known)


# -- map ---------------------------------------------------------------------------------------


async def test_map_yields_every_outcome(session: Session, emulator: Emulator) -> None:
    """Strings, mappings, requests and rubbish: one outcome each, errors included."""
    emulator.faults.add(faults.TaskFails("content_policy_violation", prompt="bad"))
    items: list[Any] = [
        "a lake",
        {"prompt": "two lakes", "n": 2},
        ImageRequest("a pond"),
        "a bad lake",
        {"promt": "typo"},
        17,
    ]
    outcomes = sorted([o async for o in session.map(items)], key=lambda o: o.index)
    assert [type(o.error).__name__ for o in outcomes] == [
        "NoneType",
        "NoneType",
        "NoneType",
        "TaskFailedError",
        "RequestValidationError",
        "RequestValidationError",
    ]
    assert [len(o.result.urls) if o.result else 0 for o in outcomes] == [1, 2, 1, 0, 0, 0]
    assert [o.task is not None for o in outcomes] == [True] * 4 + [False] * 2
    assert outcomes[5].request == 17
    assert isinstance(outcomes[0], Outcome)


async def test_map_pulls_lazily(emulator: Emulator) -> None:
    """Never more than max_in_flight items between input and outcome, whatever the length."""
    pulled = 0

    def prompts() -> Iterator[str]:
        nonlocal pulled
        for i in range(100):
            pulled += 1
            yield f"lake {i}"

    async with connect(emulator, max_in_flight=5) as session:
        done = 0
        async for outcome in session.map(prompts()):
            assert outcome.error is None
            done += 1
            assert pulled - done <= 5
    assert done == 100
    assert emulator.books.peak_running == 5


async def test_map_of_an_async_source_does_not_wait_for_it(session: Session) -> None:
    """Outcomes come out while the source takes its time over the next item."""
    more = asyncio.Event()

    async def prompts() -> AsyncIterator[str]:
        yield "first"
        await more.wait()
        yield "second"

    async with aclosing(session.map(prompts())) as outcomes:
        first = await anext(outcomes)
        more.set()
        second = await anext(outcomes)
        assert [first.index, second.index] == [0, 1]
        with pytest.raises(StopAsyncIteration):
            await anext(outcomes)


async def test_leaving_a_map_early(emulator: Emulator, caplog: pytest.LogCaptureFixture) -> None:
    """Leaving the loop stops pulling and submitting; what was submitted is named and goes on."""
    async with connect(emulator, max_in_flight=4) as session:
        async with aclosing(session.map(f"lake {i}" for i in range(50))) as outcomes:
            async for outcome in outcomes:
                first = outcome
                break
        submitted = {record.id for record in emulator.books.tasks()}
        assert first.task is not None
        assert len(submitted) <= 5
        for task_id in submitted - {first.task.id}:
            assert task_id in caplog.text
        await asyncio.gather(*session.tasks)
        assert {record.id for record in emulator.books.tasks()} == submitted


async def test_breaking_out_of_a_map_stops_it(emulator: Emulator) -> None:
    """A bare break is enough when nothing else refers to the iterator."""
    async with connect(emulator, max_in_flight=4) as session:
        async for _ in session.map(f"lake {i}" for i in range(50)):
            break
        await asyncio.gather(*session.tasks)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(emulator.books.submits()) <= 5


async def test_a_source_that_raises_ends_the_map(session: Session) -> None:
    """The source's own error comes out as it is; running tasks go on."""

    def prompts() -> Iterator[str]:
        yield "one"
        raise LookupError("the file is torn")

    with pytest.raises(LookupError, match="torn"):
        async for _ in session.map(prompts()):
            pass


@pytest.mark.parametrize("source", ["one prompt", {"prompt": "x"}, 5])
async def test_map_takes_an_iterable_of_requests(session: Session, source: Any) -> None:
    """One request instead of many is refused, before its letters are paid for."""
    with pytest.raises(ConfigurationError, match="generate"):
        _ = [o async for o in session.map(source)]


# -- closing -----------------------------------------------------------------------------------


async def test_closing_wakes_waiters_and_names_what_runs(
    emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    """Waiters get SessionClosedError with the id; a new session picks the task up."""
    emulator.faults.add(faults.TaskHangs())
    session = connect(emulator)
    task = await session.submit("A lake")
    waiters = [asyncio.create_task(task.wait()) for _ in range(2)]
    timed = asyncio.create_task(task.wait(timeout=1000))
    await asyncio.sleep(0)
    await asyncio.gather(session.aclose(), session.aclose())
    await session.aclose()
    for waiter in [*waiters, timed]:
        with pytest.raises(SessionClosedError) as caught:
            await waiter
        assert caught.value.task_id == task.id
    assert task.id in caplog.text
    for used in (
        session.submit("x"),
        session.credits(),
        session.task(task.id).wait(),
        anext(session.map(["x"])),
    ):
        with pytest.raises(SessionClosedError):
            await used
    async with connect(emulator) as again:
        emulator.complete(task.id)
        assert (await again.task(task.id)).task_id == task.id


async def test_an_unused_session_closes_quietly() -> None:
    """A session that was never used opens and leaves nothing."""
    session = Session("k" * 20)
    assert session.tasks == ()
    assert session.stats == Stats()
    await session.aclose()
    await session.aclose()


def test_one_session_per_loop() -> None:
    """A second loop is refused with a clear error; a new session per loop works."""
    sessions = [Session("k" * 20, base_url="http://127.0.0.1:9")]

    async def enter() -> None:
        await sessions[0].__aenter__()

    async def use() -> None:
        await sessions[0].credits()

    asyncio.run(enter())
    with pytest.raises(ConfigurationError, match="another event loop"):
        asyncio.run(use())
    with pytest.warns(ResourceWarning):  # noqa: PT031 - both must happen inside
        sessions.clear()
        gc.collect()


async def test_an_unclosed_session_warns(emulator: Emulator) -> None:
    """Forgetting aclose is a ResourceWarning, as for files and sockets."""
    session = connect(emulator)
    await session.credits()
    session.task("task-unified-1757156493-imcg5zqt")
    transport = session._transport
    with pytest.warns(ResourceWarning, match="unclosed <Session"):
        del session  # without waiting for a collection of garbage
    await transport.aclose()


# -- settings ----------------------------------------------------------------------------------


def test_the_key_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a key the error says where to get one."""
    with pytest.raises(ConfigurationError, match=r"EVOLINK_API_KEY.*evolink\.ai"):
        Session()
    monkeypatch.setenv("EVOLINK_API_KEY", "from-the-environment")
    monkeypatch.setenv("EVOLINK_BASE_URL", "http://localhost:1234/")
    assert "http://localhost:1234" in repr(Session())


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("api_key", "with\nnewline"),
        ("api_key", "  "),
        ("base_url", "http://api.example.com"),
        ("base_url", "ftp://localhost"),
        ("max_in_flight", 0),
        ("max_in_flight", True),
        ("max_connections", 1.5),
        ("max_requests_per_second", 0),
        ("max_requests_per_second", float("nan")),
        ("poll", 3),
        ("retry", None),
        ("timeout", 30),
    ],
)
def test_unusable_settings_are_named(setting: str, value: Any) -> None:
    """Each unusable setting is refused by name, at once."""
    given: dict[str, Any] = {"api_key": "k" * 20, setting: value}
    with pytest.raises(ConfigurationError, match="API key" if setting == "api_key" else setting):
        Session(**given)


@pytest.mark.parametrize("field", ["connect", "submit", "read"])
@pytest.mark.parametrize("value", [0, -1, float("inf"), "10", None, True])
def test_time_outs_are_seconds(field: str, value: Any) -> None:
    """A time-out that is none is refused by name."""
    with pytest.raises(ConfigurationError, match=field):
        Timeout(**{field: value})


async def test_a_session_handed_in_stays_the_callers(emulator: Emulator) -> None:
    """It is used for API calls, its pool never queues, and it is not closed."""
    calls: list[str] = []
    trace = aiohttp.TraceConfig()

    async def note(_: Any, __: Any, params: aiohttp.TraceRequestStartParams) -> None:
        calls.append(params.method)

    trace.on_request_start.append(note)
    connector = aiohttp.TCPConnector(limit=2)
    async with aiohttp.ClientSession(connector=connector, trace_configs=[trace]) as http:
        async with connect(emulator, http=http) as session:
            await asyncio.gather(*(session.generate(f"lake {i}") for i in range(5)))
            assert session._settings.permits() == 2
        assert not http.closed
        assert len(calls) == len(emulator.books.requests())
        closed = connect(emulator, http=http)
    with pytest.raises(ConfigurationError, match="http="):
        await closed.submit("A lake")
    await closed.aclose()


async def test_a_proxy_of_the_environment_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    """The API is reached through https_proxy with its credentials; loopback never is."""
    heads: list[bytes] = []

    async def proxy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(proxy, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    for name in ("http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://user:pass%20word@127.0.0.1:{port}")
    once = RetryPolicy(attempts=1)
    async with server, Session("sk-0123456789", retry=once) as session:
        with pytest.raises(APIConnectionError) as caught:
            await session.submit("A lake")
    assert caught.value.sent is False
    assert heads[0].startswith(b"CONNECT api.evolink.ai:443 ")
    assert b"Proxy-Authorization: Basic dXNlcjpwYXNzIHdvcmQ=" in heads[0]
    assert b"sk-0123456789" not in heads[0]


async def test_a_wrong_key(emulator: Emulator) -> None:
    """401 says what to check and never shows the key."""
    async with Session(
        "sk-wrong-key-1234", base_url=emulator.base_url, clock=emulator.clock
    ) as session:
        with pytest.raises(AuthenticationError, match="API key") as caught:
            await session.submit("A lake")
        assert "sk-wrong-key-1234" not in str(caught.value) + repr(vars(caught.value))


async def test_a_single_call_is_tried_again(emulator: Emulator) -> None:
    """Credits and lists survive a broken connection; a final refusal is raised."""
    emulator.faults.add(faults.Reset("before", route="credits", nth=(1, 2)))
    async with connect(emulator) as session:
        await session.credits()
        assert session.stats.retries >= 1
        emulator.faults.add(faults.Status(403, route="credits"))
        with pytest.raises(EvolinkError, match="403"):
            await session.credits()


async def test_an_empty_retry_budget_stops_retries(emulator: Emulator) -> None:
    """A session whose calls keep failing does not keep asking."""
    emulator.faults.add(faults.Status(500, route="credits"))
    async with connect(emulator, retry=RetryPolicy(budget=15, attempts=100)) as session:
        for _ in range(3):
            with pytest.raises(EvolinkError):
                await session.credits()
        assert session.stats.reads == 3 + 3


async def test_a_download_waits_in_the_sessions_time(
    session: Session, emulator: Emulator, tmp_path: Path
) -> None:
    """Attempts at a result are spaced on the session's clock, like everything else."""
    result = await session.generate("A lake")
    emulator.faults.add(faults.Status(503, route="result", times=4))
    start = emulator.clock.now()
    assert len(await session.download(result, tmp_path)) == 1
    assert emulator.clock.now() - start >= 0.5 + 1 + 2 + 4


async def test_downloads_refuse_what_is_no_result(session: Session, tmp_path: Path) -> None:
    """A wrong argument is named; a task is awaited first; an existing file is kept."""
    with pytest.raises(ConfigurationError, match="result"):
        await session.download("https://example.com/x.png", tmp_path)  # type: ignore[arg-type]  # what is tested
    task = await session.submit("A lake")
    (path,) = await session.download(task, tmp_path)
    before = path.read_bytes()
    with pytest.raises(DownloadError, match="overwrite"):
        await task.download(tmp_path)
    assert await task.download(tmp_path, overwrite=True) == (path,)
    assert path.read_bytes() == before


async def test_a_callback_for_other_endpoints(emulator: Emulator) -> None:
    """A raw request gets the session's callback URL as well, unless it has its own."""
    async with connect(emulator, callback="https://example.com/hook") as session:
        request = RawRequest("/v1/videos/generations", body={"model": "veo", "prompt": "A lake"})
        task = await session.submit(request)
        assert task.request is not None
        assert task.request.callback_url == "https://example.com/hook"
        assert task.request.path == request.path


async def test_a_row_that_is_none_is_left_out(
    emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    """One broken row of the task list does not hide the others."""
    rows = '{"data": [{"id": 5}, {"id": "task-1234", "status": "completed"}], "total": 2}'
    emulator.faults.add(faults.Garbled(rows, route="list"))
    async with connect(emulator) as session:
        assert [row.id async for row in session.list()] == ["task-1234"]
    assert "left out" in caplog.text


async def test_a_status_is_fit_for_a_terminal(emulator: Emulator) -> None:
    """What the server calls a state is shown without what a terminal would obey."""
    emulator.faults.add(faults.UnknownStatus("\x1b[2Jodd"))
    async with connect(emulator) as session:
        task = await session.submit("A lake")
        await emulator.clock.sleep_until(emulator.clock.now() + 2)
        await task.refresh()
        with pytest.raises(TaskTimeoutError) as caught:
            await task.wait(timeout=0)
        assert (repr(task) + str(caught.value)).isprintable()


async def test_a_list_that_is_none(emulator: Emulator) -> None:
    """A task list of another shape is our error, not a KeyError."""
    emulator.faults.add(faults.Garbled('{"data": {"a": 1}}', route="list"))
    async with connect(emulator) as session:
        with pytest.raises(InvalidResponseError):
            _ = [row async for row in session.list()]


async def test_stats_cannot_be_changed(session: Session) -> None:
    """What is read off a session is a value, down to what it has learned."""
    await session.generate("A lake")
    stats: Any = session.stats
    with pytest.raises(AttributeError):
        stats.running = 7
    with pytest.raises(TypeError):
        stats.typical["a kind"] = 1.0


async def test_stats(session: Session) -> None:
    """The numbers say what the session did."""
    task = await session.submit("A lake")
    assert session.stats.running == 1
    await task
    stats = session.stats
    assert (stats.running, stats.waiting, stats.submits, stats.retries) == (0, 0, 1, 0)
    assert stats.reads == stats.ids_read >= 1
