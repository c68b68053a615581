"""What becomes of a POST: resent where it surely was refused, uncertain where nobody knows."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
import sys
from collections.abc import AsyncIterator
from contextvars import ContextVar
from typing import Any

import aiohttp
import pytest
from hostile import (
    Behaviour,
    HostileServer,
    Received,
    Wire,
    answer,
    cut,
    cut_after,
    error,
    hang,
    http,
    raw,
    reset,
    snapshot,
)

from evolink_async import (
    APIConnectionError,
    APIStatusError,
    AuthenticationError,
    Clock,
    ConfigurationError,
    EvolinkError,
    InsufficientCreditsError,
    InvalidRequestError,
    InvalidResponseError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    RequestTooLargeError,
    RequestValidationError,
    RetryPolicy,
    ServerError,
    Session,
    SessionClosedError,
    SubmitUncertainError,
    Task,
    Timeout,
)
from evolink_async.emulator import ManualClock

KEY = "sk-test-secret-0123456789"
DONE = answer(200, snapshot(status="completed", progress=100))
OK = answer(200, snapshot())
PAGE = {"Content-Type": "text/html"}
UNKNOWN = SubmitUncertainError


@pytest.fixture
async def server() -> AsyncIterator[HostileServer]:
    """A server that takes every submit, until a test says otherwise."""
    async with HostileServer(script=[OK], reads=[DONE]) as server:
        yield server


def connect(server: HostileServer, clock: Clock, **settings: Any) -> Session:
    settings.setdefault("timeout", Timeout(connect=5, submit=5, read=5))
    return Session(KEY, base_url=server.base_url, clock=clock, **settings)


# One row per row of the API's error table: what the server does to the first POST, how many
# POSTs it then sees, and what the caller gets. The second POST would be answered well.
LOST_ANSWERS: list[tuple[str, Behaviour, int, type[EvolinkError | Task]]] = [
    ("400", error(400), 1, InvalidRequestError),
    ("401", error(401), 1, AuthenticationError),
    ("402", error(402), 1, InsufficientCreditsError),
    ("403", error(403), 1, PermissionDeniedError),
    ("404", error(404), 1, NotFoundError),
    ("409 conflict", error(409, "idempotency_conflict"), 1, InvalidRequestError),
    ("413", error(413), 1, RequestTooLargeError),
    ("425", error(425), 1, InvalidRequestError),
    ("429", error(429), 2, Task),
    ("429, later", error(429, Retry_After="100"), 2, Task),
    ("429, tomorrow", error(429, Retry_After="86400"), 1, RateLimitError),
    ("429 quota", error(429, "insufficient_quota"), 1, InsufficientCreditsError),
    ("429 key quota", error(429, "key_daily_quota_exhausted"), 1, InsufficientCreditsError),
    ("429 of a proxy", answer(429, b"<h1>slow down</h1>", PAGE), 1, RateLimitError),
    ("503", error(503), 2, Task),
    ("503 no channel", error(503, "no_available_channel"), 2, Task),
    ("503 of a proxy", answer(503, b"<h1>maintenance</h1>", PAGE), 1, UNKNOWN),
    ("500", error(500), 1, UNKNOWN),
    ("502", error(502), 1, UNKNOWN),
    ("504", error(504), 1, UNKNOWN),
    ("408", error(408), 1, UNKNOWN),
    ("520", answer(520, b"", PAGE), 1, UNKNOWN),
    ("529", answer(529, b"", PAGE), 1, UNKNOWN),
    ("302", answer(302, b"", {"Location": "/elsewhere"}), 1, UNKNOWN),
    ("200 without an id", answer(200, {"status": "pending"}), 1, UNKNOWN),
    ("200 with an error", answer(200, {"error": {"code": 500, "message": "no"}}), 1, UNKNOWN),
    ("200 not JSON", answer(200, b"<html>", PAGE), 1, UNKNOWN),
    ("200 too big", answer(200, b'"' + b"x" * (9 << 20) + b'"'), 1, UNKNOWN),
    ("200 empty", answer(200, b""), 1, UNKNOWN),
    ("200 cut", cut_after(http(200, b'{"id": "task-1234", "status": "pending"}'), 95), 1, UNKNOWN),
    ("cut", cut, 1, UNKNOWN),
    ("reset", reset, 1, UNKNOWN),
    ("not HTTP", raw(b"SSH-2.0-OpenSSH\r\n\r\n"), 1, UNKNOWN),
    ("200 without a status", answer(200, {"id": "task-1234"}), 1, Task),
]


@pytest.mark.parametrize(
    ("behaviour", "posts", "expected"),
    [row[1:] for row in LOST_ANSWERS],
    ids=[row[0] for row in LOST_ANSWERS],
)
async def test_lost_answers(
    server: HostileServer,
    clock: ManualClock,
    behaviour: Behaviour,
    posts: int,
    expected: type[EvolinkError | Task],
) -> None:
    """Each answer leads to exactly the POSTs and the outcome its row of the table says."""
    server.script = [behaviour, OK]
    async with connect(server, clock) as session:
        got: object
        try:
            got = await session.submit("A lake")
        except EvolinkError as exc:
            got = exc
        assert type(got) is expected
        assert len(server.posts) == posts
        keys = {post.headers["Idempotency-Key"] for post in server.posts}
        assert len(keys) == 1
        if isinstance(got, SubmitUncertainError):
            assert {got.idempotency_key} == keys
            assert got.idempotency_key in str(got)
            assert got.__cause__ is not None


async def test_an_answer_that_never_comes_is_uncertain(
    server: HostileServer, clock: ManualClock
) -> None:
    """A time-out after sending is not resent."""
    server.script = [hang]
    async with connect(server, clock, timeout=Timeout(submit=0.2)) as session:
        with pytest.raises(SubmitUncertainError, match="no complete answer in time"):
            await session.submit("A lake")
    assert len(server.posts) == 1


async def test_a_refused_connection_is_tried_again(clock: ManualClock) -> None:
    """Nobody listens at first: nothing was sent, so the submit is simply sent later."""
    with socket.socket() as placeholder:
        placeholder.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{placeholder.getsockname()[1]}"
        policy = RetryPolicy(attempts=3)
        async with Session(KEY, base_url=url, clock=clock, retry=policy) as session:
            with pytest.raises(APIConnectionError, match="cannot connect") as caught:
                await session.submit("A lake")
            assert caught.value.sent is False
            assert session.stats.submits == 3
            assert session.stats.retries == 2


async def test_tls_that_fails_was_never_sent(clock: ManualClock) -> None:
    """A server that does not speak TLS gets no request."""

    async def speak_plainly(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    plain = await asyncio.start_server(speak_plainly, "127.0.0.1", 0)
    url = f"https://127.0.0.1:{plain.sockets[0].getsockname()[1]}"
    policy = RetryPolicy(attempts=2)
    async with plain, Session(KEY, base_url=url, clock=clock, retry=policy) as session:
        with pytest.raises(APIConnectionError) as caught:
            await session.submit("A lake")
    assert caught.value.sent is False


async def test_a_connect_time_out_was_never_sent(clock: ManualClock) -> None:
    """A host that accepts no connection in time got no request."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        address = full.getsockname()
        fillers = [socket.socket() for _ in range(3)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(address)
        try:
            async with Session(
                KEY,
                base_url=f"http://127.0.0.1:{address[1]}",
                clock=clock,
                retry=RetryPolicy(attempts=1),
                timeout=Timeout(connect=0.2),
            ) as session:
                with pytest.raises(APIConnectionError) as caught:
                    await session.submit("A lake")
            assert isinstance(caught.value, TimeoutError)
            assert caught.value.sent is False
        finally:
            for filler in fillers:
                filler.close()


async def test_waiting_for_a_permit_does_not_count_as_trying(
    server: HostileServer, clock: ManualClock
) -> None:
    """A submit that queued for longer than the policy's time-out is tried again all the same."""
    server.script = [OK, OK, error(429), OK]
    policy, rate = RetryPolicy(timeout=5), 0.1
    async with connect(server, clock, retry=policy, max_requests_per_second=rate) as session:
        start = clock.now()
        await asyncio.gather(*(session.submit("A lake") for _ in range(3)))
        assert clock.now() - start > 20
    assert len(server.posts) == 4


async def test_a_replayed_refusal_gets_a_new_key(server: HostileServer, clock: ManualClock) -> None:
    """A stored 503 would be repeated for ever under the same key."""
    server.script = [error(503, Idempotency_Replayed="true"), OK]
    async with connect(server, clock) as session:
        task = await session.submit("A lake")
        first, second = (post.headers["Idempotency-Key"] for post in server.posts)
        assert first != second
        assert task.idempotency_key == second


async def test_resend_uncertain_keeps_the_key(server: HostileServer, clock: ManualClock) -> None:
    """A session that opts in resends a submit of unknown outcome under the same key."""
    server.script = [cut, error(500), OK]
    policy = RetryPolicy(resend_uncertain=True)
    async with connect(server, clock, retry=policy) as session:
        await session.submit("A lake", idempotency_key="my-own-key-0123456")
    assert [p.headers["Idempotency-Key"] for p in server.posts] == ["my-own-key-0123456"] * 3


@pytest.mark.parametrize("later", [error(401), error(500)], ids=["401", "500"])
async def test_a_later_error_settles_nothing(
    server: HostileServer, clock: ManualClock, later: Behaviour
) -> None:
    """If the first POST may have been accepted, no error of the repeat says that it was not."""
    server.script = [cut, later]
    policy = RetryPolicy(resend_uncertain=True, attempts=2)
    async with connect(server, clock, retry=policy) as session:
        with pytest.raises(SubmitUncertainError) as caught:
            await session.submit("A lake")
    assert isinstance(caught.value.__cause__, APIConnectionError)


async def test_asking_again_with_the_same_key(server: HostileServer, clock: ManualClock) -> None:
    """An uncertain submit can be asked for again from what its error carries."""
    server.script = [cut, OK]
    async with connect(server, clock) as session:
        with pytest.raises(SubmitUncertainError) as caught:
            await session.submit("A lake", n=2)
        error = caught.value
        task = await session.submit(error.request, idempotency_key=error.idempotency_key)
        assert task.id == snapshot()["id"]
    assert server.posts[0].body == server.posts[1].body
    assert len({post.headers["Idempotency-Key"] for post in server.posts}) == 1


async def test_only_given_fields_are_sent(server: HostileServer, clock: ManualClock) -> None:
    """Fields left out are left to the API's own defaults."""
    async with connect(server, clock) as session:
        await session.submit("A lake")
        await session.submit(
            "A lake", size="1280x1280", n=4, prompt_extend=False, extra={"seed": 7}
        )
    plain, full = (post.json for post in server.posts)
    assert plain == {"model": "wan2.5-text-to-image", "prompt": "A lake"}
    assert full == plain | {"size": "1280x1280", "n": 4, "prompt_extend": False, "seed": 7}
    post = server.posts[0]
    assert (post.method, post.path) == ("POST", "/v1/images/generations")
    assert post.headers["Authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": "x", "n": 3}, "n"),
        ({"prompt": "x", "size": "10x10"}, "size"),
        ({"promt": "x"}, "promt"),
        ({"prompt": "x", "idempotency_key": "short"}, "idempotency_key"),
    ],
)
async def test_bad_requests_send_nothing(
    server: HostileServer, clock: ManualClock, given: dict[str, Any], field: str
) -> None:
    """A request that breaks a rule is refused before any waiting, naming the field."""
    async with connect(server, clock, max_in_flight=1) as session:
        key = given.pop("idempotency_key", None)
        with pytest.raises(RequestValidationError) as caught:
            await session.submit(given, idempotency_key=key)
        assert caught.value.field == field
        assert caught.value.field in str(caught.value)
    assert server.posts == []


