"""Callbacks over real HTTP: genuine, early, late and lost ones."""

from __future__ import annotations

from callback_server import PUBLIC, CallbackServer, connect, counted, run, submit_overtaken

from evolink_async import Session
from evolink_async.emulator import Emulator, ManualClock, faults
from evolink_async.webhook import CallbackReceiver


async def test_a_callback_ends_a_task_with_one_read(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """The delivery makes the session poll at once, and that poll is the only one."""
    task = await session.submit("A peaceful lake")
    await task
    assert emulator.clock.now() - emulator.books.task(task.id).ends_at < 0.1
    assert len(emulator.books.reads(task.id)) == 1
    assert [record.status for record in emulator.books.callbacks(task.id)] == [204]
    assert counted(receiver) == {"nudged": 1}
    assert receiver.stats.received == 1


async def test_many_callbacks_cost_a_poll_each(emulator: Emulator, server: CallbackServer) -> None:
    """With every callback delivered, a task costs at most 1.1 polls, and few ids per poll."""
    async with connect(emulator, max_in_flight=400) as session:
        server.receiver = CallbackReceiver(session, public_url=PUBLIC)
        delay = await run(session, emulator, 400)
        assert session.stats.reads <= 1.1 * 400
        assert session.stats.ids_read <= 4 * 400
    assert delay < 0.1
    assert counted(server.receiver) == {"nudged": 400}


async def test_lost_callbacks_are_found_by_polling(
    emulator: Emulator, server: CallbackServer
) -> None:
    """With one callback in ten lost every task still completes."""
    emulator.faults.add(faults.CallbackDropped(rate=0.1))
    async with connect(emulator, max_in_flight=100) as session:
        server.receiver = CallbackReceiver(session, public_url=PUBLIC)
        await run(session, emulator, 100)
    received = server.receiver.stats.nudged
    assert 70 < received < 100
    assert server.receiver.stats.received == received
    assert {record.status for record in emulator.books.tasks()} == {"completed"}


async def test_an_unreachable_receiver_costs_what_polling_costs(clock: ManualClock) -> None:
    """Where no callback ever comes, polls and delay cost at most 1.3 times polling alone."""
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


async def test_missed_callbacks_of_many_tasks_are_noticed(clock: ManualClock) -> None:
    """The first missed callbacks bring forward the polls of all tasks that wait for one."""
    async with (
        Emulator(clock=clock, duration=(10, 60), pictures="tiny", credits=1e5) as emulator,
        connect(emulator, callback=f"{PUBLIC}/nobody", max_in_flight=300) as session,
    ):
        assert await run(session, emulator, 300) < 4


async def test_a_callback_before_the_answer_to_its_submit(
    session: Session, emulator: Emulator, receiver: CallbackReceiver, server: CallbackServer
) -> None:
    """A delivery that overtakes the POST's answer is remembered, and acted on at that answer."""
    task = await submit_overtaken(session, emulator, server)
    answered = emulator.clock.now()
    await task
    assert emulator.clock.now() - answered < 0.1
    assert len(emulator.books.reads(task.id)) == 1


async def test_repeats_and_late_ones_cost_nothing(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """Once a task has ended, no delivery causes a poll."""
    emulator.faults.add(faults.CallbackDuplicated(4))
    task = await session.submit("A lake")
    await task
    await emulator.clock.sleep_until(emulator.clock.now() + 100)
    assert len(emulator.books.reads(task.id)) == 1
    assert receiver.stats.received == 4  # some before the confirming poll was answered
    assert receiver.stats.late >= 2


async def test_a_callback_after_a_poll_is_late(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """A delivery about a task whose end was already polled counts as late."""
    emulator.faults.add(faults.CallbackDelayed(300))
    task = await session.submit("A lake")
    await task
    await emulator.clock.sleep_until(emulator.clock.now() + 301)
    assert counted(receiver) == {"late": 1}


async def test_callbacks_report_failures(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """A failed task's callback ends it like any other; its error comes from the poll."""
    emulator.faults.add(faults.TaskFails("content_policy_violation"))
    task = await session.submit("A lake")
    async for _ in task.updates():
        pass
    assert task.status == "failed"
    assert len(emulator.books.reads(task.id)) == 1
