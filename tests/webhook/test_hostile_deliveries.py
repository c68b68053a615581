"""Deliveries that are forged, malformed, too many or to the wrong place."""

from __future__ import annotations

import asyncio
import gzip
import io
import logging
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from callback_server import (
    KEY,
    PUBLIC,
    SECRET,
    CallbackServer,
    Held,
    body,
    connect,
    counted,
    until,
    url_of,
)

from evolink_async import ConfigurationError, PollPolicy, RetryPolicy, Session, webhook
from evolink_async.emulator import Emulator, faults
from evolink_async.webhook import CallbackReceiver


async def test_forged_deliveries_change_nothing(
    session: Session, emulator: Emulator, server: CallbackServer, http: aiohttp.ClientSession
) -> None:
    """Two thousand deliveries to made-up paths cost no poll; the genuine one still counts."""
    receiver = server.receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
    forger = CallbackReceiver(Session("key"), public_url=PUBLIC, secret="x" * 16)
    task = await session.submit("A lake")
    path = server.local(forger.url_for(task.idempotency_key or ""))
    lie = body(task.id, results=["https://evil.example/x.png"])
    payload = (
        f"POST {path.removeprefix(server.origin)} HTTP/1.1\r\nHost: x\r\n"
        f"Content-Length: {len(lie)}\r\n\r\n"
    ).encode() + lie
    with emulator.clock.hold():  # type: ignore[attr-defined]  # a ManualClock
        answers = await asyncio.gather(*(flood(server.port, payload, 100) for _ in range(20)))
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


async def test_a_leaked_url_costs_a_poll_per_interval(
    emulator: Emulator, server: CallbackServer
) -> None:
    """Anyone with a task's URL can have it polled once per min_interval, until it has ended."""
    async with connect(emulator, poll=PollPolicy(min_interval=2)) as session:
        receiver = server.receiver = CallbackReceiver(session, public_url=PUBLIC)
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


async def test_nudges_during_a_poll_keep_the_interval(emulator: Emulator) -> None:
    """Deliveries while a poll is in flight cause one more, an interval later, not at once."""
    held = Held(route="read", nth=1)
    emulator.faults.add(held)
    async with connect(emulator, poll=PollPolicy(min_interval=2)) as session:
        task = await session.submit("A lake", callback=f"{PUBLIC}/x")
        poll = asyncio.create_task(task.refresh())
        await held.arrived.wait()
        for _ in range(100):
            assert session.nudge(task.id)
        held.release.set()
        await poll
        await emulator.clock.sleep_until(emulator.clock.now() + 5)
        first, second = [entry.time for entry in emulator.books.reads(task.id)]
    assert second - first == pytest.approx(2, abs=0.01)


async def test_nudges_do_not_hurry_failing_polls(emulator: Emulator) -> None:
    """While polls fail, deliveries do not make their retries more frequent."""
    emulator.faults.add(faults.Status(500, route="read"))
    async with connect(emulator, retry=RetryPolicy(wait_initial=1)) as session:
        task = await session.submit("A lake")
        end = emulator.clock.now() + 30
        while emulator.clock.now() < end:
            session.nudge(task.id)
            await emulator.clock.sleep_until(emulator.clock.now() + 0.1)
        assert 1 < len(emulator.books.reads(task.id)) < 20


async def test_a_nudge_polls_its_own_task_only(emulator: Emulator) -> None:
    """The poll after a callback asks for its own task only; the others are due much later."""
    async with connect(emulator) as session:
        session.callback = f"{PUBLIC}/x"
        tasks = [await session.submit(f"lake {i}") for i in range(20)]
        assert session.nudge(tasks[6].id)  # not one of those that are polled anyway
        assert not session.nudge("task-unified-nobody")
        await tasks[6].refresh()
        assert emulator.books.reads()[0].task_ids == (tasks[6].id,)
    assert not Session("key").nudge("task-unified-nobody")