async def test_a_callback_for_the_whole_session(server: HostileServer, clock: ManualClock) -> None:
    """Requests without a callback URL get the session's; others keep their own."""
    async with connect(server, clock, callback="https://example.com/a") as session:
        await session.submit("A lake")
        await session.submit("A lake", callback_url="https://example.com/b")
    urls = [post.json["callback_url"] for post in server.posts]
    assert urls == ["https://example.com/a", "https://example.com/b"]


# -- before_send -------------------------------------------------------------------------------


async def test_before_send_gets_the_key_before_the_post(
    server: HostileServer, clock: ManualClock
) -> None:
    """The hook runs before each POST of a submit, with the key it will carry."""
    events: list[tuple[str, str]] = []
    server.on_request = lambda r: events.append(("post", r.headers.get("Idempotency-Key", "")))
    server.script = [error(429), OK]

    async def note(key: str) -> None:
        events.append(("hook", key))

    async with connect(server, clock) as session:
        task = await session.submit("A lake", before_send=note)
    key = task.idempotency_key
    assert events[:4] == [("hook", key), ("post", key), ("hook", key), ("post", key)]


async def test_before_send_that_raises_sends_nothing(
    server: HostileServer, clock: ManualClock
) -> None:
    """What the hook raises reaches the caller as it is, and the slot comes back."""

    async def refuse(_: str) -> None:
        raise LookupError("no room in the ledger")

    async with connect(server, clock, max_in_flight=1) as session:
        with pytest.raises(LookupError, match="no room"):
            await session.submit("A lake", before_send=refuse)
        assert server.posts == []
        await session.submit("A lake")


