"""Whatever arrives from the API's address: a value or an error of ours, and no trace of the key."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import logging
import pickle
import sys
import threading
import traceback
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hostile import Behaviour, HostileServer, Received, Wire, answer, cut_after, http, snapshot

from evolink_async import (
    APIConnectionError,
    APIStatusError,
    ConfigurationError,
    EvolinkError,
    InvalidResponseError,
    RawRequest,
    RequestValidationError,
    RetryPolicy,
    Session,
    SubmitUncertainError,
    Task,
    TaskFailedError,
    Timeout,
)
from evolink_async.emulator import Emulator, ManualClock

if sys.platform == "win32":  # pragma: no cover - the servers above speak POSIX sockets
    pytest.skip("loopback resets differ", allow_module_level=True)

KEY = "sk-hostile-0123456789abcdef"
ID = str(snapshot()["id"])
ONCE = RetryPolicy(attempts=1)
GOOD = json.dumps(snapshot()).encode()


def connect(server: HostileServer, clock: ManualClock, **settings: Any) -> Session:
    settings.setdefault("timeout", Timeout(connect=1, submit=0.4, read=0.4))
    settings.setdefault("retry", ONCE)
    return Session(KEY, base_url=server.base_url, clock=clock, **settings)


# -- answers -----------------------------------------------------------------------------------


def streamed(head: str, chunk: bytes, times: int, pause: float = 0.0) -> Behaviour:
    """An answer of *times* chunks, made while it is sent."""

    async def behave(_: Received, wire: Wire) -> None:
        await wire.send(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode())
        for _chunk in range(times):
            await wire.send(chunk)
            await asyncio.sleep(pause)
        wire.writer.close()

    return behave


def gzip_bomb() -> Behaviour:
    """A gigabyte of spaces in a megabyte of gzip."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    body = b"".join(packer.compress(b" " * (1 << 20)) for _ in range(1024)) + packer.flush()
    return answer(200, body, {"Content-Encoding": "gzip"})


def nested(depth: int) -> bytes:
    return b'{"id": "task-1234", "status": "pending", "x": ' + b"[" * depth + b"]" * depth + b"}"


def body(data: bytes, **headers: str) -> Callable[[], Behaviour]:
    return lambda: answer(200, data, {k.replace("_", "-"): v for k, v in headers.items()})


def task(**changes: Any) -> Callable[[], Behaviour]:
    return lambda: answer(200, snapshot(**changes))


def wire(data: bytes) -> Callable[[], Behaviour]:
    return lambda: cut_after(data, len(data))


