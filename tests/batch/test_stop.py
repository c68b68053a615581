"""Batches that are stopped, cancelled or cut off."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from desk import Desk, prompts, stop_of, until

from evolink_async import PollPolicy
from evolink_async._clock import hold
from evolink_async.batch import BatchProgress, run_batch
from evolink_async.batch._ledger import LEDGER
from evolink_async.emulator import Emulator, faults
from evolink_async.errors import LedgerError


async def test_stopped_it_lets_what_runs_finish_and_says_how_to_go_on(desk: Desk) -> None:
    """No more is submitted, what runs is saved, the others stay queued for the next run."""
    stop = asyncio.Event()

    def follow(now: BatchProgress) -> None:
        if now.saved:
            stop.set()

    report = await desk.run(
        prompts(60), stop=stop, grace=20, progress=follow, settings={"max_in_flight": 8}
    )
    assert (stop_of(report).kind, report.exit_code) == ("interrupted", 130)
    assert report.running == report.completed == report.uncertain == 0
    assert 0 < report.saved < 60
    assert report.saved + report.queued == 60
    assert desk.emulator.books.accepted == report.saved
    assert (await desk.run(prompts(60))).saved == 60
    assert set(desk.bought.values()) == {1}


async def test_stopped_after_everything_is_saved_it_has_not_failed(desk: Desk) -> None:
    """An interrupt that finds nothing left to do changes no exit code."""
    stop = asyncio.Event()
    stop.set()
    await desk.run(prompts(3))
    report = await desk.run(prompts(3), stop=stop)
    assert (report.saved, report.exit_code) == (3, 0)
    assert (await desk.run(prompts(4), stop=stop)).exit_code == 130


async def test_a_grace_time_that_passes_leaves_what_runs(desk: Desk) -> None:
    """Tasks that outlast it stay submitted, and the next run picks them up."""
    desk.emulator.faults.add(faults.TaskHangs(50))
    stop = asyncio.Event()

    def follow(now: BatchProgress) -> None:
        if now.running == 4:
            stop.set()

    report = await desk.run(prompts(4), stop=stop, grace=0.2, progress=follow)
    assert report.running + report.uncertain + report.queued == 4
    for task in desk.emulator.books.tasks():
        desk.emulator.complete(task.id)
    desk.emulator.faults.clear()
    assert (await desk.run(prompts(4))).saved == 4 - report.uncertain
    assert set(desk.bought.values()) == {1}


async def test_cancelled_it_leaves_at_once_and_records_what_was_in_the_air(desk: Desk) -> None:
    """A submit without an answer is uncertain, with its key; nothing else is lost."""
    desk.emulator.faults.add(faults.Latency(0.5, when="after", route="submit", prompt="lake 1"))
    async with desk.session() as session:
        job = asyncio.create_task(run_batch(session, prompts(2), desk.out))
        await until(lambda: desk.emulator.books.accepted == 2 and "submitted" in desk.states())
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert desk.states()["uncertain"] == 1
        await session.aclose(grace=0)
    assert desk.rows("SELECT count(*) FROM items WHERE idempotency_key IS NULL") == [(0,)]


async def test_what_was_not_sent_goes_back_to_the_queue(tmp_path: Path) -> None:
    """Stopped in a cool-down, what was refused and what waits behind it is queued."""
    async with Emulator(pictures="tiny", time_scale=100, estimate=1) as emulator:
        desk = Desk(emulator, tmp_path / "out")
        emulator.faults.add(faults.Status(429, retry_after=200, route="submit", nth=2))
        stop = asyncio.Event()
        async with desk.session(max_connections=1, clock=None) as session:
            job = asyncio.create_task(
                run_batch(session, prompts(6), desk.out, stop=stop, grace=0.05)
            )
            await until(lambda: session.stats.cool_downs > 0)
            stop.set()
            report = await job
    assert (report.queued, report.uncertain) == (5, 0)
    assert report.saved + report.running + report.completed == 1


async def test_stopped_while_its_submits_wait_for_a_slot_it_ends_at_once(desk: Desk) -> None:
    """Nothing of them has left: they are not given the grace of what runs."""
    desk.emulator.faults.add(faults.TaskHangs(50))
    stop = asyncio.Event()
    async with desk.session(max_in_flight=1, poll=PollPolicy(deadline=None)) as session:
        await session.submit("of somebody else")
        batch = run_batch(session, prompts(3), desk.out, stop=stop, grace=600)
        job = asyncio.create_task(batch)
        await until(lambda: session.stats.waiting == 1)
        stop.set()
        async with asyncio.timeout(30):
            report = await job
    assert (report.queued, report.uncertain) == (3, 0)
    assert len(desk.emulator.books.submits()) == 1


async def test_a_closed_session_ends_the_batch(desk: Desk) -> None:
    """Nothing is lost when somebody closes the session under a batch."""
    async with desk.session() as session:

        def follow(now: BatchProgress) -> None:
            if now.saved == 1:
                closing.append(asyncio.ensure_future(session.aclose(grace=0)))

        closing: list[asyncio.Future[None]] = []
        report = await run_batch(session, prompts(50), desk.out, progress=follow)
    assert stop_of(report).kind == "closed"
    last = await desk.run(prompts(50), resend_uncertain=True)
    assert last.saved == 50
    assert set(desk.bought.values()) == {1}


async def test_two_batches_cannot_share_a_folder(desk: Desk) -> None:
    """The second is refused, and the first goes on."""
    async with desk.session() as session:
        first = asyncio.create_task(run_batch(session, prompts(40), desk.out))
        await until((desk.out / LEDGER).exists)
        with pytest.raises(LedgerError, match="in use by another process"):
            await run_batch(session, ["b"], desk.out)
        assert (await first).saved == 40


async def test_a_key_that_is_refused_while_tasks_run_stops_the_batch(desk: Desk) -> None:
    """The tasks stay submitted, for a run with a key that works."""
    desk.emulator.faults.add(faults.Status(401, route=("read", "batch")))
    report = await desk.run(prompts(3), grace=0.2)
    assert (stop_of(report).kind, report.running) == ("authentication", 3)
    desk.emulator.faults.clear()
    assert (await desk.run(prompts(3))).saved == 3
    assert set(desk.bought.values()) == {1}


async def test_stopped_during_a_cool_down_it_sends_nothing_afterwards(desk: Desk) -> None:
    """Submits that were refused and wait to be sent again stay unsent, and cost nothing."""
    desk.emulator.faults.add(faults.Status(429, route="submit", retry_after=2, nth=(1, 2, 3)))
    stop = asyncio.Event()
    with hold(desk.emulator.clock):
        run = asyncio.create_task(
            desk.run(prompts(10), stop=stop, grace=5, settings={"max_in_flight": 3})
        )
        await until(lambda: bool(desk.emulator.books.requests("submit")))
        stop.set()
        await asyncio.sleep(0.05)
    report = await run
    assert desk.emulator.books.accepted == 0
    assert (report.queued, report.uncertain) == (10, 0)