@pytest.mark.parametrize(
    "kind", [ServerError, RateLimitError, InvalidResponseError, APIConnectionError]
)
async def test_errors_of_before_send_are_not_the_apis(
    server: HostileServer, clock: ManualClock, kind: type[EvolinkError]
) -> None:
    """Whatever it raises, the hook is asked once, nothing is sent and nothing is uncertain."""
    asked: list[str] = []
    details: dict[str, Any] = {"status": 500} if issubclass(kind, APIStatusError) else {}

    async def refuse(key: str) -> None:
        asked.append(key)
        raise kind("of its own", **details)

    async with connect(server, clock) as session:
        with pytest.raises(kind, match="of its own"):
            await session.submit("A lake", before_send=refuse)
    assert (len(asked), server.posts) == (1, [])


async def test_a_hook_that_outlives_the_closing_sends_nothing(
    server: HostileServer, clock: ManualClock
) -> None:
    """No POST starts once closing has begun, also if the hook swallows its cancellation."""
    reached = asyncio.Event()

    async def swallow(_: str) -> None:
        reached.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            return

    session = connect(server, clock)
    submit = asyncio.create_task(session.submit("A lake", before_send=swallow))
    await reached.wait()
    await session.aclose()
    with pytest.raises(SessionClosedError, match="nothing was sent"):
        await submit
    assert server.posts == []


