"""The watcher alone: virtual time, and a network that answers what a test tells it to."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import math
import time
import weakref
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise
from typing import Any

import pytest
from attrs import define, field, frozen

from evolink_async import (
    APIConnectionError,
    AuthenticationError,
    EvolinkError,
    ImageRequest,
    InvalidRequestError,
    InvalidResponseError,
    NotFoundError,
    PollPolicy,
    RetryPolicy,
    ServerError,
    SessionClosedError,
    TaskSnapshot,
    TaskTimeoutError,
)
from evolink_async._polling.watch import Watch
from evolink_async._polling.watcher import Watcher
from evolink_async.emulator import ManualClock
from evolink_async.errors import APIStatusError

Answer = TaskSnapshot | EvolinkError | None
REQUEST = ImageRequest("A lake")


def task(task_id: str, status: str = "processing", **more: Any) -> TaskSnapshot:
    value = {"id": task_id, "status": status, **more}
    return TaskSnapshot.from_json(value, body=json.dumps(value).encode())


def refusal(kind: type[APIStatusError], status: int, *, from_api: bool = True) -> APIStatusError:
    return kind(f"HTTP {status}", status=status, from_api=from_api)


@frozen(kw_only=True)
class Polled:
    sent_at: float
    received_at: float
    answers: Mapping[str, Answer]


@define
class BreakingClock:
    """Real time that fails once it was asked *left* times."""

    left: int

    def now(self) -> float:
        self.left -= 1
        if self.left < 0:
            raise ZeroDivisionError("a clock")
        return time.monotonic()

    async def sleep_until(self, when: float) -> None:
        await asyncio.sleep(when - self.now())

    def hold(self) -> AbstractContextManager[None]:
        return nullcontext()


@define
class FakeNetwork:
    """Answers each id by asking *say*; notes which ids were asked for when."""

    clock: ManualClock | BreakingClock
    say: Callable[[str], Answer] = task
    read_limit: int = 1
    limit_after: int | None = None
    sizes: list[int] = field(factory=list)
    asked: list[tuple[float, str]] = field(factory=list)
    release: asyncio.Event | None = None
    in_flight: int = 0
    peak: int = 0
    renewed: int = 0

    def fetch(self, ids: tuple[str, ...]) -> Coroutine[Any, Any, Polled]:
        if self.limit_after is not None:
            self.read_limit = self.limit_after
        return self._fetch(ids)

    async def _fetch(self, ids: tuple[str, ...]) -> Polled:
        now = self.clock.now()
        self.asked += [(now, task_id) for task_id in ids]
        self.sizes.append(len(ids))
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        try:
            with self.clock.hold():
                await asyncio.sleep(0)
            if self.release is not None:
                await self.release.wait()
        finally:
            self.in_flight -= 1
        return Polled(
            sent_at=now,
            received_at=self.clock.now(),
            answers={task_id: self.say(task_id) for task_id in ids},
        )

    def backoff(self, failures: int) -> float:
        return RetryPolicy(wait_jitter=0).wait_after(failures)

    def renew(self) -> None:
        self.renewed += 1

    def ages(self, start: float) -> list[float]:
        return [when - start for when, _ in self.asked]


@pytest.fixture
def network(clock: ManualClock) -> FakeNetwork:
    return FakeNetwork(clock)


Make = Callable[..., Watcher]


@pytest.fixture
async def make(network: FakeNetwork, clock: ManualClock) -> AsyncIterator[Make]:
    """Makes watchers and stops them in the end."""
    made: list[Watcher] = []

    def make(**policy: Any) -> Watcher:
        watcher = Watcher(
            network,
            clock=clock,
            policy=PollPolicy(**policy),
            ready_at=lambda: closed_until[0],
            max_reads=4,
        )
        made.append(watcher)
        return watcher

    closed_until[0] = 0.0
    yield make
    for watcher in made:
        await watcher.stop(lambda task_id: SessionClosedError("over", task_id=task_id))


closed_until = [0.0]


def submit(watcher: Watcher, clock: ManualClock, task_id: str, **more: Any) -> Watch:
    return watcher.submitted(
        task(task_id, "pending", **more),
        started=clock.now(),
        request=REQUEST,
        idempotency_key="k" * 32,
        on_end=lambda: None,
    )


async def test_watches_until_the_end(make: Make, network: FakeNetwork, clock: ManualClock) -> None:
    """A task is read until it is completed, at intervals within the policy's bounds."""
    start = clock.now()
    network.say = lambda i: task(i, "completed" if clock.now() - start > 90 else "processing")
    watcher = make(min_interval=1, max_interval=20)
    watch = submit(watcher, clock, "task-1")
    await watcher.until_ended(watch)
    assert watch.snapshot is not None
    assert watch.snapshot.status == "completed"
    ages = network.ages(start)
    gaps = [b - a for a, b in pairwise([0.0, *ages])]
    assert all(1 <= gap <= 20 + 1e-6 for gap in gaps)
    assert watcher.watches == ()


