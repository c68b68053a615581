"""The URLs of callbacks: who makes them, and for which submits."""

from __future__ import annotations

import pytest
from callback_server import KEY, MODEL, PUBLIC, SECRET, CallbackServer, connect, counted, url_of

from evolink_async import ConfigurationError, PollPolicy, RawRequest, Session
from evolink_async.emulator import Emulator, faults
from evolink_async.webhook import CallbackReceiver


def test_urls_survive_restarts_and_replicas() -> None:
    """The same secret makes the same URL in any process; another secret, another URL."""
    urls = [
        CallbackReceiver(Session("key"), public_url=url, secret=secret).url_for(KEY)
        for url, secret in ((PUBLIC, SECRET), (f"{PUBLIC}/", SECRET.encode()), (PUBLIC, None))
    ]
    assert urls[0] == urls[1] != urls[2]
    assert urls[0].startswith(f"{PUBLIC}/{KEY}.")
    assert SECRET not in urls[0]


async def test_deliveries_after_a_restart(emulator: Emulator, server: CallbackServer) -> None:
    """A task picked up by its id is nudged by the callback its former process asked for."""
    async with connect(emulator) as session:
        server.receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
        task_id = (await session.submit("A lake")).id
    async with connect(emulator, poll=PollPolicy(min_interval=0.5)) as session:
        server.receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
        await session.task(task_id)
    assert counted(server.receiver) == {"nudged": 1}
    assert emulator.clock.now() - emulator.books.task(task_id).ends_at < 0.6


async def test_a_minted_key_keeps_the_url(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """A submit that needs a second key after a replayed refusal keeps the URL of the first."""
    emulator.faults.add(faults.Status(503, route="submit", times=1, replayed=True))
    task = await session.submit("A lake", idempotency_key=KEY)
    assert task.idempotency_key != KEY
    assert url_of(task) == receiver.url_for(KEY)
    await task
    assert counted(receiver) == {"nudged": 1}


async def test_a_callback_per_submit(
    session: Session, emulator: Emulator, receiver: CallbackReceiver
) -> None:
    """A submit may override the default: no callback, a URL, another receiver."""
    other = CallbackReceiver(session, public_url=f"{PUBLIC}/b", default=False)
    assert session.callback is receiver
    without = await session.submit("A lake", callback=None)
    fixed = await session.submit("A lake", callback="https://example.com/a")
    own = await session.submit("A lake", callback_url="https://example.com/b")
    second = await session.submit("A lake", callback=other, idempotency_key=KEY)
    raw = await session.submit(
        RawRequest("/v1/images/generations", body={"model": MODEL, "prompt": "A lake"}),
        idempotency_key=KEY[::-1],
    )
    assert without.request is not None
    assert without.request.callback_url is None
    assert url_of(fixed) == "https://example.com/a"
    assert url_of(own) == "https://example.com/b"
    assert url_of(second) == other.url_for(KEY)
    assert url_of(raw) == receiver.url_for(KEY[::-1])
    result = await session.generate("A lake", callback=None)
    assert len(emulator.books.callbacks(result.task_id)) == 0


def test_a_session_accepts_a_url_or_a_source_of_urls() -> None:
    """Anything but a URL, a source of URLs or None is refused."""
    assert Session("key", callback=PUBLIC).callback == PUBLIC
    session = Session("key")
    receiver = CallbackReceiver(session, public_url=PUBLIC, default=False)
    assert receiver.session is session
    assert session.callback is None
    session.callback = receiver
    assert session.callback is receiver
    with pytest.raises(ConfigurationError, match="callback=7 is not allowed"):
        session.callback = 7  # type: ignore[assignment]  # what is being tested


async def test_a_source_of_urls_that_fails(
    session: Session, emulator: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    """Its failure after the POST is logged, and loses no task."""

    class Source:
        def url_for(self, idempotency_key: str) -> str:
            return f"{PUBLIC}/{idempotency_key}"

        def registered(self, task_id: str, callback_url: str) -> None:
            raise ValueError(task_id, callback_url)

    session.callback = Source()
    task = await session.submit("A lake")
    assert await task
    assert f"failed to register task {task.id}" in caplog.text
    assert session.stats.running == 0