async def test_task_factories_of_the_loop(server: HostileServer, clock: ManualClock) -> None:
    """One that takes nothing but a coroutine will do, and one that fails costs no slot."""
    loop = asyncio.get_running_loop()
    fail = False

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any) -> asyncio.Task[Any]:
        if fail:
            raise LookupError("no more tasks")
        return asyncio.Task(coroutine, loop=loop)

    async with connect(server, clock, max_in_flight=1, max_connections=1) as session:
        loop.set_task_factory(factory)
        try:
            await session.generate("A lake")
            fail = True
            for _ in range(3):
                with pytest.raises(LookupError):
                    await session.submit("A lake")
            fail = False
            await session.generate("A lake")
        finally:
            loop.set_task_factory(None)
    assert len(server.posts) == 2


@pytest.mark.skipif(sys.version_info < (3, 12), reason="tasks run eagerly since Python 3.12")
async def test_a_loop_that_runs_tasks_eagerly(server: HostileServer, clock: ManualClock) -> None:
    """A submit that runs, or fails, before its task is known ends like any other."""

    async def refuse(_: str) -> None:
        raise LookupError("no room in the ledger")

    loop = asyncio.get_running_loop()
    async with connect(server, clock, max_in_flight=1, max_connections=1) as session:
        loop.set_task_factory(getattr(asyncio, "eager_task_factory"))  # noqa: B009 - not in 3.11
        try:
            for _ in range(2):
                with pytest.raises(LookupError):
                    await session.submit("A lake", before_send=refuse)
            await session.generate("A lake")
            await session.generate("A lake")
            assert session.unsent == frozenset()
        finally:
            loop.set_task_factory(None)
    assert len(server.posts) == 2


async def test_a_hook_sees_the_context_of_its_caller(
    server: HostileServer, clock: ManualClock
) -> None:
    """What the caller set in its context, such as a trace, is there when its POST is sent."""
    trace: ContextVar[str] = ContextVar("trace")
    seen: list[str] = []

    async def note(_: str) -> None:
        seen.append(trace.get())

    async with connect(server, clock) as session:

        async def ask(name: str) -> None:
            trace.set(name)
            await session.submit("A lake", before_send=note)

        await asyncio.gather(ask("one"), ask("two"))
    assert sorted(seen) == ["one", "two"]


