"""Callbacks as the API's page describes them, and with faults, to a real receiver."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from attrs import define, field
from emulator_caller import Caller, calling

from evolink_async.emulator import Emulator, ManualClock
from evolink_async.emulator.faults import (
    CallbackDelayed,
    CallbackDropped,
    CallbackDuplicated,
    CallbackForged,
    CallbackReordered,
    TaskFails,
    TaskHangs,
)

START = 1757156493.0
URL = "https://app.example.com/hooks/evolink?token=1"


@define
class Receiver:
    """Keeps what is POSTed to it; answers with the given statuses, then with 200."""

    clock: ManualClock
    origin: str = ""
    statuses: list[int] = field(factory=list)
    bodies: list[Any] = field(factory=list)
    times: list[float] = field(factory=list)
    paths: list[str] = field(factory=list)
    arrived: asyncio.Event = field(factory=asyncio.Event)

    async def receive(self, request: web.Request) -> web.Response:
        self.bodies.append(await request.json())
        self.times.append(self.clock.now() - START)
        self.paths.append(request.path_qs)
        self.arrived.set()
        return web.Response(status=self.statuses.pop(0) if self.statuses else 200)

    @property
    def seen(self) -> list[tuple[float, str]]:
        return [(time, body["status"]) for time, body in zip(self.times, self.bodies, strict=True)]


@pytest.fixture
async def receiver(clock: ManualClock) -> AsyncIterator[Receiver]:
    """A receiver of callbacks on loopback."""
    receiver = Receiver(clock)
    app = web.Application()
    app.router.add_post("/{tail:.*}", receiver.receive)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    receiver.origin = f"http://127.0.0.1:{runner.addresses[0][1]}"
    yield receiver
    await runner.cleanup()


@pytest.fixture
async def emulator(clock: ManualClock, receiver: Receiver) -> AsyncIterator[Emulator]:
    """An emulator that sends its callbacks there; generations take 100 s."""
    async with Emulator(
        clock=clock, pictures="tiny", duration=100, callback_origin=receiver.origin
    ) as emulator:
        yield emulator


@pytest.fixture
async def api(emulator: Emulator) -> AsyncIterator[Caller]:
    """A caller of that emulator."""
    async with calling(emulator) as caller:
        yield caller


async def test_a_callback_comes_when_the_task_ends(
    api: Caller, emulator: Emulator, receiver: Receiver, clock: ManualClock
) -> None:
    """The callback is POSTed to the path given, after billing, with the body of a read."""
    name = await api.task(callback_url=URL)
    await clock.sleep_until(START + 200)
    assert receiver.seen == [(100, "completed")]
    assert receiver.paths == ["/hooks/evolink?token=1"]
    assert receiver.bodies[0] == await api.read(name)
    assert emulator.books.task(name).charged == 1
    (record,) = emulator.books.callbacks(name)
    assert (record.status, record.attempt, record.forged) == (200, 1, False)
    assert record.url == receiver.origin + receiver.paths[0]


async def test_a_failed_callback_is_repeated(
    api: Caller, emulator: Emulator, receiver: Receiver, clock: ManualClock
) -> None:
    """After a failure it comes again 1, 2 and 4 s later, and then no more."""
    receiver.statuses = [500, 302, 404, 503]
    await api.task(callback_url=URL)
    await clock.sleep_until(START + 200)
    assert receiver.times == [100, 101, 103, 107]
    assert [each.attempt for each in emulator.books.callbacks()] == [1, 2, 3, 4]


async def test_any_2xx_ends_the_repeats(
    api: Caller, receiver: Receiver, clock: ManualClock
) -> None:
    """A 204 after a failure is success."""
    receiver.statuses = [500, 204]
    await api.task(callback_url="https://app.example.com")
    await clock.sleep_until(START + 200)
    assert receiver.times == [100, 101]
    assert receiver.paths == ["/", "/"]


async def test_nobody_there_is_a_failure(clock: ManualClock, receiver: Receiver) -> None:
    """A receiver that is not there is tried four times and recorded without a status."""
    async with (
        Emulator(clock=clock, pictures="tiny", callback_origin="http://127.0.0.1:9") as emulator,
        calling(emulator) as api,
    ):
        await api.task(callback_url=URL)
        await clock.sleep_until(START + 200)
        assert [each.status for each in emulator.books.callbacks()] == [None] * 4


async def test_failures_are_called_back_too(
    api: Caller, emulator: Emulator, receiver: Receiver, clock: ManualClock
) -> None:
    """Failed and cancelled tasks have callbacks; running ones and repeats have none."""
    emulator.faults.add(TaskFails("service_error", at=0.5, nth=1), TaskHangs(nth=3))
    await api.task(callback_url=URL)
    cancelled = await api.task(callback_url=URL)
    hanging = await api.task(callback_url=URL)
    await api.task()
    emulator.cancel(cancelled)
    await clock.sleep_until(START + 200)
    assert sorted(status for _, status in receiver.seen) == ["cancelled", "failed"]
    assert emulator.books.callbacks(hanging) == ()


async def test_a_replayed_submit_has_one_callback(
    api: Caller, receiver: Receiver, clock: ManualClock
) -> None:
    """Submitting again with the same key calls back once."""
    for _ in range(2):
        await api.submit("key-of-sixteen-chars", callback_url=URL)
    await clock.sleep_until(START + 200)
    assert len(receiver.bodies) == 1


async def test_a_task_ended_by_hand_calls_back_at_once(
    api: Caller, emulator: Emulator, receiver: Receiver
) -> None:
    """Completing a task brings its callback forward."""
    name = await api.task(callback_url=URL)
    emulator.complete(name)
    await receiver.arrived.wait()
    assert receiver.bodies[0]["status"] == "completed"


async def test_without_an_origin_nothing_is_sent(clock: ManualClock) -> None:
    """By default no host is contacted."""
    async with (
        Emulator(clock=clock, pictures="tiny") as emulator,
        calling(emulator) as api,
    ):
        emulator.complete(await api.task(callback_url=URL))
        await clock.sleep_until(START + 200)
        assert emulator.books.callbacks() == ()


@pytest.mark.parametrize("origin", ["", "ftp://x", "app.example.com"])
def test_the_origin_is_checked(origin: str) -> None:
    """A callback origin that is not an http origin is refused."""
    with pytest.raises(ValueError, match="callback_origin must be an origin such as"):
        Emulator(pictures="tiny", callback_origin=origin)


async def test_a_callback_may_be_dropped_delayed_or_doubled(
    api: Caller, emulator: Emulator, receiver: Receiver, clock: ManualClock
) -> None:
    """Callbacks may never come, come late, or come again."""
    emulator.faults.add(
        CallbackDropped(prompt="drop"),
        CallbackDelayed(30, prompt="late"),
        CallbackDuplicated(3, prompt="again"),
    )
    ids = {
        prompt: await api.task(prompt=prompt, callback_url=URL)
        for prompt in ("drop", "late", "again")
    }
    await clock.sleep_until(START + 200)
    times: dict[str, list[float]] = {prompt: [] for prompt in ids}
    for time, body in zip(receiver.times, receiver.bodies, strict=True):
        times[next(prompt for prompt, name in ids.items() if name == body["id"])].append(time)
    assert times == {"drop": [], "late": [130], "again": [100, 100, 100]}


async def test_the_callback_of_one_task_may_have_a_fault(
    api: Caller, emulator: Emulator, receiver: Receiver, clock: ManualClock
) -> None:
    """A callback fault may be about one task, and be added while it runs."""
    names = [await api.task(callback_url=URL) for _ in range(2)]
    emulator.faults.add(dropped := CallbackDropped(task=names[0]))
    await clock.sleep_until(START + 200)
    assert [body["id"] for body in receiver.bodies] == names[1:]
    assert emulator.faults.struck(dropped) == 1


async def test_a_task_fault_added_late_moves_the_callback(
    api: Caller, emulator: Emulator, receiver: Receiver, clock: ManualClock
) -> None:
    """A running task that is made to fail earlier sends its callback then."""
    name = await api.task(callback_url=URL)
    await clock.sleep_until(START + 20)
    emulator.faults.add(TaskFails(at=0, task=name))
    await clock.sleep_until(START + 200)
    assert receiver.seen == [(20, "failed")]


async def test_callbacks_may_come_in_another_order(
    api: Caller, emulator: Emulator, receiver: Receiver, clock: ManualClock
) -> None:
    """A callback may let the next go first, but does not wait for ever."""
    emulator.faults.add(CallbackReordered(nth=(1, 3), seconds=60))
    names = []
    for _ in range(3):
        names.append(await api.task(callback_url=URL))
        await clock.sleep_until(clock.now() + 10)
    await clock.sleep_until(START + 300)
    assert [body["id"] for body in receiver.bodies] == [names[1], names[0], names[2]]
    assert receiver.times == [110, 110, 180]


async def test_a_callback_may_be_forged(
    api: Caller, emulator: Emulator, receiver: Receiver, clock: ManualClock
) -> None:
    """A forged callback says that a running task has ended; the true one comes as well."""
    emulator.faults.add(CallbackForged("completed", "https://attacker.example/x.png"))
    name = await api.task(callback_url=URL)
    await receiver.arrived.wait()
    assert (await api.read(name))["status"] != "completed"
    assert receiver.bodies[0]["results"] == ["https://attacker.example/x.png"]
    await clock.sleep_until(START + 200)
    assert [each.forged for each in emulator.books.callbacks(name)] == [True, False]


async def test_closing_sends_no_more(clock: ManualClock, receiver: Receiver) -> None:
    """An emulator that closes drops the callbacks that are due later."""
    async with (
        Emulator(clock=clock, pictures="tiny", callback_origin=receiver.origin) as emulator,
        calling(emulator) as api,
    ):
        with clock.hold():
            await api.task(callback_url=URL)
            await emulator.aclose()
    await clock.sleep_until(START + 200)
    assert receiver.bodies == []