async def test_a_task_that_is_over_at_submit_is_never_read(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """A submit may be answered with an ended task: its slot comes back at once."""
    ended: list[str] = []
    watcher = make()
    watch = watcher.submitted(
        task("task-1", "completed"),
        started=clock.now(),
        request=REQUEST,
        idempotency_key="k" * 32,
        on_end=lambda: ended.append("task-1"),
    )
    await watcher.until_ended(watch)
    assert ended == ["task-1"]
    assert network.asked == []


async def test_one_watch_per_id(make: Make, network: FakeNetwork, clock: ManualClock) -> None:
    """Whoever asks for the same id shares one watch; a repeated submit gives its slot back."""
    freed: list[int] = []
    watcher = make()
    watch = submit(watcher, clock, "task-1")
    assert watcher.attach("task-1") is watch
    again = watcher.submitted(
        task("task-1"),
        started=clock.now(),
        request=REQUEST,
        idempotency_key="k" * 32,
        on_end=lambda: freed.append(1),
    )
    assert again is watch
    assert freed == [1]


async def test_an_attached_task_is_read_at_once(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """Nothing is known of a task found by its id, so the first poll is now."""
    watcher = make()
    start = clock.now()
    watch = watcher.attach("task-1")
    await watcher.until_changed(watch)
    assert network.asked == [(start, "task-1")]
    assert watch.snapshot is not None


async def test_deadline(make: Make, network: FakeNetwork, clock: ManualClock) -> None:
    """A task that never ends is given up at the deadline, after one last poll before it."""
    watcher = make(deadline=100, max_interval=30)
    start = clock.now()
    watch = submit(watcher, clock, "task-1")
    await watcher.until_ended(watch)
    assert isinstance(watch.reason, TaskTimeoutError)
    assert watch.reason.task_id == "task-1"
    assert watch.reason.snapshot is watch.snapshot
    assert clock.now() - start == 100
    assert max(network.ages(start)) == pytest.approx(99.75)


async def test_a_read_in_flight_does_not_hold_up_the_deadline(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """The deadline passes on time though the server never answers."""
    network.release = asyncio.Event()
    watcher = make(deadline=50)
    start = clock.now()
    watch = submit(watcher, clock, "task-1")
    await watcher.until_ended(watch)
    assert clock.now() - start == 50
    assert isinstance(watch.reason, TaskTimeoutError)


async def test_without_a_deadline_it_waits_for_ever(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """deadline=None watches a task for days."""
    start = clock.now()
    network.say = lambda i: task(i, "completed" if clock.now() - start > 200_000 else "processing")
    watcher = make(deadline=None, min_interval=500, max_interval=5000)
    await watcher.until_ended(watch := submit(watcher, clock, "task-1"))
    assert watch.reason is None


async def test_failed_reads_never_end_a_wait(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """Broken connections, 500s, garbage and a proxy's 404 are no information."""
    failures: list[EvolinkError] = [
        APIConnectionError("broken", sent=True),
        refusal(ServerError, 500),
        InvalidResponseError("garbage"),
        refusal(NotFoundError, 404, from_api=False),
        refusal(AuthenticationError, 401, from_api=False),
    ] * 8
    network.say = lambda i: failures.pop() if failures else task(i, "completed")
    watcher = make()
    await watcher.until_ended(watch := submit(watcher, clock, "task-1"))
    assert watch.reason is None
    assert failures == []


async def test_failed_reads_back_off(make: Make, network: FakeNetwork, clock: ManualClock) -> None:
    """The more reads fail in a row, the longer the watcher waits, up to the policy's bound."""
    network.say = lambda _: APIConnectionError("broken")
    watcher = make(deadline=600)
    await watcher.until_ended(submit(watcher, clock, "task-1"))
    ages = network.ages(0)
    gaps = [b - a for a, b in pairwise(ages)]
    assert gaps[:6] == pytest.approx([0.5, 1, 2, 4, 8, 16])
    assert max(gaps) <= 30


@pytest.mark.parametrize(
    ("error", "reads"),
    [
        (refusal(AuthenticationError, 401), 2),
        (refusal(NotFoundError, 404), 5),  # 0, 0.5, 1.5, 3.5, 7.5 s: only the last is 5 s apart
        (refusal(InvalidRequestError, 400), 3),
    ],
    ids=["401", "404", "400"],
)
async def test_confirmed_refusals_end_it(
    make: Make, network: FakeNetwork, clock: ManualClock, error: APIStatusError, reads: int
) -> None:
    """The API's own final refusals end the watch, once confirmed as often as they must be."""
    network.say = lambda _: error
    watcher = make()
    await watcher.until_ended(watch := watcher.attach("task-1"))
    assert type(watch.reason) is type(error)
    assert len(network.asked) == reads


async def test_a_404_right_after_the_submit_is_replica_lag(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """For a minute after our own submit a 404 does not count."""
    start = clock.now()
    network.say = lambda i: (
        refusal(NotFoundError, 404) if clock.now() - start < 59 else task(i, "completed")
    )
    watcher = make()
    await watcher.until_ended(watch := submit(watcher, clock, "task-1"))
    assert watch.reason is None
    network.say = lambda _: refusal(NotFoundError, 404)
    start = clock.now()
    await watcher.until_ended(watch := submit(watcher, clock, "task-2"))
    assert isinstance(watch.reason, NotFoundError)
    assert clock.now() - start > 60


async def test_a_good_read_forgets_refusals(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """Refusals count only in a row."""
    answers: list[Answer] = [
        task("task-1", "completed"),
        refusal(AuthenticationError, 401),
        task("task-1"),
        refusal(AuthenticationError, 401),
    ]
    network.say = lambda _: answers.pop()
    watcher = make()
    await watcher.until_ended(watch := watcher.attach("task-1"))
    assert watch.reason is None


async def test_nothing_is_read_during_a_cool_down(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """While the session cools down, due tasks wait."""
    start = clock.now()
    closed_until[0] = start + 120
    watcher = make()
    watch = watcher.attach("task-1")
    await watcher.until_changed(watch)
    assert network.ages(start) == [120]


async def test_nudge_and_poll(make: Make, network: FakeNetwork, clock: ManualClock) -> None:
    """A nudge moves the next poll to now; a poll asked for during another earns one more."""
    watcher = make(deadline=None)
    watch = submit(watcher, clock, "task-1", task_info={"estimated_time": 1000})
    assert watcher.nudge("task-1")
    assert not watcher.nudge("another")
    start = clock.now()
    await watcher.poll(watch)
    assert network.ages(start) == [0]
    network.release = asyncio.Event()
    polls = [asyncio.create_task(watcher.poll(watch)) for _ in range(3)]
    while network.in_flight == 0:  # noqa: ASYNC110 - it has no event
        await asyncio.sleep(0)
    polls += [asyncio.create_task(watcher.poll(watch)) for _ in range(3)]
    await asyncio.sleep(0)
    network.release.set()
    await asyncio.gather(*polls)
    assert network.ages(start) == [0, 0, 0]


async def test_reads_in_flight_are_bounded(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """However many tasks are due, only so many polls are in flight."""
    network.release = asyncio.Event()
    watcher = make(deadline=None)
    watches = [watcher.attach(f"task-{i}") for i in range(20)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert network.in_flight == 4
    network.release.set()
    network.say = lambda i: task(i, "completed")
    await asyncio.gather(*(watcher.until_ended(watch) for watch in watches))
    assert network.peak == 4


async def test_a_cancelled_waiter_leaves_no_trace(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """Cancelling one awaiter neither stops the watch nor leaves a future behind."""
    watcher = make(deadline=None)
    watch = submit(watcher, clock, "task-1", task_info={"estimated_time": 1000})
    waits = [asyncio.create_task(watcher.until_ended(watch)) for _ in range(3)]
    await asyncio.sleep(0)
    waits[1].cancel()
    await asyncio.gather(waits[1], return_exceptions=True)
    assert watch.callers is not None
    assert len(watch.callers.end) == 2
    network.say = lambda i: task(i, "completed")
    await asyncio.gather(waits[0], waits[2])


async def test_unknown_statuses_are_running(
    make: Make, network: FakeNetwork, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A status word the API has added since counts as running and is logged once."""
    answers = [task("task-1", "completed")] + [task("task-1", "up\x1b[31mscaling")] * 3
    network.say = lambda _: answers.pop()
    watcher = make()
    await watcher.until_ended(watch := watcher.attach("task-1"))
    assert watch.reason is None
    assert caplog.text.count("unknown task status") == 1
    assert "\x1b" not in caplog.text


async def test_a_crash_reaches_every_waiter(
    make: Make, network: FakeNetwork, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """An unexpected error inside the watcher does not leave anybody waiting for ever."""

    def explode(_: str) -> Answer:
        raise ZeroDivisionError("a bug")

    network.say = explode
    watcher = make()
    watches = [watcher.attach("task-1"), watcher.attach("task-2")]
    await asyncio.gather(*(watcher.until_ended(watch) for watch in watches))
    for watch in watches:
        assert isinstance(watch.reason, EvolinkError)
        assert isinstance(watch.reason.__cause__, ZeroDivisionError)
    network.say = lambda i: task(i, "completed")
    await watcher.until_ended(watch := watcher.attach("task-1"))
    assert watch.reason is None


@pytest.mark.parametrize("left", range(1, 12))
async def test_a_clock_that_fails_reaches_every_waiter(
    caplog: pytest.LogCaptureFixture, left: int
) -> None:
    """At whatever moment a clock breaks, nobody waits for ever and nothing is only logged."""
    clock = BreakingClock(1_000)
    network = FakeNetwork(clock)
    policy = PollPolicy(min_interval=0.01, max_interval=0.02)
    watcher = Watcher(
        network, clock=clock, policy=policy, ready_at=lambda: 0.0, max_reads=4, wall=time.time
    )
    watch = watcher.attach("task-1")
    clock.left = left
    await watcher.until_ended(watch)
    assert watch.reason is not None
    assert isinstance(watch.reason.__cause__, ZeroDivisionError)
    clock.left = 1_000
    await watcher.stop(lambda task_id: SessionClosedError("over", task_id=task_id))
    assert not [r for r in caplog.records if r.name == "asyncio"]


@pytest.mark.parametrize("polling", [False, True])
async def test_being_cancelled_by_others_reaches_every_waiter(
    make: Make, network: FakeNetwork, clock: ManualClock, *, polling: bool
) -> None:
    """Who cancels all asyncio tasks there are leaves nobody waiting for ever."""
    network.release = asyncio.Event()
    others = asyncio.all_tasks()
    watcher = make(deadline=None)
    watches = [
        watcher.attach(f"task-{k}") if polling else submit(watcher, clock, f"task-{k}")
        for k in range(3)
    ]
    for _ in range(3):
        await asyncio.sleep(0)
    ours = asyncio.all_tasks() - others
    assert len(ours) == (3 if polling else 1)
    for each in ours:
        each.cancel()
    await asyncio.gather(*(watcher.until_ended(watch) for watch in watches))
    assert all("picks it up again" in str(watch.reason) for watch in watches)
    network.release.set()
    network.say = lambda i: task(i, "completed")
    await watcher.until_ended(again := watcher.attach("task-1"))
    assert again.reason is None


async def test_a_watcher_that_stops_names_what_still_runs(
    make: Make, network: FakeNetwork, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """What cancelled all asyncio tasks may have cancelled all waiters, too."""
    watcher = make(deadline=None)
    paid = [submit(watcher, clock, f"task-{k}") for k in range(60)]
    watcher.attach("task-of-others")

    def explode(_: str) -> TaskSnapshot:
        raise ZeroDivisionError

    network.say = explode
    await watcher.until_ended(paid[0])
    lines = [r.getMessage() for r in caplog.records if "still running" in r.getMessage()]
    assert len(lines) == 2
    assert all(any(f"{watch.id}," in f"{line}," for line in lines) for watch in paid)
    assert "task-of-others" not in " ".join(lines)


async def test_a_task_that_is_watched_already_learns_who_submitted_it(
    make: Make, clock: ManualClock
) -> None:
    """Picked up by its id and then submitted again with its key: it has request and key."""
    watcher = make()
    attached = watcher.attach("task-1")
    watch = submit(watcher, clock, "task-1")
    assert watch is attached
    assert (watch.request, watch.idempotency_key) == (REQUEST, "k" * 32)


async def test_the_read_limit_counts_from_poll_to_poll(make: Make, network: FakeNetwork) -> None:
    """A poll that finds out whether polls may be shared lowers the limit of the next ones."""
    network.read_limit, network.limit_after = 5, 1
    network.say = lambda i: task(i, "completed")
    watcher = make()
    watches = [watcher.attach(f"task-{k}") for k in range(15)]
    for watch in watches:
        await watcher.until_ended(watch)
    assert network.sizes == [5] + [1] * 10


async def test_a_repeat_past_its_deadline_is_given_up(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """A stored answer may come so late that no poll is left, with nothing else to watch."""
    network.say = lambda i: task(i, "completed")
    watcher = make(deadline=10)
    first = submit(watcher, clock, "task-1")
    await watcher.until_ended(first)
    started = clock.now()
    await clock.sleep_until(started + 15)
    late = watcher.submitted(
        task("task-2", "pending"),
        started=started,
        request=REQUEST,
        idempotency_key="k" * 32,
        on_end=lambda: None,
        replayed=True,
    )
    await watcher.until_ended(late)
    assert isinstance(late.reason, TaskTimeoutError)


async def test_a_clock_may_say_anything() -> None:
    """Only differences of a clock mean something: below zero, a poll is still at once."""
    clock = ManualClock(start=-1e6)
    network = FakeNetwork(clock)
    watcher = Watcher(
        network, clock=clock, policy=PollPolicy(), ready_at=lambda: -math.inf, max_reads=4
    )
    watch = submit(watcher, clock, "task-1")
    watcher.nudge(watch.id)
    await watcher.poll(watch)
    await watcher.poll(watch)
    assert {when for when, _ in network.asked} == {-1e6}
    await watcher.stop(lambda task_id: SessionClosedError("over", task_id=task_id))


async def test_stop_ends_every_watch(make: Make, network: FakeNetwork, clock: ManualClock) -> None:
    """Stopping wakes the waiters with the reason given and names what was running."""
    watcher = make(deadline=None)
    watch = submit(watcher, clock, "task-1")
    waiter = asyncio.create_task(watcher.until_ended(watch))
    await asyncio.sleep(0)
    running = await watcher.stop(lambda i: SessionClosedError("closed", task_id=i))
    await waiter
    assert running == ["task-1"]
    assert isinstance(watch.reason, SessionClosedError)


async def test_ended_watches_are_forgotten(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """A service that runs for a year does not grow: ended and moved entries leave the heap."""
    network.say = lambda i: task(i, "completed")
    watcher = make(deadline=None)
    ghosts = []
    for i in range(300):
        watch = submit(watcher, clock, f"task-{i}", task_info={"estimated_time": 900})
        await watcher.poll(watch)
        ghosts.append(weakref.ref(watch))
    del watch
    gc.collect()
    assert sum(ghost() is not None for ghost in ghosts) <= 65
    assert len(watcher._queue) <= 65


async def test_stopping_lets_others_run(make: Make, clock: ManualClock) -> None:
    """Ending a great many watches does not hold up the event loop."""
    watcher = make()
    ghosts = [weakref.ref(submit(watcher, clock, f"task-{k}")) for k in range(2_000)]
    stopping = asyncio.create_task(
        watcher.stop(lambda task_id: SessionClosedError("over", task_id=task_id))
    )
    seen = set()
    while not stopping.done():
        seen.add(watcher.running)
        # What has ended is freed on the way, not all of it in one go at the end.
        assert sum(ghost() is not None for ghost in ghosts) <= watcher.running + 1
        await asyncio.sleep(0)
    assert len(seen - {0, 2_000}) >= 3
    assert len(await stopping) == 2_000


# -- deadlines ---------------------------------------------------------------------------------


@pytest.mark.parametrize("deadline", [7.2, 5.93, 60.1])
@pytest.mark.parametrize("limit", [1, 50])
async def test_the_last_poll_is_one_poll(
    make: Make, network: FakeNetwork, clock: ManualClock, limit: int, deadline: float
) -> None:
    """Also where reads go out in bursts, tasks near their deadline are not read on and on."""
    network.read_limit = limit
    watcher = make(min_interval=2, deadline=deadline)
    start = clock.now()
    watches = [submit(watcher, clock, f"task-{k}") for k in range(60)]
    await asyncio.gather(*(watcher.until_ended(watch) for watch in watches))
    assert clock.now() - start == pytest.approx(deadline)
    assert {type(watch.reason) for watch in watches} == {TaskTimeoutError}
    assert len(network.asked) <= 60 * (1 + deadline / 2)


async def test_deadlines_are_kept_whatever_the_intervals(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """Each task is given up when its own has passed, though they are polled at seldom."""
    watcher = make(min_interval=60, deadline=10)
    start = clock.now()
    given_up = []
    for k in range(3):
        await clock.sleep_until(start + k)
        watch = submit(watcher, clock, f"task-{k}")
        given_up.append(asyncio.create_task(watcher.until_ended(watch)))
    for k, waiter in enumerate(given_up):
        await waiter
        assert clock.now() - start == pytest.approx(10 + k, abs=0.3)


async def test_a_near_deadline_leaves_time_for_a_poll(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """A task that would be polled at after its deadline is polled at half-way to it."""
    watcher = make(min_interval=5, deadline=5)
    start = clock.now()
    await watcher.until_ended(submit(watcher, clock, "task-1"))
    assert network.ages(start) == [2.5]
    assert clock.now() - start == pytest.approx(5)


async def test_a_deadline_is_kept_while_nothing_may_be_read(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """A cool-down that outlasts the deadline does not put the end of the wait off."""
    closed_until[0] = clock.now() + 1000
    watcher = make(deadline=20)
    start = clock.now()
    watches = [submit(watcher, clock, f"task-{k}") for k in range(3)]
    await asyncio.gather(*(watcher.until_ended(watch) for watch in watches))
    assert clock.now() - start == pytest.approx(20)
    assert network.asked == []


async def test_a_deadline_is_kept_while_reads_hang(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """Those behind reads that do not come back are given up in time, and so are those."""
    network.release = asyncio.Event()
    watcher = make(deadline=20)
    start = clock.now()
    watches = [watcher.attach(f"task-{k}") for k in range(12)]
    await asyncio.gather(*(watcher.until_ended(watch) for watch in watches))
    assert clock.now() - start == pytest.approx(20)
    assert len(network.asked) == 4
    network.release.set()


async def test_an_idle_watcher_keeps_no_timer(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """Once all tasks have ended nothing is waited for, or a clock of tests would run ahead."""
    network.say = lambda i: task(i, "completed")
    watcher = make(deadline=100)
    await watcher.until_ended(watcher.attach("task-1"))
    before = clock.now()
    for _ in range(50):
        await asyncio.sleep(0)
    assert clock.now() == before


# -- what comes first ---------------------------------------------------------------------------


async def test_a_poll_that_is_asked_for_comes_before_all_that_is_late(
    make: Make, network: FakeNetwork, clock: ManualClock
) -> None:
    """A poll that somebody asked for does not queue behind those that could not be sent in time."""
    closed_until[0] = clock.now() + 500
    watcher = make(deadline=None)
    for k in range(5):
        watcher.attach(f"task-{k}")
    await clock.sleep_until(clock.now() + 100)
    await watcher.poll(watcher.attach("task-3"))
    assert network.asked[0][1] == "task-3"


# -- what the log says -------------------------------------------------------------------------


async def test_the_log_says_why_nothing_is_read(
    make: Make, network: FakeNetwork, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """First polls, polls asked for, and what holds reads up are in the DEBUG log."""
    caplog.set_level(logging.DEBUG)
    network.say = lambda i: task(i, "completed")
    closed_until[0] = clock.now() + 40
    watcher = make(deadline=None)
    watch = submit(watcher, clock, "task-1", task_info={"estimated_time": 30})
    assert watcher.nudge("task-1")
    await watcher.poll(watch)
    assert "task-1: first poll in " in caplog.text
    assert "task-1: nudged, it is said to have ended" in caplog.text
    assert "task-1: a poll was asked for" in caplog.text
    assert "polls wait 40.00 s for the cool-down" in caplog.text


async def test_the_log_says_that_enough_reads_are_in_flight(
    make: Make, network: FakeNetwork, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A task that waits for others to be answered is no riddle."""
    caplog.set_level(logging.DEBUG)
    network.release = asyncio.Event()
    watcher = make(deadline=10)
    watches = [watcher.attach(f"task-{k}") for k in range(5)]
    await asyncio.gather(*(watcher.until_ended(watch) for watch in watches))
    assert "polls wait: 4 are in flight, the most there may be" in caplog.text
    network.release.set()


async def test_the_log_names_no_poll_that_does_not_come(
    make: Make, network: FakeNetwork, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Each poll it announces is sent; before a deadline it says that there is none."""
    caplog.set_level(logging.DEBUG)
    watcher = make(deadline=20)
    await watcher.until_ended(submit(watcher, clock, "task-1"))
    assert caplog.text.count("next poll in") == len(network.asked) - 1
    assert caplog.text.count("no poll before its deadline in 0.") == 1