async def test_a_clock_that_fails_once_sends_nothing_behind_its_callers_back(
    server: HostileServer, clock: ManualClock
) -> None:
    """A caller that was told that its submit failed does not pay for it later."""

    class Failing:
        fail = False

        def now(self) -> float:
            if self.fail:
                self.fail = False
                raise OSError("no time")
            return clock.now()

        sleep_until = staticmethod(clock.sleep_until)
        hold = staticmethod(clock.hold)

    server.script = [OK, OK]
    failing = Failing()
    async with connect(server, failing, max_in_flight=2) as session:
        await session.submit("A lake")
        failing.fail = True
        with pytest.raises(OSError, match="no time"):
            await session.submit("Another lake")
        await session.submit("A third")
        assert session.unsent == frozenset()
    assert [post.json["prompt"] for post in server.posts] == ["A lake", "A third"]


async def test_a_submit_that_is_closed_while_it_waits_sends_nothing(
    server: HostileServer, clock: ManualClock
) -> None:
    """Also where it is driven by hand, and not as an asyncio task that could be cancelled."""
    arrived, go = asyncio.Event(), asyncio.Event()

    async def slowly(request: Received, wire: Wire) -> None:
        arrived.set()
        await go.wait()
        await OK(request, wire)

    server.script = [slowly, OK]
    async with connect(server, clock, max_connections=1) as session:
        first = asyncio.create_task(session.submit("A lake"))
        await arrived.wait()
        waiting = session.submit("Another lake")
        waiting.send(None)
        waiting.close()
        go.set()
        await first
        assert session.unsent == frozenset()
        await session.submit("A third")
    assert [post.json["prompt"] for post in server.posts] == ["A lake", "A third"]


# -- cancellation ------------------------------------------------------------------------------


async def test_cancelled_before_the_post_sends_nothing(
    server: HostileServer, clock: ManualClock
) -> None:
    """A caller cancelled while its hook runs leaves no POST and no slot behind."""
    reached, never = asyncio.Event(), asyncio.Event()

    async def wait(_: str) -> None:
        reached.set()
        await never.wait()

    async with connect(server, clock, max_in_flight=1) as session:
        submit = asyncio.create_task(session.submit("A lake", before_send=wait))
        await reached.wait()
        submit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submit
        assert server.posts == []
        await session.submit("A lake")


async def test_cancelled_after_the_post_keeps_the_task(
    server: HostileServer, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A POST that may have left is finished, its task watched, key and id logged."""
    arrived, go = asyncio.Event(), asyncio.Event()

    async def slowly(request: Received, wire: Wire) -> None:
        arrived.set()
        await go.wait()
        await OK(request, wire)

    server.script = [slowly]
    server.reads = [answer(200, snapshot(status="processing"))]
    async with connect(server, clock) as session:
        submit = asyncio.create_task(session.submit("A lake"))
        await arrived.wait()
        submit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submit
        go.set()
        while not session.tasks:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0)
        (task,) = session.tasks
        assert task.id == snapshot()["id"]
        assert task.idempotency_key == server.posts[0].headers["Idempotency-Key"]
    assert f"made task {task.id} (key {task.idempotency_key})" in caplog.text


async def test_cancelled_between_a_refusal_and_the_next_post(
    server: HostileServer, clock: ManualClock
) -> None:
    """A submit whose POSTs were surely refused costs nothing yet, and nothing more is sent."""
    keys: list[str] = []
    again = asyncio.Event()

    async def wait_the_second_time(key: str) -> None:
        keys.append(key)
        if len(keys) == 2:
            again.set()
            await asyncio.Event().wait()

    server.script = [error(429), OK]
    async with connect(server, clock, max_in_flight=1) as session:
        submit = asyncio.create_task(session.submit("A lake", before_send=wait_the_second_time))
        await again.wait()
        assert session.unsent == {keys[0]}
        submit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submit
        assert len(server.posts) == 1
        await session.submit("Another lake")


async def test_cancelled_after_a_post_that_is_refused_it_is_sent_again(
    server: HostileServer, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """The submit was the session's own from its first POST on: it is finished as any other."""
    arrived, go = asyncio.Event(), asyncio.Event()

    async def slowly_refuse(request: Received, wire: Wire) -> None:
        arrived.set()
        await go.wait()
        await error(429)(request, wire)

    server.script = [slowly_refuse, OK]
    async with connect(server, clock) as session:
        submit = asyncio.create_task(session.submit("A lake"))
        await arrived.wait()
        submit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submit
        go.set()
        while "made task" not in caplog.text:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0)
    assert len(server.posts) == 2