async def test_a_token_is_for_its_own_task(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """The URL of one task cannot make the session poll another."""
    first, second = [await session.submit(f"lake {i}") for i in range(2)]
    without = await session.submit("lake", callback=None)
    assert await receiver.deliver(url_of(first), body(second.id)) == 404
    assert await receiver.deliver(url_of(first), body(without.id)) == 404
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
async def test_paths_without_a_signature(receiver: CallbackReceiver, path: str) -> None:
    """A path of any shape without a valid signature is refused."""
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
    """A body of any shape without a task's id is counted and dropped."""
    assert await receiver.deliver(receiver.url_for(KEY), data) == 400
    assert counted(receiver) == {"malformed": 1}


async def test_other_methods(
    receiver: CallbackReceiver, server: CallbackServer, http: aiohttp.ClientSession
) -> None:
    """Only POSTs are deliveries; the answer says so."""
    url = server.local(receiver.url_for(KEY))
    async with http.get(url) as response:
        assert (response.status, response.headers["Allow"]) == (405, "POST")
    async with http.put(url, data=body("task-unified-1")) as response:
        assert response.status == 405
    assert counted(receiver) == {"wrong_method": 2}


async def test_huge_bodies(
    receiver: CallbackReceiver, server: CallbackServer, http: aiohttp.ClientSession
) -> None:
    """A body longer than any task is not read to its end, whether it says its length or not."""
    url = server.local(receiver.url_for(KEY))
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
    receiver: CallbackReceiver, server: CallbackServer, http: aiohttp.ClientSession
) -> None:
    """A compressed body is refused before any of it is read."""
    headers = {"Content-Encoding": "gzip"}
    url = server.local(receiver.url_for(KEY))
    bomb = gzip.compress(b" " * (32 << 20))
    try:
        async with http.post(url, data=bomb, headers=headers) as response:
            assert response.status == 415
    except aiohttp.ClientConnectionError:
        pass  # see above
    assert counted(receiver) == {"compressed": 1}


async def test_slow_and_broken_bodies(
    receiver: CallbackReceiver, server: CallbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A body that arrives too slowly, or is cut off, is given up."""
    monkeypatch.setattr(webhook, "_BODY_SECONDS", 0.05)
    path = receiver.url_for(KEY).removeprefix("https://app.example.com")
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(head)
    assert (await reader.readline()).startswith(b"HTTP/1.1 408")
    writer.close()
    monkeypatch.setattr(webhook, "_BODY_SECONDS", 10)
    _, writer = await asyncio.open_connection("127.0.0.1", server.port)
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
    server: CallbackServer,
    caplog: pytest.LogCaptureFixture,
    end: str,
    reason: str,
) -> None:
    """Disconnecting in the middle of a body does not write to the server's log."""
    path = receiver.url_for(KEY).removeprefix("https://app.example.com")
    path = path if reason == "malformed" else path[:-8] + "AAAAAAAA"
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode()
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
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
async def test_deliver_checks_its_arguments(
    receiver: CallbackReceiver, path: Any, data: Any
) -> None:
    """A path that is not str or a body that is not bytes is refused."""
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
    """A delivery or nudge in another thread does nothing and raises an error that says why."""
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


async def test_a_closed_session_refuses_callbacks(
    emulator: Emulator, server: CallbackServer
) -> None:
    """After a session's end the sender is asked to try again, and reaches the next session."""
    async with connect(emulator) as session:
        server.receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
        task = await session.submit("A lake")
    await emulator.clock.sleep_until(emulator.books.task(task.id).ends_at + 0.5)
    assert await server.receiver.deliver(f"{PUBLIC}/x", body(task.id)) == 404
    assert counted(server.receiver) == {"closed": 1, "forged": 1}
    assert server.receiver.stats.received == 2
    async with connect(emulator) as session:
        server.receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
        await emulator.clock.sleep_until(emulator.clock.now() + 1)
        assert [sent.status for sent in emulator.books.callbacks(task.id)] == [503, 204]
        assert counted(server.receiver) == {"early": 1}


async def test_what_is_remembered_is_bounded(
    session: Session, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unknown ids are forgotten after a while, and the oldest where there are too many."""
    monkeypatch.setattr(webhook, "_MAX_EARLY", 3)
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


async def test_one_url_accepts_few_ids(session: Session, emulator: Emulator) -> None:
    """Made-up ids on a leaked URL fill neither the memory nor the message bus."""
    receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
    url = receiver.url_for(KEY)
    answers = [await receiver.deliver(url, body(f"task-unified-{k}")) for k in range(6)]
    assert answers == [204] * 4 + [404] * 2
    assert counted(receiver) == {"early": 4, "forged": 2}


async def test_own_urls_are_remembered_apart(
    session: Session, emulator: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest URLs of the session's own tasks are remembered, however many deliveries come."""
    monkeypatch.setattr(webhook, "_MAX_OWN", 3)
    monkeypatch.setattr(webhook, "_MAX_EARLY", 1)
    receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
    urls = [receiver.url_for(f"{KEY}{k}") for k in range(4)]
    for k, url in enumerate(urls):
        receiver.registered(f"task-unified-{k}", url)
        receiver.registered(f"task-unified-{k}", url)
    for url in urls:
        await receiver.deliver(url, body("task-unified-1"))
    assert counted(receiver) == {"early": 1, "late": 3}
