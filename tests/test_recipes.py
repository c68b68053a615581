"""The service recipes, run as programs of their own and used by a real HTTP client."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web
from attrs import define, field, frozen

from evolink_async import Session, _clock
from evolink_async.emulator import Emulator, ManualClock, RealClock, TaskRecord, faults
from evolink_async.webhook import CallbackReceiver

RECIPES = Path(__file__).parent / "recipes"
TIMEOUT = 30.0
SECRET = "kept over restarts"
FASTAPI, AIOHTTP = (str(RECIPES / f"{name}_service.py") for name in ("fastapi", "aiohttp"))
UVICORN = "-m uvicorn fastapi_service:app --timeout-graceful-shutdown 1 --no-access-log --port"


@define
class Service:
    """A recipe in a process of its own, to be started more than once."""

    arguments: list[str]
    port: int
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    http: httpx.Client = field(init=False)

    def start(self) -> None:
        self.process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, *self.arguments],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", trust_env=False)
        wait_until(self._answers)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None
        try:
            return self.http.get("/tasks/nobody").status_code == 404
        except httpx.TransportError:
            return False

    def stop(self) -> str:
        """Ask it to stop; returns what it wrote."""
        self.terminate()
        return self.ended()

    def terminate(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)

    def ended(self) -> str:
        assert self.process is not None
        written, _ = self.process.communicate(timeout=TIMEOUT)
        assert self.process.returncode in {0, -signal.SIGTERM}, written.decode()
        self.http.close()
        self.process = None
        return written.decode()

    def submit(self, prompt: str) -> str:
        answer = self.http.post("/tasks", json={"prompt": prompt})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def show(self, task_id: str) -> dict[str, Any]:
        found = self.http.get(f"/tasks/{task_id}")
        assert found.status_code == 200
        return dict(found.json())


def wait_until(condition: Any) -> None:
    """Wait for what happens in other processes."""
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture
def port() -> int:
    """Where the service will be, known to the emulator before."""
    return free_port()


@pytest.fixture
def emulator(port: int) -> Iterator[Emulator]:
    """An emulator in real time that calls the service back; generations take an hour."""
    with Emulator(
        clock=RealClock(),
        duration=3600,
        pictures="tiny",
        callback_origin=f"http://127.0.0.1:{port}",
    ) as emulator:
        yield emulator


def settings(emulator: Emulator, folder: Path) -> dict[str, str]:
    """The environment of a recipe."""
    return {
        "EVOLINK_API_KEY": emulator.api_key,
        "EVOLINK_BASE_URL": emulator.base_url,
        "PUBLIC_URL": "https://app.example.com",
        "CALLBACK_SECRET": SECRET,
        "STORE": str(folder / "store"),
    }


@pytest.fixture(params=[FASTAPI, AIOHTTP], ids=["fastapi", "aiohttp"])
def service(
    request: pytest.FixtureRequest, port: int, emulator: Emulator, tmp_path: Path
) -> Iterator[Service]:
    """Each of the recipes, running; or a server that is given one of them."""
    path = os.pathsep.join([str(RECIPES), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        **settings(emulator, tmp_path),
        "PORT": str(port),
        "PYTHONPATH": path,  # PYTHONSAFEPATH may keep a program from finding its neighbours
        "POLL_INTERVAL": "0.05",
        "PYTHONASYNCIODEBUG": "1",  # aiohttp.web writes an access log, unless told not to
    }
    more = [] if request.param in {FASTAPI, AIOHTTP} else [str(port)]
    service = Service([*request.param.split(), *more], port, environment)
    service.start()
    yield service
    if service.process is not None:
        service.process.kill()
        service.process.communicate()
        service.http.close()


def events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The data of server-sent events."""
    return (json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data:"))


def record(emulator: Emulator, task_id: str) -> TaskRecord:
    return emulator.books.task(task_id)


def test_a_prompt_becomes_pictures(service: Service, emulator: Emulator) -> None:
    """A prompt is answered with 202 and an id; the callback makes it completed, after one poll."""
    task_id = service.submit("A serene lake")
    assert service.show(task_id) == {"id": task_id, "state": "running", "urls": []}
    emulator.complete(task_id)
    wait_until(lambda: service.show(task_id)["state"] == "completed")
    assert tuple(service.show(task_id)["urls"]) == record(emulator, task_id).result_urls
    assert len(emulator.books.reads(task_id)) == 1
    assert [sent.status for sent in emulator.books.callbacks(task_id)] == [204]
    assert "/hooks/evolink" not in service.stop()  # the paths of callbacks are secret


def test_what_cannot_be_is_refused(service: Service, emulator: Emulator) -> None:
    """Bad prompts, unknown tasks and forged callbacks are refused; nothing is sent for them."""
    fields = {"prompt": "A lake", "n": 4, "callback_url": "https://evil.example.com/x"}
    for prompt in ("x" * 2001, "", "\ud800", fields, ["A lake"], 5, None):
        body = json.dumps({"prompt": prompt}).encode()
        assert service.http.post("/tasks", content=body).status_code == 422, prompt
    for body in (b"{}", b"[]", b'"A lake"', b"\xff{", b"", b"[" * 100_000):
        answer = service.http.post("/tasks", content=body)
        assert answer.status_code in {400, 422}, body[:10]
        assert "prompt" in answer.text or answer.status_code == 400
    assert service.http.get("/tasks/nobody/events").status_code == 404
    assert service.http.post("/hooks/evolink/x", json={"id": "task-1"}).status_code == 404
    assert emulator.books.requests() == ()


def test_progress_is_streamed(service: Service, emulator: Emulator) -> None:
    """Server-sent events begin with what is known and end with the task."""
    task_id = service.submit("A serene lake")
    with service.http.stream("GET", f"/tasks/{task_id}/events") as stream:
        assert stream.headers["Content-Type"].startswith("text/event-stream")
        seen = events(stream.iter_lines())
        assert next(seen)["status"] == "pending"
        emulator.complete(task_id)
        *_, last = seen
    assert last == {"status": "completed", "progress": 100}


def test_a_client_that_leaves(service: Service, emulator: Emulator) -> None:
    """A client that disconnects stops neither the task nor the streams of others."""
    task_id = service.submit("A serene lake")
    path = f"/tasks/{task_id}/events"
    with service.http.stream("GET", path) as staying:
        seen = events(staying.iter_lines())
        next(seen)
        with (
            httpx.Client(base_url=service.http.base_url, trust_env=False) as other,
            other.stream("GET", path) as leaving,
        ):
            next(events(leaving.iter_lines()))
        emulator.fail(task_id, "service_error", "no luck")
        *_, last = seen
    assert last["status"] == "failed"
    wait_until(lambda: "no luck" in service.show(task_id)["state"])


def test_nobody_polls_for_a_viewer_that_left(service: Service, emulator: Emulator) -> None:
    """When the last viewer has left, the service stops polling for progress."""
    task_id = service.submit("A serene lake")
    with service.http.stream("GET", f"/tasks/{task_id}/events") as stream:
        seen = events(stream.iter_lines())
        next(seen)
        wait_until(lambda: len(emulator.books.reads(task_id)) >= 2)
    quiet: list[int] = []

    def nobody_polls() -> bool:
        """True if no poll came for a second, which is four shortest intervals."""
        quiet.append(len(emulator.books.reads(task_id)))
        return len(quiet) > 50 and quiet[-50] == quiet[-1]

    wait_until(nobody_polls)
    assert service.show(task_id)["state"] == "running"


@frozen
class Held(faults.RequestFault):
    """Processes the request at once and answers when `release` is set."""

    release: threading.Event = field(factory=threading.Event, kw_only=True)

    async def after(self, _exchange: Any, response: web.Response) -> web.StreamResponse:
        while not self.release.is_set():  # noqa: ASYNC110 - another thread sets it
            await asyncio.sleep(0.01)
        return response


@pytest.mark.parametrize(
    "service",
    [FASTAPI, AIOHTTP, UVICORN],
    ids=["fastapi", "aiohttp", "uvicorn"],
    indirect=True,
)
def test_a_submit_in_flight_is_kept(service: Service, emulator: Emulator) -> None:
    """Stopped in the middle of a submit it waits for the answer, and the task is in the store.

    Its caller gets the answer, unless a server of somebody else's gives up waiting.
    """
    held = Held(route="submit", times=1)
    emulator.faults.add(held)
    key = "0123456789abcdef0123456789abcdef"
    twin = CallbackReceiver(Session("key"), public_url="https://app.example.com", secret=SECRET)
    path = f"/hooks/evolink{twin.url_for(key).removeprefix('https://app.example.com')}"

    def takes_callbacks() -> bool:
        try:
            answer = httpx.post(f"{service.http.base_url}{path}", json={"id": "task-unified-1"})
        except httpx.TransportError:
            return False
        return answer.status_code == 204

    with ThreadPoolExecutor() as threads:
        caller = threads.submit(service.http.post, "/tasks", json={"prompt": "A lake"}, timeout=60)
        wait_until(lambda: len(emulator.books.tasks()) == 1)
        assert takes_callbacks()
        service.terminate()
        wait_until(lambda: not takes_callbacks())
        if "-m" in service.arguments:
            assert caller.result().status_code == 500
        held.release.set()
        written = service.ended()
    (task,) = emulator.books.tasks()
    if "-m" not in service.arguments:
        assert caller.result().json() == {"id": task.id}
        assert "Traceback" not in written
    service.start()
    assert service.show(task.id)["state"] == "running"
    emulator.complete(task.id)
    wait_until(lambda: service.show(task.id)["state"] == "completed")


@pytest.mark.parametrize("name", ["CALLBACK_SECRET", "PUBLIC_URL", "STORE"])
def test_what_is_missing_is_named(service: Service, name: str) -> None:
    """Without one of its settings it says which, and how to set it, in a line."""
    service.stop()
    del service.environment[name]
    command = [sys.executable, *service.arguments]
    failed = subprocess.run(  # noqa: S603 - our own program
        command, env=service.environment, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert failed.stderr.startswith(f"set {name} in the environment")
    assert len(failed.stderr.splitlines()) == 1


def test_a_restart_loses_nothing(service: Service, emulator: Emulator) -> None:
    """Stopped with tasks in flight and a stream open, it picks them up when it starts again."""
    away, later = service.submit("ends while it is down"), service.submit("ends later")
    with service.http.stream("GET", f"/tasks/{later}/events") as stream:
        seen = events(stream.iter_lines())
        next(seen)
        service.terminate()
        *_, last = seen
        assert last["status"] in {"pending", "processing"}
    errors = service.ended()
    assert "Traceback" not in errors
    assert "session closed with tasks still running" in errors
    emulator.complete(away)
    service.start()
    wait_until(lambda: service.show(away)["state"] == "completed")
    assert service.show(later)["state"] == "running"
    emulator.complete(later)
    wait_until(lambda: service.show(later)["state"] == "completed")
    assert len(emulator.books.submits()) == 2
    assert 204 in [sent.status for sent in emulator.books.callbacks(later)]
    assert "Traceback" not in service.stop()


# -- what takes a while, in a time of our own --------------------------------------------------


@pytest.fixture
def images(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The part the recipes share, as a module."""
    spec = importlib.util.spec_from_file_location("images", RECIPES / "images.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def test_viewers_share_their_polls(
    images: Any, clock: ManualClock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """However many watch a task, it is polled every three seconds; comments fill the gaps."""
    monkeypatch.setattr(_clock, "default", lambda: clock)
    async with Emulator(clock=clock, duration=600, pictures="tiny") as emulator:
        for name, value in settings(emulator, tmp_path).items():
            monkeypatch.setenv(name, value)
        async with aclosing(images.Images()) as service:
            task_id = await service.submit("A lake")
            gone = service.events(task_id)
            await anext(gone)
            viewers = []
            for _ in range(10):
                viewers.append(asyncio.create_task(view(service.events(task_id))))
                await clock.sleep_until(clock.now() + 0.3)
            await gone.aclose()
            for seen in await asyncio.gather(*viewers):
                assert 80 < seen.count(": ping\n\n") < 120
                news = [line for line in seen if line.startswith("data: ")]
                assert len(set(news)) == len(news)
                assert json.loads(news[-1][6:]) == {"status": "completed", "progress": 100}
            reads = len(emulator.books.reads(task_id))
            assert 180 < reads < 220
            assert not service._viewers
            ended = await view(service.events(task_id))
            assert ended == ['data: {"status": "completed", "progress": null}\n\n']
            assert len(emulator.books.reads(task_id)) == reads
            running = await service.submit("A lake")
            slow = service._start(asyncio.sleep(0.02))
        assert slow.done()
        assert len(await view(service.events(running))) == 2


async def view(events: AsyncGenerator[str, None]) -> list[str]:
    async with aclosing(events):
        return [line async for line in events]
