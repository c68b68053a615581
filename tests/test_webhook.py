"""Callbacks over real HTTP: genuine, early, late, lost, forged and hostile ones."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import logging
import socket
import struct
import uuid
from collections.abc import AsyncIterator, Callable, MutableMapping
from types import TracebackType
from typing import Any

import aiohttp
import pytest
import uvicorn
from aiohttp import web
from attrs import asdict, define, field, frozen
from attrs.exceptions import FrozenInstanceError

from evolink_async import (
    ConfigurationError,
    PollPolicy,
    RawRequest,
    RequestValidationError,
    RetryPolicy,
    Session,
    Task,
    webhook,
)
from evolink_async.emulator import Emulator, ManualClock, faults
from evolink_async.webhook import CallbackReceiver

PUBLIC = "https://app.example.com/hooks/evolink"
SECRET = "correct horse battery staple"
MODEL = "wan2.5-text-to-image"
KEY = "0123456789abcdef0123456789abcdef"

Make = Callable[..., CallbackReceiver]


@define
class Door:
    """An aiohttp.web application on loopback whose receiver can be put in later."""

    receiver: CallbackReceiver | None = None
    origin: str = ""
    _runner: web.AppRunner | None = field(default=None, init=False)

    async def open(self) -> None:
        app = web.Application()
        app.router.add_route("*", "/hooks/evolink/{token}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        self.origin = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def close(self) -> None:
        assert self._runner is not None
        await self._runner.cleanup()

    async def _handle(self, request: web.Request) -> web.Response:
        if self.receiver is None:
            return web.Response(status=503)
        return await self.receiver.aiohttp_handler(request)

    @property
    def port(self) -> int:
        return int(self.origin.rpartition(":")[2])

    def local(self, url: str) -> str:
        return url.replace("https://app.example.com", self.origin)


@frozen
class Held(faults.RequestFault):
    """Answers once its gate is open; the request has been processed before."""

    arrived: asyncio.Event = field(factory=asyncio.Event, kw_only=True)
    gate: asyncio.Event = field(factory=asyncio.Event, kw_only=True)

    async def after(self, _exchange: Any, response: web.Response) -> web.StreamResponse:
        self.arrived.set()
        await self.gate.wait()
        return response


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until *condition()* holds."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0)


async def submit_overtaken(session: Session, emulator: Emulator, door: Door) -> Task:
    """Submit a generation whose callback comes before the answer to the POST."""
    held = Held(route="submit")
    emulator.faults.add(held)
    submit = asyncio.create_task(session.submit("A lake"))
    await held.arrived.wait()
    assert isinstance(emulator.clock, ManualClock)
    emulator.clock.advance(100)
    await until(lambda: bool(emulator.books.callbacks()))
    assert door.receiver is not None
    assert counted(door.receiver) == {"early": 1}
    held.gate.set()
    return await submit


@pytest.fixture
async def door() -> AsyncIterator[Door]:
    """Where the emulator's callbacks go."""
    door = Door()
    await door.open()
    yield door
    await door.close()


@pytest.fixture
async def emulator(clock: ManualClock, door: Door) -> AsyncIterator[Emulator]:
    """An emulator that calls back; generations end before the first safety read (at 37 s)."""
    async with Emulator(
        clock=clock,
        duration=(10, 30),
        pictures="tiny",
        credits=100_000,
        callback_origin=door.origin,
    ) as emulator:
        yield emulator


def connect(emulator: Emulator, **settings: Any) -> Session:
    return Session(emulator.api_key, base_url=emulator.base_url, clock=emulator.clock, **settings)


@pytest.fixture
async def receiver(session: Session, door: Door) -> CallbackReceiver:
    """The receiver of the session, behind the door."""
    door.receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
    return door.receiver


@pytest.fixture
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """A client for deliveries of the test's own."""
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=10)) as client:
        yield client


def counted(receiver: CallbackReceiver) -> dict[str, int]:
    """What the receiver has counted, zeros left out."""
    return {name: count for name, count in asdict(receiver.stats).items() if count}


def url_of(task: Task) -> str:
    assert task.request is not None
    assert task.request.callback_url is not None
    return task.request.callback_url


def body(task_id: str, **more: Any) -> bytes:
    return json.dumps({"id": task_id, "status": "completed", "progress": 100, **more}).encode()


async def run(session: Session, emulator: Emulator, count: int) -> float:
    """Generate *count* at once; returns the mean delay from end to noticing."""
    tasks = await asyncio.gather(*(session.submit(f"lake {i}") for i in range(count)))
    delays: list[float] = []

    async def noticed(task: Task) -> None:
        await task
        delays.append(emulator.clock.now() - emulator.books.task(task.id).ends_at)

    await asyncio.gather(*map(noticed, tasks))
    return sum(delays) / count


# -- genuine deliveries ------------------------------------------------------------------------


