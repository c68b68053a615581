"""The service recipes, run as programs of their own and used by a real HTTP client."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from attrs import define, field

from evolink_async.emulator import Emulator, RealClock, TaskRecord

RECIPES = Path(__file__).parent / "recipes"
PATIENCE = 30.0


@define
class Service:
    """A recipe in a process of its own, to be started more than once."""

    program: Path
    port: int
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None
    http: httpx.Client = field(init=False)

    def start(self) -> None:
        self.process = subprocess.Popen(  # noqa: S603 - our own program
            [sys.executable, str(self.program)],
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
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
        """Ask it to stop; returns what it wrote to stderr."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode in {0, -signal.SIGTERM}, errors.decode()
        self.http.close()
        self.process = None
        return errors.decode()

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
    end = time.monotonic() + PATIENCE
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


@pytest.fixture(params=["fastapi_service", "aiohttp_service"])
def service(
    request: pytest.FixtureRequest, port: int, emulator: Emulator, tmp_path: Path
) -> Iterator[Service]:
    """Each of the recipes, running."""
    environment = {
        **os.environ,
        "EVOLINK_API_KEY": emulator.api_key,
        "EVOLINK_BASE_URL": emulator.base_url,
        "PUBLIC_URL": "https://app.example.com",
        "CALLBACK_SECRET": "kept over restarts",
        "STORE": str(tmp_path / "store"),
        "PORT": str(port),
    }
    service = Service(RECIPES / f"{request.param}.py", port, environment)
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
    """A prompt is answered with 202 and an id; the callback makes it completed, after one read."""
    task_id = service.submit("A serene lake")
    assert service.show(task_id) == {"id": task_id, "state": "running", "urls": []}
    emulator.complete(task_id)
    wait_until(lambda: service.show(task_id)["state"] == "completed")
    assert tuple(service.show(task_id)["urls"]) == record(emulator, task_id).result_urls
    assert len(emulator.books.reads(task_id)) == 1
    assert [sent.status for sent in emulator.books.callbacks(task_id)] == [204]


def test_what_cannot_be_is_refused(service: Service, emulator: Emulator) -> None:
    """Bad prompts, unknown tasks and forged callbacks are refused; nothing is sent for them."""
    assert service.http.post("/tasks", json={"prompt": "x" * 2001}).status_code == 422
    assert service.http.post("/tasks", json={}).status_code == 422
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
    """Who leaves a stream stops neither the task nor the streams of others."""
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


def test_a_restart_loses_nothing(service: Service, emulator: Emulator) -> None:
    """Stopped with tasks in flight and a stream open, it picks them up when it starts again."""
    away, later = service.submit("ends while it is down"), service.submit("ends later")
    with service.http.stream("GET", f"/tasks/{later}/events") as stream:
        next(events(stream.iter_lines()))
        errors = service.stop()
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