# Answers that are no task: a submit is uncertain, a read fails.
UNUSABLE: dict[str, Callable[[], Behaviour]] = {
    "html": body(b"<!doctype html><h1>Welcome</h1>", Content_Type="text/html"),
    "empty": body(b""),
    "null": body(b"null"),
    "true": body(b"true"),
    "number": body(b"17"),
    "string": body(b'"task-1234"'),
    "list": body(b"[" + GOOD + b"]"),
    "truncated json": body(GOOD[:-20]),
    "two documents": body(GOOD + GOOD),
    "nested lists": body(b"[" * 200_000),
    "nested objects": body(b'{"a":' * 200_000),
    "deep inside a task": body(nested(100_000)),
    "huge integer": body(b'{"id": "task-1234", "status": "x", "n": ' + b"9" * 10_000 + b"}"),
    "utf-16": body(GOOD.decode().encode("utf-16-le")[:-1]),
    "latin-1": body('{"id": "tâsk-1234", "status": "pending"}'.encode("latin-1")),
    "not text": body(bytes(range(256))),
    "error body": body(b'{"error": {"code": 500, "message": "oops"}}'),
    "no id": body(b'{"status": "pending"}'),
    "id null": task(id=None),
    "id number": task(id=1234),
    "id list": task(id=["task-1234"]),
    "id empty": task(id=""),
    "id long": task(id="x" * 129),
    "id traversal": task(id="../../credits"),
    "id dots": task(id="...."),
    "id newline": task(id="task-1234\r\nX-Evil: 1"),
    "50 MB": lambda: streamed("Content-Length: 52428800", b"x" * 65536, 800),
    "never-ending": lambda: streamed("Content-Type: application/json", b"[" * 65536, 10**6),
    "gzip bomb": gzip_bomb,
    "bad gzip": body(GOOD, Content_Encoding="gzip"),
    "unknown encoding": body(b"\x00\x01", Content_Encoding="snappy"),
    "one byte at a time": lambda: streamed(
        f"Content-Length: {len(GOOD)}", b" ", len(GOOD), pause=0.04
    ),
    "too long": wire(http(200, GOOD)[:-10]),
    "bad chunks": wire(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nZZZ\r\n"),
    "bad length": wire(b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n{}"),
    "two lengths": wire(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"),
    "huge header": wire(b"HTTP/1.1 200 OK\r\nX-A: " + b"a" * 100_000 + b"\r\n\r\n"),
    "many headers": wire(b"HTTP/1.1 200 OK\r\n" + b"X-A: a\r\n" * 20_000 + b"\r\n"),
    "no status": wire(b"HTTP/1.1\r\n\r\n"),
    "not http": wire(b"\x16\x03\x01\x02\x00\x01"),
    "silence": lambda: streamed("Content-Length: 5", b"", 50, pause=0.02),
    "redirect": lambda: answer(307, b"", {"Location": "http://127.0.0.1:9/v1/tasks/x"}),
    "redirect to itself": lambda: answer(308, b"", {"Location": "/v1/images/generations"}),
    "no content": lambda: answer(204, b""),
}

# Odd answers that are a task nevertheless.
USABLE: dict[str, Callable[[], Behaviour]] = {
    "duplicated keys": body(GOOD[:-1] + b', "progress": 5}'),
    "nan": body(GOOD[:-1] + b', "price": NaN, "more": -Infinity}'),
    "new fields": task(brand_new={"a": [1, 2, 3]}, another=None),
    "unknown status": task(status="upscaling"),
    "bom": body(b"\xef\xbb\xbf" + GOOD),
    "gzip": body(gzip.compress(GOOD), Content_Encoding="gzip"),
    "html type": body(GOOD, Content_Type="text/html; charset=klingon"),
    "progress text": task(progress="half"),
    "progress huge": task(progress=10**400),
    "progress negative": task(progress=-1),
    "wrong types": task(
        model=7, type=[], created="now", task_info="soon", usage=[1], results={}, error=3
    ),
    "wrong types inside": task(
        task_info={"estimated_time": "soon"},
        usage={"credits_reserved": True, "billing_rule": 5},
        results=[None, 5, {}],
        result_data=[{"image_url": 5}, "x"],
        error={"code": [], "message": 5},
    ),
    "lone surrogate": body(GOOD[:-1] + b', "model": "\\ud800"}'),
    "control characters": task(model="\x1b[2J\x07"),
}


@pytest.mark.parametrize("name", UNUSABLE)
async def test_unusable_answers(name: str, clock: ManualClock) -> None:
    """A submit so answered is uncertain and sent once; a read so answered fails; both in time."""
    behaviour = UNUSABLE[name]()
    async with HostileServer(script=[behaviour], reads=[behaviour]) as server:
        async with asyncio.timeout(10), connect(server, clock) as session:
            with pytest.raises(SubmitUncertainError):
                await session.submit("A lake")
            assert len(server.posts) == 1
            with pytest.raises(EvolinkError):
                await session.task(ID).refresh()
            with pytest.raises(EvolinkError):
                await session.credits()
            with pytest.raises(EvolinkError):
                _ = [row async for row in session.list()]


@pytest.mark.parametrize("name", USABLE)
async def test_odd_but_usable_answers(name: str, clock: ManualClock) -> None:
    """What is merely unknown or of an unexpected type fails nothing and loses no id."""
    behaviour = USABLE[name]()
    async with HostileServer(script=[behaviour], reads=[behaviour]) as server:
        async with asyncio.timeout(10), connect(server, clock) as session:
            task = await session.submit("A lake")
            assert task.id == ID
            seen = await task.refresh()
            assert seen.status in {"pending", "upscaling"}
            for prop in ("model", "type", "created", "estimated_time", "duration", "usage"):
                getattr(seen, prop)
            assert seen.urls == ()
            assert (seen.progress is None) or 0 <= seen.progress <= 100
            assert isinstance(seen.raw, dict)


async def test_an_answer_about_another_task(clock: ManualClock) -> None:
    """A read that answers with another task's state is no answer."""
    other = answer(200, snapshot(id="task-of-another", status="completed"))
    async with HostileServer(script=[answer(200, snapshot())], reads=[other]) as server:
        async with connect(server, clock) as session:
            task = await session.submit("A lake")
            with pytest.raises(InvalidResponseError, match="task-of-another"):
                await task.refresh()
            assert task.status == "pending"


async def test_cut_at_each_byte_of_a_submits_answer(clock: ManualClock) -> None:
    """Never two submits, never a lost id that is not reported, wherever the answer breaks."""
    whole = http(200, GOOD)
    async with HostileServer(script=[cut_after(whole, 0)]) as server:
        async with connect(server, clock, timeout=Timeout()) as session:
            for count in range(len(whole) + 1):
                server.script = [cut_after(whole, count)]
                before = len(server.posts)
                try:
                    outcome: object = await session.submit("A lake")
                except EvolinkError as exc:
                    outcome = exc
                assert len(server.posts) == before + 1
                if count < len(whole):
                    assert type(outcome) is SubmitUncertainError
                    key = server.posts[-1].headers["Idempotency-Key"]
                    assert outcome.idempotency_key == key
                else:
                    assert isinstance(outcome, Task)


async def test_cut_at_each_byte_of_a_reads_answer(clock: ManualClock) -> None:
    """A read that breaks anywhere is no information; the next one counts."""
    whole = http(200, json.dumps(snapshot(status="completed")).encode())
    async with HostileServer(reads=[cut_after(whole, 0)]) as server:
        async with connect(server, clock, timeout=Timeout()) as session:
            for count in range(len(whole)):
                server.reads = [cut_after(whole, count)]
                with pytest.raises(EvolinkError):
                    await session.task(f"task-{count:04}").refresh()
            server.reads = [answer(200, snapshot(status="completed"))]
            assert (await session.task(ID)).task_id == ID


@contextlib.contextmanager
def memory_growth(limit: int) -> Iterator[None]:
    """Fail if the resident memory ever grows by more than *limit* bytes meanwhile."""
    statm = Path("/proc/self/statm")
    if not statm.exists():
        pytest.skip("needs /proc to see its own memory")
    page = 4096
    done = threading.Event()
    peak = start = int(statm.read_text().split()[1]) * page

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, int(statm.read_text().split()[1]) * page)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        yield
    finally:
        done.set()
        sampler.join()
    assert peak - start < limit, f"grew by {(peak - start) >> 20} MiB"


async def test_the_whole_battery_in_bounded_memory(clock: ManualClock) -> None:
    """All of the above in one session needs less than 64 MiB more than before."""
    cases = {**UNUSABLE, **USABLE}
    behaviours = [make() for make in cases.values()]
    with memory_growth(64 << 20):
        async with HostileServer(reads=[behaviours[0]]) as server:
            async with connect(server, clock) as session:
                for behaviour in behaviours:
                    server.script = server.reads = [behaviour]
                    async with asyncio.timeout(5):
                        with contextlib.suppress(EvolinkError):
                            await session.submit("A lake")
                        with contextlib.suppress(EvolinkError):
                            await session.task(ID).refresh()


# -- the key -----------------------------------------------------------------------------------


def chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its causes and contexts."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def everything_about(error: BaseException) -> str:
    """All an error report could show: texts, attributes, tracebacks with local variables."""
    shown = [repr(vars(e)) + repr(e) + str(e) + repr(e.args) for e in chain(error)]
    report = traceback.TracebackException.from_exception(error, capture_locals=True)
    ours = [line for line in report.format(chain=True) if "tests/test_hostile" not in line]
    pickled = pickle.dumps(error).decode("latin-1") if isinstance(error, EvolinkError) else ""
    return "\n".join([*shown, *ours, pickled])


async def echo(request: Received, wire: Wire) -> None:
    """Answer 400 with everything that was received."""
    told = {"code": 400, "message": f"bad {request.headers}", "type": str(request.headers)}
    headers = {"X-Request-Id": request.headers.get("Authorization", "")}
    await wire.send(http(400, json.dumps({"error": told}).encode(), headers))


async def echo_as_page(request: Received, wire: Wire) -> None:
    """Answer with a proxy's page that shows the request's headers."""
    await wire.send(http(502, f"<pre>{request.headers}</pre>".encode()))


async def echo_as_task(request: Received, wire: Wire) -> None:
    """Answer a failed task that quotes our headers."""
    told = {"code": "service_error", "message": f"bad {request.headers}"}
    value = snapshot(status="failed", error=told, model=request.headers["Authorization"])
    await wire.send(http(200, json.dumps(value).encode()))


async def echo_in_utf_16(request: Received, wire: Wire) -> None:
    """Answer 400 in an encoding that JSON may not have."""
    told = {"code": 400, "message": f"bad {request.headers['Authorization']}"}
    await wire.send(http(400, json.dumps({"error": told}).encode("utf-16")))


async def echo_and_break_off(request: Received, wire: Wire) -> None:
    """Quote the key in a header of an answer that is cut short."""
    headers = {"X-Request-Id": request.headers["Authorization"]}
    await wire.send(http(200, b"{" + b" " * 500, headers)[:-100])
    wire.reset()


async def break_off(_: Received, wire: Wire) -> None:
    wire.reset()


@pytest.mark.parametrize(
    "behaviour",
    [
        echo,
        echo_as_page,
        echo_as_task,
        echo_in_utf_16,
        echo_and_break_off,
        break_off,
        answer(200, b"<html>"),
        answer(302, b"", {"Location": "http://127.0.0.1:9/"}),
        streamed("Content-Length: 500", b"", 100, pause=0.02),
    ],
    ids=[
        "echo",
        "page",
        "task",
        "utf-16",
        "broken",
        "reset",
        "html",
        "redirect",
        "silence",
    ],
)
async def test_the_key_shows_nowhere(
    behaviour: Behaviour, clock: ManualClock, caplog: pytest.LogCaptureFixture
) -> None:
    """Not in errors, their causes, tracebacks with locals, pickles, values or debug logs."""
    caplog.set_level(logging.DEBUG)
    async with HostileServer(script=[behaviour], reads=[behaviour]) as server:
        async with connect(server, clock, timeout=Timeout(submit=0.2, read=0.2)) as session:
            errors: list[BaseException] = []
            shown = [repr(session), repr(vars(session)), repr(session.stats)]
            calls: list[Callable[[], Any]] = [
                lambda: session.generate("A lake"),
                lambda: session.task(ID).wait(timeout=20),
                lambda: session.task(ID).refresh(),
                session.credits,
            ]
            for call in calls:
                try:
                    shown.append(repr(await call()))
                except EvolinkError as exc:
                    errors.append(exc)
            shown += [everything_about(error) for error in errors]
            shown += [
                repr(e.snapshot.raw)
                for e in errors
                if isinstance(e, TaskFailedError) and e.snapshot
            ]
    assert errors
    assert any("Bearer" in text or "[API key]" in text for text in shown) is (
        behaviour in {echo, echo_as_page, echo_as_task, echo_in_utf_16}
    )
    text = "\n".join([*shown, caplog.text])
    assert KEY not in text
    assert all(post.headers["Authorization"] == f"Bearer {KEY}" for post in server.posts)


@pytest.mark.parametrize("before", range(100, 141, 8))
async def test_a_key_where_a_message_is_cut(clock: ManualClock, before: int) -> None:
    """Also a part of the key is none of a message's business."""

    async def no_http(request: Received, wire: Wire) -> None:
        await wire.send(b"X" * before + request.headers["Authorization"].encode() + b"\r\n\r\n")

    async with (
        HostileServer(script=[no_http]) as server,
        connect(server, clock) as session,
    ):
        with pytest.raises(SubmitUncertainError) as caught:
            await session.submit("A lake")
    assert KEY[:6] not in str(caught.value)


def test_a_session_is_not_pickled() -> None:
    """Pickling a session or its key is refused instead of writing the key somewhere."""
    session = Session(KEY)
    key = session._settings.api_key
    for thing in (session, key):
        with pytest.raises(TypeError):
            pickle.dumps(thing)
    assert KEY not in repr(key)


# -- other hosts -------------------------------------------------------------------------------


async def test_another_host_never_sees_the_key(clock: ManualClock, tmp_path: Path) -> None:
    """Redirects, result links and crafted paths lead elsewhere; the key does not."""
    png = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR" + b"\x00" * 17 + b"\x00\x00\x00\x00IEND\xaeB`\x82"
    async with HostileServer(
        script=[answer(200, snapshot())], reads=[answer(200, png, {"Content-Type": "image/png"})]
    ) as elsewhere:
        away = f"{elsewhere.base_url}/v1/tasks/{ID}"
        links = [f"{elsewhere.base_url}/a.png", f"{elsewhere.base_url}/b.png?sig=1"]
        done = answer(200, snapshot(status="completed", results=links))
        moves = [answer(code, b"", {"Location": away}) for code in (301, 302, 303, 307, 308)]
        async with HostileServer(script=[answer(200, snapshot())], reads=[done]) as server:
            async with connect(server, clock) as session:
                result = await session.generate("A lake")
                assert len(await session.download(result, tmp_path)) == 2
                for move in moves:
                    server.script = server.reads = [move]
                    with pytest.raises(SubmitUncertainError):
                        await session.submit("A lake")
                    with pytest.raises(APIStatusError):
                        await session.credits()
                    server.reads = [move]
                    with pytest.raises(EvolinkError):
                        await session.task("task-moved").refresh()
                other = elsewhere.base_url.removeprefix("http:")
                for path in (other, f"/{other}", f"{other}/x", elsewhere.base_url):
                    with pytest.raises(RequestValidationError):
                        RawRequest(path, body={})
        assert {r.path for r in elsewhere.received} == {"/a.png", "/b.png?sig=1"}
        for request in elsewhere.received:
            assert KEY not in repr(request)
            assert "Authorization" not in request.headers
            assert "Cookie" not in request.headers


async def test_a_proxy_never_sees_the_key(
    monkeypatch: pytest.MonkeyPatch, clock: ManualClock
) -> None:
    """It is asked for a tunnel, and told nothing that is meant for the API."""
    heads: list[bytes] = []

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{port}")
        monkeypatch.delenv("no_proxy", raising=False)
        async with Session(KEY, base_url="https://api.example.com", clock=clock) as session:
            with pytest.raises(APIConnectionError):
                await session.submit("A lake")
            with pytest.raises(APIConnectionError):
                await session.credits()
    assert len(heads) >= 2
    assert all(head.startswith(b"CONNECT api.example.com:443") for head in heads)
    assert not any(b"uthorization" in head or KEY.encode() in head for head in heads)


@pytest.mark.parametrize(
    "path",
    [
        "//evil.example/x",
        "/\\evil.example/x",
        "https://evil.example/x",
        "v1/images",
        "/v1/../credits",
        "/v1/./x",
        "/v1/%2e%2e/x",
        "/v1/x?y=1",
        "/v1/x#y",
        "/v1//x",
        "/v1/x y",
        "/v1/x\r\nX-Evil: 1",
        "/@evil.example",
        "/v1/x:y@z",
        "/",
        "",
        None,
        7,
    ],
)
def test_paths_that_could_change_the_origin(path: Any) -> None:
    """A raw request's path is a plain path or it is refused."""
    with pytest.raises(RequestValidationError, match="path"):
        RawRequest(path, body={})


@pytest.mark.parametrize(
    "url",
    [
        "http://api.example.com",
        "http://10.0.0.1",
        "ftp://127.0.0.1",
        "https://user:secret-pw@api.example.com",
        "https://api.example.com?x=1",
        "https://api.example.com#x",
        "https://",
        "//api.example.com",
        "api.example.com",
        "https://api.example.com\r\nX: 1",
        "http://127.0.0.1.evil.example",
        "http://localhost.evil.example",
    ],
)
def test_base_urls_that_would_leak_the_key(url: str) -> None:
    """A base URL is https or this machine, and holds nothing else."""
    with pytest.raises(ConfigurationError, match="base_url") as caught:
        Session(KEY, base_url=url)
    assert "secret-pw" not in str(caught.value)


# -- terminals ---------------------------------------------------------------------------------


async def test_server_text_is_fit_for_a_terminal(clock: ManualClock) -> None:
    """Escape sequences in server text do not survive into messages."""
    evil = "\x1b]0;owned\x07\x1b[2J\u202eabc\r\nfake line"
    told = {"code": evil, "message": evil, "type": evil, "fallback_suggestion": evil}
    failed = snapshot(status="failed", error={"code": evil, "message": evil})
    async with HostileServer(
        script=[answer(400, {"error": told}, {"X-Request-Id": "abc"})],
        reads=[answer(200, failed)],
    ) as server:
        async with connect(server, clock) as session:
            with pytest.raises(APIStatusError) as refused:
                await session.submit("A lake")
            with pytest.raises(TaskFailedError) as ended:
                await session.task(ID)
    for error in (refused.value, ended.value):
        shown = [str(error), *(v for v in vars(error).values() if isinstance(v, str))]
        for text in shown:
            assert text.isprintable(), text


# -- the emulator, too, is asked strange things ------------------------------------------------


async def test_the_emulator_refuses_a_body_it_cannot_unpack(emulator: Emulator) -> None:
    """A body that is not compressed as it says is a 400, not an internal error."""
    headers = {"Authorization": f"Bearer {emulator.api_key}", "Content-Encoding": "gzip"}
    once = aiohttp.TCPConnector(force_close=True)  # the rest of such a body cannot be read
    async with aiohttp.ClientSession(emulator.base_url, headers=headers, connector=once) as http:
        for path in ("/v1/images/generations", "/v1/tasks/batch", "/_emulator/faults"):
            async with http.post(path, data=b"notgzip") as response:
                assert response.status == 400


def test_the_emulators_clock_stays_in_the_calendar(clock: ManualClock) -> None:
    """Time is not moved to where there are no dates."""
    with pytest.raises(ValueError, match="seconds"):
        clock.advance(1e15)
    clock.advance(1e9)