async def test_a_callback_ends_a_task_with_one_read(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """The delivery makes the session look at once, and that look is the only one."""
    task = await session.submit("A peaceful lake")
    await task
    assert emulator.clock.now() - emulator.books.task(task.id).ends_at < 0.1
    assert len(emulator.books.reads(task.id)) == 1
    assert [record.status for record in emulator.books.callbacks(task.id)] == [204]
    assert counted(receiver) == {"nudged": 1}
    assert receiver.stats.received == 1


async def test_many_callbacks_cost_a_read_each(emulator: Emulator, door: Door) -> None:
    """With every callback delivered, a task costs at most 1.1 reads, and few of others."""
    async with connect(emulator, max_in_flight=400) as session:
        door.receiver = CallbackReceiver(session, public_url=PUBLIC)
        delay = await run(session, emulator, 400)
        assert session.stats.reads <= 1.1 * 400
        assert session.stats.ids_read <= 4 * 400
    assert delay < 0.1
    assert counted(door.receiver) == {"nudged": 400}


async def test_lost_callbacks_are_found_by_looking(emulator: Emulator, door: Door) -> None:
    """With one callback in ten lost every task still ends, for fewer reads than polling."""
    emulator.faults.add(faults.CallbackDropped(rate=0.1))
    async with connect(emulator, max_in_flight=100) as session:
        door.receiver = CallbackReceiver(session, public_url=PUBLIC)
        await run(session, emulator, 100)
    received = door.receiver.stats.nudged
    assert 70 < received < 100
    assert door.receiver.stats.received == received
    assert {record.status for record in emulator.books.tasks()} == {"completed"}


async def test_a_dead_endpoint_is_polling(clock: ManualClock) -> None:
    """Where no callback ever comes, reads and delay are within 1.3 of never asking for any."""
    costs = []
    for callback in (None, f"{PUBLIC}/nobody"):
        async with (
            Emulator(clock=clock, duration=(10, 60), pictures="tiny", credits=1e5) as emulator,
            connect(emulator, callback=callback, max_in_flight=10) as session,
        ):
            async for outcome in session.map(f"lake {i}" for i in range(150)):
                assert outcome.result is not None
            records = {record.id: record for record in emulator.books.tasks()}
            delays = [
                entry.time - records[task_id].ends_at
                for entry in emulator.books.reads()
                for task_id in entry.task_ids
                if entry.time >= records[task_id].ends_at
            ]
            costs.append(0.5 * session.stats.reads + sum(delays))
    assert costs[1] <= 1.3 * costs[0]


async def test_a_dead_endpoint_is_noticed_in_a_crowd(clock: ManualClock) -> None:
    """The first missed callbacks hurry the looks at all tasks that wait for theirs."""
    async with (
        Emulator(clock=clock, duration=(10, 60), pictures="tiny", credits=1e5) as emulator,
        connect(emulator, callback=f"{PUBLIC}/nobody", max_in_flight=300) as session,
    ):
        assert await run(session, emulator, 300) < 4


async def test_a_callback_before_the_answer_to_its_submit(
    session: Session, emulator: Emulator, receiver: CallbackReceiver, door: Door
) -> None:
    """A delivery that overtakes the POST's answer is remembered, and acted on at that answer."""
    task = await submit_overtaken(session, emulator, door)
    answered = emulator.clock.now()
    await task
    assert emulator.clock.now() - answered < 0.1
    assert len(emulator.books.reads(task.id)) == 1


async def test_repeats_and_late_ones_cost_nothing(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """Once a task has ended, no delivery earns a read."""
    emulator.faults.add(faults.CallbackDuplicated(4))
    task = await session.submit("A lake")
    await task
    await emulator.clock.sleep_until(emulator.clock.now() + 100)
    assert len(emulator.books.reads(task.id)) == 1
    assert receiver.stats.received == 4  # some before the confirming read was answered
    assert receiver.stats.late >= 2


async def test_a_callback_after_a_look_is_late(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """A delivery about a task whose end was found by looking is recognised as late."""
    emulator.faults.add(faults.CallbackDelayed(300))
    task = await session.submit("A lake")
    await task
    await emulator.clock.sleep_until(emulator.clock.now() + 301)
    assert counted(receiver) == {"late": 1}


async def test_failures_are_told_by_callbacks(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """A failed task's callback ends it like any other; its error comes from the read."""
    emulator.faults.add(faults.TaskFails("content_policy_violation"))
    task = await session.submit("A lake")
    async for _ in task.updates():
        pass
    assert task.status == "failed"
    assert len(emulator.books.reads(task.id)) == 1


# -- the URLs ----------------------------------------------------------------------------------


def test_urls_survive_restarts_and_replicas() -> None:
    """The same secret makes the same URL in any process; another secret, another URL."""
    urls = [
        CallbackReceiver(Session("key"), public_url=url, secret=secret).url_for(KEY)
        for url, secret in ((PUBLIC, SECRET), (f"{PUBLIC}/", SECRET.encode()), (PUBLIC, None))
    ]
    assert urls[0] == urls[1] != urls[2]
    assert urls[0].startswith(f"{PUBLIC}/{KEY}.")
    assert SECRET not in urls[0]


async def test_deliveries_after_a_restart(emulator: Emulator, door: Door) -> None:
    """A task picked up by its id is nudged by the callback its former process asked for."""
    async with connect(emulator) as session:
        door.receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
        task_id = (await session.submit("A lake")).id
    async with connect(emulator, poll=PollPolicy(min_interval=0.5)) as session:
        door.receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
        await session.task(task_id)
    assert counted(door.receiver) == {"nudged": 1}
    assert emulator.clock.now() - emulator.books.task(task_id).ends_at < 0.6


async def test_a_minted_key_keeps_the_url(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """Where a replayed refusal costs the first key, its callback URL is still good."""
    emulator.faults.add(faults.Status(503, route="submit", times=1, replayed=True))
    task = await session.submit("A lake", idempotency_key=KEY)
    assert task.idempotency_key != KEY
    assert url_of(task) == receiver.url_for(KEY)
    await task
    assert counted(receiver) == {"nudged": 1}


async def test_a_callback_per_submit(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """A submit may say otherwise: no callback, a URL, a receiver that is not the default."""
    other = CallbackReceiver(session, public_url=f"{PUBLIC}/b", default=False)
    assert session.callback is receiver
    plain = await session.submit("A lake", callback=None)
    fixed = await session.submit("A lake", callback="https://example.com/a")
    own = await session.submit("A lake", callback_url="https://example.com/b")
    second = await session.submit("A lake", callback=other, idempotency_key=KEY)
    raw = await session.submit(
        RawRequest("/v1/images/generations", body={"model": MODEL, "prompt": "A lake"}),
        idempotency_key=KEY[::-1],
    )
    assert plain.request is not None
    assert plain.request.callback_url is None
    assert url_of(fixed) == "https://example.com/a"
    assert url_of(own) == "https://example.com/b"
    assert url_of(second) == other.url_for(KEY)
    assert url_of(raw) == receiver.url_for(KEY[::-1])
    result = await session.generate("A lake", callback=None)
    assert len(emulator.books.callbacks(result.task_id)) == 0


def test_a_session_takes_what_makes_urls() -> None:
    """Anything else than an address, a maker of addresses or None is refused."""
    assert Session("key", callback=PUBLIC).callback == PUBLIC
    session = Session("key")
    receiver = CallbackReceiver(session, public_url=PUBLIC, default=False)
    assert receiver.session is session
    assert session.callback is None
    session.callback = receiver
    assert session.callback is receiver
    with pytest.raises(ConfigurationError, match="callback=7 is not allowed"):
        session.callback = 7  # type: ignore[assignment]  # what is being tested


async def test_a_maker_of_urls_that_fails(
    session: Session, emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    """Its failure after the POST is logged, and loses no task."""

    class Maker:
        def url_for(self, idempotency_key: str) -> str:
            return f"{PUBLIC}/{idempotency_key}"

        def registered(self, task_id: str, callback_url: str) -> None:
            raise ValueError(task_id, callback_url)

    session.callback = Maker()
    task = await session.submit("A lake")
    assert await task
    assert f"failed to register task {task.id}" in caplog.text
    assert session.stats.running == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"public_url": "http://app.example.com/hooks"}, "its scheme is 'http'"),
        ({"public_url": "https://127.0.0.1/hooks"}, "its host is a loopback address"),
        ({"public_url": f"{PUBLIC}?a=1"}, "it has a query or a fragment"),
        ({"public_url": f"{PUBLIC}#a"}, "it has a query or a fragment"),
        ({"public_url": f"{PUBLIC}/{'a' * 1900}"}, "characters"),
        ({"public_url": None}, "public_url=None is not allowed"),
        ({"public_url": 5}, "public_url=5 is not allowed"),
        ({"public_url": PUBLIC.encode()}, "public_url=b'https"),
        ({"session": None}, "session=None is not allowed"),
        ({"forward": 5}, "forward=5 is not allowed"),
        ({"forward": print}, "forward=<built-in function print> is not allowed"),
        ({"forward": Emulator}, "forward=<class .* is not allowed"),
        ({"forward_after": "1"}, "forward_after='1' is not allowed"),
        ({"forward_after": True}, "forward_after=True is not allowed"),
        ({"forward_after": -1}, "forward_after=-1 is not allowed"),
        ({"forward_after": float("nan")}, "forward_after=nan is not allowed"),
        ({"forward_after": float("inf")}, "forward_after=inf is not allowed"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    """A URL the API would refuse, and values of other types, are refused at once."""
    given: dict[str, Any] = {"session": Session("key"), "public_url": PUBLIC} | settings
    with pytest.raises(ConfigurationError, match=message):
        CallbackReceiver(given.pop("session"), **given)


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        ("too short", "secret has 9 bytes; give at least 16 bytes"),
        ("", "secret has 0 bytes"),
        (20, "secret is of type int, not str or bytes"),
        (123456789.5, "secret is of type float"),
        ([77] * 16, "secret is of type list"),
        (uuid.UUID(int=77), "secret is of type UUID"),
        ("too short for it\udcff", "a lone surrogate"),
    ],
    ids=range(7),
)
def test_secrets_are_checked(secret: Any, message: str) -> None:
    """A secret is text or bytes, and long enough; the message never shows it."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        CallbackReceiver(Session("key"), public_url=PUBLIC, secret=secret)
    for word in ("too short", "20", "123456789", "77", "\udcff"):
        assert word not in str(caught.value)
    assert shown_in_frames(caught.tb, repr(secret)) == []


def shown_in_frames(traceback: TracebackType | None, word: str) -> list[str]:
    """The variables of our own frames that show *word*, as reports of errors print them."""
    found = []
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_filename == webhook.__file__:
            found += [name for name, value in frame.f_locals.items() if word in repr(value)]
        traceback = traceback.tb_next
    return found


def test_the_secret_is_in_no_frame() -> None:
    """A report of a failed setting that prints local variables does not print the secret."""
    with pytest.raises(ConfigurationError) as caught:
        CallbackReceiver(Session("key"), public_url="http://example.com", secret=SECRET)
    assert shown_in_frames(caught.tb, "example.com")
    assert shown_in_frames(caught.tb, SECRET) == []


@pytest.mark.parametrize("kind", [str, str.encode, lambda s: bytearray(s.encode())])
def test_secrets_of_all_kinds(kind: Callable[[str], Any]) -> None:
    """Text, bytes and what holds bytes are one secret; any byte may be in it."""
    urls = {
        CallbackReceiver(Session("key"), public_url=PUBLIC, secret=secret).url_for(KEY)
        for secret in (kind(f"{SECRET} \xff"), memoryview(f"{SECRET} \xff".encode()))
    }
    assert len(urls) == 1


def test_the_secret_does_not_show(session: Session) -> None:
    """Neither repr nor stats hold the secret, and stats cannot be changed."""
    receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
    assert repr(receiver) == f"<CallbackReceiver {PUBLIC}, 0 received>"
    assert SECRET not in repr(receiver.stats)
    with pytest.raises(FrozenInstanceError):
        receiver.stats.nudged = 1  # type: ignore[misc]  # what is being tested


# -- hostile deliveries ------------------------------------------------------------------------


async def test_forged_deliveries_change_nothing(
    session: Session, emulator: Emulator, door: Door, http: aiohttp.ClientSession
) -> None:
    """Two thousand deliveries to made-up paths cost no read; the genuine one still counts."""
    receiver = door.receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
    forger = CallbackReceiver(Session("key"), public_url=PUBLIC, secret="x" * 16)
    task = await session.submit("A lake")
    path = door.local(forger.url_for(task.idempotency_key or ""))
    lie = body(task.id, results=["https://evil.example/x.png"])
    payload = (
        f"POST {path.removeprefix(door.origin)} HTTP/1.1\r\nHost: x\r\n"
        f"Content-Length: {len(lie)}\r\n\r\n"
    ).encode() + lie
    with emulator.clock.hold():  # type: ignore[attr-defined]  # a ManualClock
        answers = await asyncio.gather(*(flood(door.port, payload, 100) for _ in range(20)))
    assert sum(answers) == 2000
    assert counted(receiver) == {"forged": 2000}
    assert emulator.books.reads() == ()
    assert not task.done()
    result = await task
    assert "evil" not in "".join(result.urls)
    assert counted(receiver) == {"forged": 2000, "nudged": 1}


async def flood(port: int, payload: bytes, count: int) -> int:
    """Send *payload* so often over one raw connection; returns the answers that came."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answers = 0
    for _ in range(count):
        writer.write(payload)
        answers += (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 404")
        await reader.readexactly(0)
    writer.close()
    await writer.wait_closed()
    return answers


async def test_a_leaked_url_costs_a_read_per_interval(emulator: Emulator, door: Door) -> None:
    """Who knows a task's URL can have it read once per min_interval, until it has ended."""
    async with connect(emulator, poll=PollPolicy(min_interval=2)) as session:
        receiver = door.receiver = CallbackReceiver(session, public_url=PUBLIC)
        task = await session.submit("A lake")
        record = emulator.books.task(task.id)
        start = emulator.clock.now()
        while not task.done():
            for _ in range(20):
                assert await receiver.deliver(url_of(task), body(task.id)) == 204
            await emulator.clock.sleep_until(emulator.clock.now() + 0.1)
        assert len(emulator.books.reads(task.id)) <= (record.ends_at - start) / 2 + 2
        assert receiver.stats.nudged > 1000
        assert await receiver.deliver(url_of(task), body(task.id)) == 204
        assert receiver.stats.late == 1


async def test_nudges_during_reads_keep_the_interval(emulator: Emulator) -> None:
    """Deliveries while a read is in the air earn one more, an interval later, not at once."""
    held = Held(route="read", nth=1)
    emulator.faults.add(held)
    async with connect(emulator, poll=PollPolicy(min_interval=2)) as session:
        task = await session.submit("A lake", callback=f"{PUBLIC}/x")
        look = asyncio.create_task(task.refresh())
        await held.arrived.wait()
        for _ in range(100):
            assert session.nudge(task.id)
        held.gate.set()
        await look
        await emulator.clock.sleep_until(emulator.clock.now() + 5)
        first, second = [entry.time for entry in emulator.books.reads(task.id)]
    assert second - first == pytest.approx(2, abs=0.01)


async def test_nudges_do_not_hurry_failing_reads(emulator: Emulator) -> None:
    """While reads fail, deliveries do not make their retries any more frequent."""
    emulator.faults.add(faults.Status(500, route="read"))
    async with connect(emulator, retry=RetryPolicy(wait_initial=1)) as session:
        task = await session.submit("A lake")
        end = emulator.clock.now() + 30
        while emulator.clock.now() < end:
            session.nudge(task.id)
            await emulator.clock.sleep_until(emulator.clock.now() + 0.1)
        assert 1 < len(emulator.books.reads(task.id)) < 20


async def test_nudges_take_no_strangers_along(emulator: Emulator) -> None:
    """The read a callback earns asks for its own task only; the others are due much later."""
    async with connect(emulator) as session:
        session.callback = f"{PUBLIC}/x"
        tasks = [await session.submit(f"lake {i}") for i in range(20)]
        assert session.nudge(tasks[6].id)  # not one of those that are looked at anyway
        assert not session.nudge("task-unified-nobody")
        await tasks[6].refresh()
        assert emulator.books.reads()[0].task_ids == (tasks[6].id,)
    assert not Session("key").nudge("task-unified-nobody")


async def test_a_token_is_for_its_own_task(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """The URL of one task cannot make the session look at another."""
    first, second = [await session.submit(f"lake {i}") for i in range(2)]
    plain = await session.submit("lake", callback=None)
    assert await receiver.deliver(url_of(first), body(second.id)) == 404
    assert await receiver.deliver(url_of(first), body(plain.id)) == 404
    assert counted(receiver) == {"forged": 2}
    assert emulator.books.reads() == ()


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "/hooks/evolink/",
        f"/{KEY}",
        f"/{KEY}.",
        f"/{KEY}." + "A" * 43,
        "/" + "A" * 100_000,
        f"/{KEY}." + "\u0661" * 43,
        "/\udcff\x00",
    ],
    ids=range(9),
)
async def test_paths_that_are_not_ours(receiver: CallbackReceiver, path: str) -> None:
    """A path of any shape without the signature is unknown."""
    assert await receiver.deliver(path, body("task-unified-1")) == 404
    assert counted(receiver) == {"forged": 1}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"id": 7}',
        b'{"id": "../../etc"}',
        b'{"id": "...."}',
        b"\xff\xfe\x00",
        b"[" * 200_000,
        b"1" * 10_000,
    ],
    ids=range(11),
)
async def test_bodies_that_are_no_tasks(receiver: CallbackReceiver, data: bytes) -> None:
    """A body of any shape without a task's id is counted and forgotten."""
    assert await receiver.deliver(receiver.url_for(KEY), data) == 400
    assert counted(receiver) == {"malformed": 1}


async def test_other_methods(
    receiver: CallbackReceiver, door: Door, http: aiohttp.ClientSession
) -> None:
    """Only POSTs are deliveries; the answer says so."""
    url = door.local(receiver.url_for(KEY))
    async with http.get(url) as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
    async with http.put(url, data=body("task-unified-1")) as response:
        assert response.status == 405
    assert counted(receiver) == {"wrong_method": 2}


async def test_huge_bodies(
    receiver: CallbackReceiver, door: Door, http: aiohttp.ClientSession
) -> None:
    """A body longer than any task is not read to its end, whether it says its length or not."""
    url = door.local(receiver.url_for(KEY))
    assert await receiver.deliver(url, b" " * 300_000) == 413
    written = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal written
        while True:
            written += 1 << 16
            yield b" " * (1 << 16)

    for data in (io.BytesIO(b" " * (64 << 20)), endless()):
        try:
            async with http.post(url, data=data) as response:
                assert response.status == 413
        except aiohttp.ClientConnectionError:
            pass  # cut off before the client had read the answer
    assert counted(receiver) == {"too_large": 3}
    assert written < 64 << 20


async def test_bombs_are_not_unpacked(
    receiver: CallbackReceiver, door: Door, http: aiohttp.ClientSession
) -> None:
    """A compressed body is turned away before any of it is read."""
    headers = {"Content-Encoding": "gzip"}
    url = door.local(receiver.url_for(KEY))
    bomb = gzip.compress(b" " * (32 << 20))
    try:
        async with http.post(url, data=bomb, headers=headers) as response:
            assert response.status == 415
    except aiohttp.ClientConnectionError:
        pass  # see above
    assert counted(receiver) == {"compressed": 1}


async def test_slow_and_broken_bodies(
    receiver: CallbackReceiver, door: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that does not come in time, or not whole, is given up."""
    monkeypatch.setattr(webhook, "_SLOWEST", 0.05)
    path = receiver.url_for(KEY).removeprefix("https://app.example.com")
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(head)
    assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    writer.close()
    monkeypatch.setattr(webhook, "_SLOWEST", 10)
    _, writer = await asyncio.open_connection("127.0.0.1", door.port)
    writer.write(head)
    await writer.drain()
    await asyncio.sleep(0.02)
    writer.close()
    while receiver.stats.received < 2:  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0)
    assert counted(receiver) == {"too_slow": 1, "malformed": 1}


@pytest.mark.parametrize("end", ["fin", "rst"])
@pytest.mark.parametrize("reason", ["forged", "malformed"])
async def test_cut_deliveries_leave_no_trace(
    receiver: CallbackReceiver,
    door: Door,
    caplog: pytest.LogCaptureFixture,
    end: str,
    reason: str,
) -> None:
    """Who leaves in the middle of a body cannot fill the log of the server."""
    path = receiver.url_for(KEY).removeprefix("https://app.example.com")
    path = path if reason == "malformed" else path[:-8] + "AAAAAAAA"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", door.port)) as connection:
            connection.sendall(head)
            if end == "rst":
                no_wait = struct.pack("ii", 1, 0)
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, no_wait)
    await until(lambda: receiver.stats.received == 20)
    await asyncio.sleep(0.02)
    assert counted(receiver) == {reason: 20}
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


@pytest.mark.parametrize(
    ("path", "data"),
    [(None, b""), (b"/x", b""), ("/x", None), ("/x", '{"id": "task-1"}'), ("/x", {"id": 1})],
)
async def test_deliver_says_what_it_takes(receiver: CallbackReceiver, path: Any, data: Any) -> None:
    """A path that is no text and a body that is no bytes are mistakes of the caller."""
    with pytest.raises(ConfigurationError, match="the path as str and the body as bytes"):
        await receiver.deliver(path, data)
    assert receiver.stats.received == 0


async def test_what_stands_around_the_token(receiver: CallbackReceiver) -> None:
    """A query and a path in front do not matter, a slash behind does; any bytes are a body."""
    url = receiver.url_for(KEY)
    token = url.rpartition("/")[2]
    data = body("task-unified-1")
    assert await receiver.deliver(f"{url}?a=/b", bytearray(data)) == 204
    assert await receiver.deliver(f"/elsewhere/{token}", memoryview(data)) == 204
    assert await receiver.deliver(f"{url}/", data) == 404
    assert counted(receiver) == {"early": 1, "late": 1, "forged": 1}


async def test_other_loops_are_refused(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """A delivery or nudge in another thread touches nothing, and is told where it belongs."""
    task = await session.submit("A lake")

    def deliver() -> int:
        return asyncio.run(receiver.deliver(url_of(task), body(task.id)))

    for call in (deliver, lambda: receiver.nudge(task.id)):
        with (
            emulator.clock.hold(),  # type: ignore[attr-defined]  # a ManualClock
            pytest.raises(ConfigurationError, match="another event loop"),
        ):
            await asyncio.to_thread(call)
    assert receiver.stats.received == 0
    assert emulator.books.reads() == ()


async def test_a_closed_session_takes_no_callbacks(emulator: Emulator, door: Door) -> None:
    """After a session's end the sender is asked to try again, and reaches the next one."""
    async with connect(emulator) as session:
        door.receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
        task = await session.submit("A lake")
    await emulator.clock.sleep_until(emulator.books.task(task.id).ends_at + 0.5)
    assert await door.receiver.deliver(f"{PUBLIC}/x", body(task.id)) == 404
    assert counted(door.receiver) == {"closed": 1, "forged": 1}
    assert door.receiver.stats.received == 2
    async with connect(emulator) as session:
        door.receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
        await emulator.clock.sleep_until(emulator.clock.now() + 1)
        assert [sent.status for sent in emulator.books.callbacks(task.id)] == [503, 204]
        assert counted(door.receiver) == {"early": 1}


async def test_what_is_remembered_is_bounded(
    session: Session, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown ids are forgotten after a while, and the oldest where there are too many."""
    monkeypatch.setattr(webhook, "_REMEMBERED", 3)
    receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
    urls = [receiver.url_for(f"{KEY}{i}") for i in range(5)]
    for url in urls:
        await receiver.deliver(url, body("task-unified-1"))
    assert counted(receiver) == {"early": 5}
    await receiver.deliver(urls[4], body("task-unified-1"))
    await receiver.deliver(urls[0], body("task-unified-1"))
    assert counted(receiver) == {"early": 6, "late": 1}
    await emulator.clock.sleep_until(emulator.clock.now() + 601)
    await receiver.deliver(urls[4], body("task-unified-1"))
    assert counted(receiver) == {"early": 7, "late": 1}


async def test_one_url_is_of_few_ids(session: Session, emulator: Emulator) -> None:
    """Who found a URL cannot fill the memory, nor the other replicas, with ids made up."""
    receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
    url = receiver.url_for(KEY)
    answers = [await receiver.deliver(url, body(f"task-unified-{k}")) for k in range(6)]
    assert answers == [204] * 4 + [404] * 2
    assert counted(receiver) == {"early": 4, "forged": 2}


async def test_own_urls_are_known_in_any_number(
    session: Session, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest URLs of the session's own tasks stay known, however many deliveries come."""
    monkeypatch.setattr(webhook, "_KNOWN", 3)
    monkeypatch.setattr(webhook, "_REMEMBERED", 1)
    receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
    urls = [receiver.url_for(f"{KEY}{k}") for k in range(4)]
    for k, url in enumerate(urls):
        receiver.registered(f"task-unified-{k}", url)
        receiver.registered(f"task-unified-{k}", url)
    for url in urls:
        await receiver.deliver(url, body("task-unified-1"))
    assert counted(receiver) == {"early": 1, "late": 3}


# -- replicas ----------------------------------------------------------------------------------


async def test_replicas_forward_what_is_not_theirs(emulator: Emulator, door: Door) -> None:
    """A delivery to the wrong replica reaches the right one by its hook, once per URL."""
    async with connect(emulator) as mine, connect(emulator) as theirs:
        forwarded: list[str] = []

        async def forward(task_id: str) -> None:
            forwarded.append(task_id)
            right.nudge(task_id)

        right = CallbackReceiver(mine, public_url=PUBLIC, secret=SECRET)
        wrong = CallbackReceiver(theirs, public_url=PUBLIC, secret=SECRET, forward=forward)
        door.receiver = wrong
        emulator.faults.add(faults.CallbackDuplicated(3))
        task = await mine.submit("A lake")
        await task
        assert emulator.clock.now() - emulator.books.task(task.id).ends_at < 1.2
        await emulator.clock.sleep_until(emulator.clock.now() + 10)
        assert forwarded == [task.id]
        assert counted(wrong) == {"early": 1, "late": 2, "forwarded": 1}
        assert len(emulator.books.reads(task.id)) == 1
        await wrong.aclose()


async def test_a_lie_does_not_waste_the_forward(emulator: Emulator) -> None:
    """A wrong id on a URL that was found out does not keep the right one from its replica."""
    async with connect(emulator) as session:
        forwarded: list[str] = []

        async def forward(task_id: str) -> None:
            forwarded.append(task_id)

        receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET, forward=forward)
        url = receiver.url_for(KEY)
        for task_id in ("task-unified-lie", "task-unified-true", "task-unified-true"):
            assert await receiver.deliver(url, body(task_id)) == 204
        await emulator.clock.sleep_until(emulator.clock.now() + 2)
        assert forwarded == ["task-unified-lie", "task-unified-true"]
        assert counted(receiver) == {"early": 2, "late": 1, "forwarded": 2}


async def test_own_callbacks_are_never_forwarded(emulator: Emulator, door: Door) -> None:
    """A callback that comes long after its task was submitted, and ended, is still known."""
    emulator.faults.add(faults.CallbackDelayed(300))
    emulator.faults.add(faults.TaskHangs())
    async with connect(emulator) as session:
        forwarded: list[str] = []

        async def forward(task_id: str) -> None:
            forwarded.append(task_id)

        door.receiver = CallbackReceiver(session, public_url=PUBLIC, forward=forward)
        task = await session.submit("A lake")
        await emulator.clock.sleep_until(emulator.clock.now() + 1500)
        emulator.complete(task.id)
        await task
        await emulator.clock.sleep_until(emulator.clock.now() + 310)
        assert counted(door.receiver) == {"late": 1}
        assert forwarded == []


async def test_a_nudge_may_come_before_the_answer(session: Session, emulator: Emulator) -> None:
    """A replica told of a task whose submit is in the air looks at it when that is answered."""
    receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
    task = await session.submit("A lake", idempotency_key=KEY)
    url = url_of(task)
    await task
    before = len(emulator.books.reads())
    assert not receiver.nudge("task-unified-early")
    receiver.registered("task-unified-early", url)
    assert len(emulator.books.reads()) == before
    with pytest.raises(RequestValidationError, match="task_id"):
        receiver.nudge("../x")


async def test_what_is_registered_in_time_is_not_forwarded(
    session: Session, emulator: Emulator, door: Door
) -> None:
    """A callback a little ahead of the answer to its submit stays here."""
    forwarded: list[str] = []

    async def forward(task_id: str) -> None:
        forwarded.append(task_id)

    door.receiver = CallbackReceiver(
        session, public_url=PUBLIC, secret=SECRET, forward=forward, forward_after=200
    )
    task = await submit_overtaken(session, emulator, door)
    await task
    await emulator.clock.sleep_until(emulator.clock.now() + 500)
    assert forwarded == []
    assert door.receiver.stats.early == 1


async def test_a_hook_that_fails(
    session: Session,
    emulator: Emulator,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its error is logged; ids beyond the bound are not forwarded, nor any after aclose."""
    monkeypatch.setattr(webhook, "_FORWARDS", 1)

    async def forward(task_id: str) -> None:
        raise OSError("no queue")

    receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET, forward=forward)
    for k in range(3):
        await receiver.deliver(receiver.url_for(f"{KEY}{k}"), body("task-unified-1"))
    with caplog.at_level(logging.ERROR):
        await emulator.clock.sleep_until(emulator.clock.now() + 5)
    assert "forwarding the callback of task task-unified-1 failed" in caplog.text
    assert receiver.stats.forwarded == 1
    await receiver.deliver(receiver.url_for(f"{KEY}9"), body("task-unified-1"))
    await receiver.aclose()
    await emulator.clock.sleep_until(emulator.clock.now() + 5)
    assert receiver.stats.forwarded == 1


async def test_a_hook_that_hangs(
    session: Session,
    emulator: Emulator,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A call that never returns is given up, and makes room for the next; the rest is counted."""
    monkeypatch.setattr(webhook, "_FORWARDS", 2)
    monkeypatch.setattr(webhook, "_FORWARD_SECONDS", 0.02)
    called: list[str] = []

    async def forward(task_id: str) -> None:
        called.append(task_id)
        await asyncio.Event().wait()

    receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET, forward=forward)
    for k in range(5):
        await receiver.deliver(receiver.url_for(f"{KEY}{k}"), body(f"task-unified-{k}"))
    assert counted(receiver) == {"early": 5, "dropped": 3}
    assert receiver.stats.received == 5
    await emulator.clock.sleep_until(emulator.clock.now() + 2)
    await until(lambda: caplog.text.count("failed (it may take 0.02 s)") == 2)
    await until(lambda: not receiver._forwards)
    await receiver.deliver(receiver.url_for(f"{KEY}9"), body("task-unified-9"))
    await emulator.clock.sleep_until(emulator.clock.now() + 2)
    await until(lambda: len(called) == 3)
    assert called == ["task-unified-0", "task-unified-1", "task-unified-9"]
    assert caplog.text.count("2 ids wait to be forwarded") == 1
    await receiver.aclose()
    await receiver.deliver(receiver.url_for(f"{KEY}10"), body("task-unified-10"))
    await emulator.clock.sleep_until(emulator.clock.now() + 2)
    assert len(called) == 3


async def test_a_hook_that_is_not_async(
    session: Session, emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    """A plain function as hook is called, and told what it should have been."""
    called: list[str] = []

    def forward(task_id: str) -> None:
        called.append(task_id)

    receiver = CallbackReceiver(
        session,
        public_url=PUBLIC,
        forward=forward,  # type: ignore[arg-type]  # what is being tested
    )
    await receiver.deliver(receiver.url_for(KEY), body("task-unified-1"))
    await emulator.clock.sleep_until(emulator.clock.now() + 2)
    assert called == ["task-unified-1"]
    assert "returned NoneType, which cannot be awaited; make it an async function" in caplog.text


# -- ASGI --------------------------------------------------------------------------------------

Message = MutableMapping[str, Any]


async def ask(
    receiver: CallbackReceiver, scope: dict[str, Any], *messages: dict[str, Any]
) -> list[Message]:
    """What the ASGI application sends when it is called like that."""
    incoming = list(messages)
    sent: list[Message] = []

    async def receive() -> Message:
        return incoming.pop(0)

    async def send(message: Message) -> None:
        sent.append(message)

    await receiver.asgi(scope, receive, send)
    return sent


def scope(path: str, **more: Any) -> dict[str, Any]:
    return {"type": "http", "method": "POST", "path": path, "headers": [], **more}


def chunk(data: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": data, "more_body": more}


async def test_asgi_deliveries(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """The ASGI application takes a delivery in pieces and answers with an empty 204."""
    task = await session.submit("A lake")
    data = body(task.id)
    sent = await ask(
        receiver, scope(url_of(task)), chunk(data[:5], more=True), chunk(data[5:], more=False)
    )
    assert sent == [
        {"type": "http.response.start", "status": 204, "headers": []},
        {"type": "http.response.body", "body": b""},
    ]
    assert counted(receiver) == {"nudged": 1}


@pytest.mark.parametrize(
    ("more", "messages", "status", "reason"),
    [
        ({"method": "GET"}, [], 405, "wrong_method"),
        ({"headers": [(b"content-encoding", b"br")]}, [], 415, "compressed"),
        ({"headers": [(b"content-length", b"999999")]}, [], 413, "too_large"),
        ({"headers": [(b"content-length", b"junk")]}, [chunk(b"")], 400, "malformed"),
        ({}, [chunk(b" " * 200_000, more=True)] * 2, 413, "too_large"),
        ({}, [chunk(b"{", more=True), {"type": "http.disconnect"}], 400, "malformed"),
        ({"path": "/hooks/evolink/x"}, [], 404, "forged"),
    ],
)
async def test_asgi_refusals(
    receiver: CallbackReceiver,
    more: dict[str, Any],
    messages: list[dict[str, Any]],
    status: int,
    reason: str,
) -> None:
    """What is refused is read no further, and its connection closed, where that can be said."""
    given = scope(receiver.url_for(KEY)) | more
    start, _ = await ask(receiver, given, *messages)
    assert start["status"] == status
    assert dict(start["headers"])[b"connection"] == b"close"
    start, _ = await ask(receiver, given | {"http_version": "2"}, *messages)
    assert b"connection" not in dict(start["headers"])
    assert counted(receiver) == {reason: 2}


async def test_asgi_alone(receiver: CallbackReceiver) -> None:
    """Run by itself it goes along with a server's start and stop, and takes no websockets."""
    stages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]
    sent = await ask(receiver, {"type": "lifespan"}, *stages)
    assert [m["type"] for m in sent] == ["lifespan.startup.complete", "lifespan.shutdown.complete"]
    (closed,) = await ask(receiver, {"type": "websocket"})
    assert closed["type"] == "websocket.close"
    assert receiver.stats.received == 0


async def test_asgi_under_a_server(
    receiver: CallbackReceiver, http: aiohttp.ClientSession, unused_tcp_port: int
) -> None:
    """A server that is given the receiver and told nothing more takes it for ASGI 3."""
    config = uvicorn.Config(receiver.asgi, port=unused_tcp_port, ws="none", log_level="error")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    await until(lambda: server.started or serving.done())
    assert server.started
    url = receiver.url_for(KEY).replace(
        "https://app.example.com", f"http://127.0.0.1:{unused_tcp_port}"
    )
    async with http.post(url, data=body("task-unified-1")) as response:
        assert response.status == 204
    server.should_exit = True
    await serving
    assert counted(receiver) == {"early": 1}


@pytest.mark.parametrize(
    "callback",
    [
        CallbackReceiver(Session("key"), public_url=PUBLIC),
        CallbackReceiver,
        "http://127.0.0.1/hooks",
        7,
    ],
    ids=["another's", "the class", "not https", "a number"],
)
async def test_callbacks_that_would_be_in_vain_are_refused(session: Session, callback: Any) -> None:
    """A receiver of another session, its class or no https address is refused at once."""
    with pytest.raises(ConfigurationError, match="callback="):
        Session("key", callback=callback)
    with pytest.raises(ConfigurationError, match="callback="):
        await session.submit("A lake", callback=callback)
    with pytest.raises(ConfigurationError, match="callback="):
        session.callback = callback