async def test_cancelled_as_it_is_accepted_it_is_not_unsent(
    server: HostileServer, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """A caller that learns of the cancellation first must not take it for free, and resend it."""

    class Hooks:
        def url_for(self, idempotency_key: str) -> str:
            return f"https://hooks.example/{idempotency_key}"

        def registered(self, task_id: str, callback_url: str) -> None:
            accepted[task_id] = callback_url
            submit.cancel()

    accepted: dict[str, str] = {}
    unsent: list[frozenset[str]] = []
    server.reads = [answer(200, snapshot(status="processing"))]
    async with connect(server, clock) as session:

        async def ask() -> None:
            try:
                await session.submit("A lake", callback=Hooks())
            except asyncio.CancelledError:
                unsent.append(session.unsent)
                raise

        submit = asyncio.create_task(ask())
        with pytest.raises(asyncio.CancelledError):
            await submit
    assert (list(accepted), unsent) == ([snapshot()["id"]], [frozenset()])
    assert caplog.text.count("made task") == 1


async def test_a_cancelled_callers_failure_is_logged(
    server: HostileServer, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """If such a POST turns out uncertain, the log has its key."""
    arrived, go = asyncio.Event(), asyncio.Event()

    async def slowly(_: Received, wire: Wire) -> None:
        arrived.set()
        await go.wait()
        wire.reset()

    server.script = [slowly]
    async with connect(server, clock, max_in_flight=1) as session:
        submit = asyncio.create_task(session.submit("A lake"))
        await arrived.wait()
        submit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submit
        go.set()
        server.script = [OK]
        await session.submit("Another lake")
    assert f"failed (key {server.posts[0].headers['Idempotency-Key']})" in caplog.text


async def test_closing_in_the_middle_of_a_submit(
    server: HostileServer, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Closing gives a POST in flight its time-out, then its caller hears it is uncertain."""
    arrived = asyncio.Event()
    server.script = [hang]
    server.on_request = lambda _: arrived.set()
    session = connect(server, clock, timeout=Timeout(submit=0.2))
    submit = asyncio.create_task(session.submit("A lake"))
    await arrived.wait()
    await session.aclose()
    with pytest.raises(SubmitUncertainError):
        await submit
    assert len(server.posts) == 1


async def test_closing_at_once_in_the_middle_of_a_submit(
    server: HostileServer, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Closing with grace=0 cuts the POST off: uncertain, and logged with its key."""
    arrived = asyncio.Event()
    server.script = [hang]
    server.on_request = lambda _: arrived.set()
    session = connect(server, clock)
    submit = asyncio.create_task(session.submit("A lake"))
    await arrived.wait()
    await session.aclose(grace=0)
    with pytest.raises(SubmitUncertainError, match="cut off") as caught:
        await submit
    assert caught.value.idempotency_key in caplog.text


async def test_waiting_for_a_permit_costs_nothing_yet(
    server: HostileServer, clock: ManualClock
) -> None:
    """A submit that waits for a permit may be cancelled or closed, and has sent nothing."""
    arrived = asyncio.Event()
    server.script = [hang]
    server.on_request = lambda _: arrived.set()
    session = connect(server, clock, max_connections=1, max_in_flight=4)
    submits = [asyncio.create_task(session.submit("A lake")) for _ in range(4)]
    await arrived.wait()
    assert len(session.unsent) == 3
    submits[3].cancel()
    with pytest.raises(asyncio.CancelledError):
        await submits[3]
    while len(session.unsent) == 3:  # noqa: ASYNC110 - its task ends a turn of the loop later
        await asyncio.sleep(0)
    assert len(session.unsent) == 2
    assert session._submitter._slots._value == 1
    close = asyncio.create_task(session.aclose())
    for submit in submits[1:3]:
        with pytest.raises(SessionClosedError, match="nothing was sent"):
            await submit
    assert not submits[0].done()
    close.cancel()
    with pytest.raises(SubmitUncertainError):
        await submits[0]
    await asyncio.gather(close, return_exceptions=True)
    assert len(server.posts) == 1
    assert session._submitter._slots._value >= 4


async def test_a_post_that_never_began_gives_its_slot_back(
    server: HostileServer, clock: ManualClock
) -> None:
    """Somebody who cancels all tasks of the loop leaves the session usable."""
    server.script, server.reads = [OK], [DONE]
    async with connect(server, clock, max_connections=1, max_in_flight=1) as session:
        submit = asyncio.create_task(session.submit("A lake"))
        await asyncio.sleep(0)
        (post,) = session._submitter._running
        post.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submit
        assert server.posts == []
        await session.submit("A lake")


async def test_closing_wakes_those_who_wait_to_submit(
    server: HostileServer, clock: ManualClock
) -> None:
    """Submits without a slot, and in their hook, end with SessionClosedError and send nothing."""
    server.reads = [hang]
    reached = asyncio.Event()

    async def wait(_: str) -> None:
        reached.set()
        await asyncio.Event().wait()

    session = connect(server, clock, max_in_flight=2)
    await session.submit("One that runs")
    hooked = asyncio.create_task(session.submit("A lake", before_send=wait))
    await reached.wait()
    queued = [asyncio.create_task(session.submit("A lake")) for _ in range(3)]
    await asyncio.sleep(0)
    assert session.stats.waiting == 3
    await session.aclose()
    for submit in [hooked, *queued]:
        with pytest.raises(SessionClosedError, match="nothing was sent"):
            await submit
    with pytest.raises(SessionClosedError):
        await session.submit("Too late")
    assert len(server.posts) == 1


async def test_a_loop_that_dies_leaves_the_key_in_the_log(
    server: HostileServer, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Cancelling everything, as asyncio.run does at its end, does not lose a POST silently."""
    arrived = asyncio.Event()
    server.script = [hang]
    server.on_request = lambda _: arrived.set()
    session = connect(server, clock)
    with caplog.at_level(logging.WARNING):
        submit = asyncio.create_task(session.submit("A lake"))
        await arrived.wait()
        post, *_ = (t for t in asyncio.all_tasks() if "Submitter._run" in repr(t.get_coro()))
        post.cancel()
        with pytest.raises(SubmitUncertainError):
            await submit
    assert server.posts[0].headers["Idempotency-Key"] in caplog.text
    await session.aclose()


# -- what a careful reader tried ---------------------------------------------------------------


async def test_a_tracer_that_raises_leaves_the_submit_uncertain(
    server: HostileServer, clock: ManualClock
) -> None:
    """Whatever a caller's own aiohttp session raises after the POST, its key is reported."""

    async def explode(*_: object) -> None:
        raise KeyError("a bug of theirs")

    trace = aiohttp.TraceConfig()
    trace.on_request_end.append(explode)
    async with (
        aiohttp.ClientSession(trace_configs=[trace]) as http,
        connect(server, clock, http=http) as session,
    ):
        with pytest.raises(SubmitUncertainError) as caught:
            await session.submit("A lake")
        assert caught.value.idempotency_key == server.posts[0].headers["Idempotency-Key"]


async def test_a_tracer_that_raises_cancellation_fails_one_read(
    server: HostileServer, clock: ManualClock
) -> None:
    """Nobody was cancelled: the read failed, and the watch goes on."""
    bugs = ["a bug of theirs"]

    async def explode(*_: object) -> None:
        if bugs:
            raise asyncio.CancelledError(bugs.pop())

    trace = aiohttp.TraceConfig()
    trace.on_request_start.append(explode)
    server.reads = [answer(200, snapshot(id="task-1", status="completed"))]
    async with (
        aiohttp.ClientSession(trace_configs=[trace]) as http,
        connect(server, clock, http=http) as session,
    ):
        task = session.task("task-1")
        with pytest.raises(APIConnectionError, match="a bug of theirs"):
            await task.refresh()
        assert (await task).task_id == "task-1"


async def test_a_caller_that_is_dropped_leaves_no_unread_error(
    server: HostileServer, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """What its submit failed of is nothing for asyncio to complain of."""

    async def refuse(_: str) -> None:
        raise LookupError("no money")

    async with connect(server, clock) as session:
        caller = session.submit("A lake", before_send=refuse)
        answer = caller.send(None)
        while not answer.done():  # noqa: ASYNC110 - nobody else may wait for it
            await asyncio.sleep(0)
        caller.close()
        del answer
        gc.collect()
    assert not [record for record in caplog.records if record.name == "asyncio"]
    assert server.posts == []


async def test_closing_starts_no_new_post() -> None:
    """A submit that waits to be resent is not resent by a session that closes."""
    policy = RetryPolicy(resend_uncertain=True, wait_initial=20, wait_jitter=0)
    async with HostileServer(script=[error(500), OK], reads=[DONE]) as server:
        session = Session(KEY, base_url=server.base_url, retry=policy)
        submit = asyncio.create_task(session.submit("A lake"))
        while session.stats.retries == 0:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0)
        await session.aclose()
        with pytest.raises(SubmitUncertainError):
            await submit
        assert len(server.posts) == 1


async def test_a_cancelled_close_leaves_nothing_running(
    server: HostileServer, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Cancelling aclose cuts the POSTs in flight off, with their keys in the log."""
    arrived = asyncio.Event()
    server.script = [hang]
    server.on_request = lambda _: arrived.set()
    async with aiohttp.ClientSession() as http:
        session = connect(server, clock, http=http)
        submit = asyncio.create_task(session.submit("A lake"))
        await arrived.wait()
        close = asyncio.create_task(session.aclose())
        await asyncio.sleep(0)
        close.cancel()
        with pytest.raises(asyncio.CancelledError):
            await close
        with pytest.raises(SubmitUncertainError):
            await submit
        assert session._submitter._running == {}
        await session.aclose()
    assert server.posts[0].headers["Idempotency-Key"] in caplog.text


@pytest.mark.parametrize("turns", range(6))
async def test_a_cancelled_close_closes_all_the_same(
    server: HostileServer, clock: ManualClock, turns: int
) -> None:
    """Cancelled at whatever moment, it wakes all waiters, and can be called again."""
    server.script = [answer(200, snapshot(id=f"task-{k:04}")) for k in range(3)]
    session = connect(server, clock)
    tasks = [await session.submit("A lake") for _ in range(3)]
    waiting = [asyncio.ensure_future(task.wait()) for task in tasks]
    close = asyncio.create_task(session.aclose())
    for _ in range(turns):
        await asyncio.sleep(0)
    close.cancel()
    await asyncio.gather(close, return_exceptions=True)
    await session.aclose()
    for waiter in waiting:
        with pytest.raises(SessionClosedError):
            await waiter
    assert all(client.closed for client in session._transport._own)


async def test_a_hook_that_swallows_the_cancellation_sends_nothing(
    server: HostileServer, clock: ManualClock
) -> None:
    """The caller is gone before any POST left: none leaves, whatever the hook does."""
    reached, go = asyncio.Event(), asyncio.Event()

    async def swallow(_: str) -> None:
        reached.set()
        try:
            await go.wait()
        except asyncio.CancelledError:
            return

    async with connect(server, clock, max_in_flight=1) as session:
        submit = asyncio.create_task(session.submit("A lake", before_send=swallow))
        await reached.wait()
        submit.cancel()
        with pytest.raises(asyncio.CancelledError):
            await submit
        await session.submit("Another lake")
    assert len(server.posts) == 1


async def test_a_key_behind_json_escapes_does_not_show(
    server: HostileServer, clock: ManualClock
) -> None:
    """A server that spells our key with escapes does not get it into a message."""
    spelled = "".join(f"\\u{ord(c):04x}" for c in KEY)
    body = f'{{"error": {{"code": "x", "message": "bad key {spelled}"}}}}'.encode()
    server.script = [answer(401, body)]
    async with connect(server, clock) as session:
        with pytest.raises(AuthenticationError) as caught:
            await session.submit("A lake")
    assert KEY not in str(caught.value)
    assert "[API key]" in str(caught.value)


def test_a_task_in_another_loop_says_so() -> None:
    """Awaiting a task where its session does not live is an error, not a wait for ever."""
    kept: list[Any] = []

    async def first() -> None:
        async with HostileServer(script=[OK], reads=[hang]) as server:
            session = Session(KEY, base_url=server.base_url)
            kept.extend([session, await session.submit("A lake")])
            await session.aclose()

    async def second() -> None:
        await kept[1]

    asyncio.run(first())
    with pytest.raises(ConfigurationError, match="another event loop"):
        asyncio.run(second())
