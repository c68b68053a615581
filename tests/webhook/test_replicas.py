"""A callback that reaches a replica which does not watch its task."""

from __future__ import annotations

import asyncio
import logging

import pytest
from callback_server import KEY, PUBLIC, SECRET, CallbackServer, body, connect, counted

from evolink_async import RequestValidationError, Session
from evolink_async.emulator import Emulator, faults
from evolink_async.webhook import CallbackReceiver


async def test_a_bus_carries_a_callback_to_its_replica(
    emulator: Emulator, server: CallbackServer
) -> None:
    """The wrong replica publishes the id, once for all repeats, and the right one polls."""
    async with connect(emulator) as mine, connect(emulator) as theirs:
        bus: asyncio.Queue[str] = asyncio.Queue()
        published: list[str] = []
        right = CallbackReceiver(mine, public_url=PUBLIC, secret=SECRET)
        wrong = CallbackReceiver(theirs, public_url=PUBLIC, secret=SECRET, on_unwatched=bus.put)
        server.receiver = wrong

        async def subscribe() -> None:
            while True:
                published.append(await bus.get())
                for replica in (right, wrong):
                    replica.nudge(published[-1])

        subscriber = asyncio.create_task(subscribe())
        emulator.faults.add(faults.CallbackDuplicated(3))
        task = await mine.submit("A lake")
        await task
        assert emulator.clock.now() - emulator.books.task(task.id).ends_at < 0.2
        await emulator.clock.sleep_until(emulator.clock.now() + 10)
        assert published == [task.id]
        assert counted(wrong) == {"early": 1, "late": 2}
        assert len(emulator.books.reads(task.id)) == 1
        subscriber.cancel()


async def test_the_hook_need_not_be_async(
    session: Session, emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    """The hook may be an ordinary function; without one a debug line names the task."""
    published: list[str] = []
    for hook in (published.append, None):
        receiver = CallbackReceiver(session, public_url=PUBLIC, on_unwatched=hook)
        with caplog.at_level(logging.DEBUG, "evolink_async"):
            assert await receiver.deliver(receiver.url_for(KEY), body("task-unified-1")) == 204
    assert published == ["task-unified-1"]
    assert caplog.text.count("a callback for task task-unified-1, which is not watched here") == 2


async def test_a_forged_id_does_not_hide_the_real_one(session: Session, emulator: Emulator) -> None:
    """A wrong id on a URL that leaked does not keep the right one from its replica."""
    published: list[str] = []
    receiver = CallbackReceiver(session, public_url=PUBLIC, on_unwatched=published.append)
    url = receiver.url_for(KEY)
    for task_id in ("task-unified-lie", "task-unified-true", "task-unified-true"):
        assert await receiver.deliver(url, body(task_id)) == 204
    assert published == ["task-unified-lie", "task-unified-true"]
    assert counted(receiver) == {"early": 2, "late": 1}


async def test_own_callbacks_are_not_published(emulator: Emulator, server: CallbackServer) -> None:
    """A callback that comes long after its task was submitted, and ended, is still known."""
    emulator.faults.add(faults.CallbackDelayed(300))
    emulator.faults.add(faults.TaskHangs())
    published: list[str] = []
    async with connect(emulator) as session:
        server.receiver = CallbackReceiver(
            session, public_url=PUBLIC, on_unwatched=published.append
        )
        task = await session.submit("A lake")
        await emulator.clock.sleep_until(emulator.clock.now() + 1500)
        emulator.complete(task.id)
        await task
        await emulator.clock.sleep_until(emulator.clock.now() + 310)
        assert counted(server.receiver) == {"late": 1}
    assert published == []


async def test_an_error_of_the_hook_reaches_the_web_server(
    session: Session, emulator: Emulator
) -> None:
    """``deliver`` raises the error of a hook, and calls it anew at the next delivery."""
    published: list[str] = []

    async def publish(task_id: str) -> None:
        published.append(task_id)
        if len(published) == 1:
            raise OSError(f"no bus for {task_id}")

    receiver = CallbackReceiver(session, public_url=PUBLIC, on_unwatched=publish)
    with pytest.raises(OSError, match="no bus for task-unified-1"):
        await receiver.deliver(receiver.url_for(KEY), body("task-unified-1"))
    for _ in range(2):
        assert await receiver.deliver(receiver.url_for(KEY), body("task-unified-1")) == 204
    assert published == ["task-unified-1"] * 2
    assert counted(receiver) == {"early": 2, "late": 1}


async def test_nudges_check_what_comes_over_the_bus(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """An id that is not watched here costs nothing, and what cannot be an id is refused."""
    assert not receiver.nudge("task-unified-elsewhere")
    with pytest.raises(RequestValidationError, match="task_id"):
        receiver.nudge("../x")
    assert emulator.books.reads() == ()
