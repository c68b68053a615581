"""The emulator from outside: over HTTP, from another thread, from a shell."""

from __future__ import annotations

import http.client
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from emulator_caller import Caller, calling

from evolink_async.emulator import Emulator, ManualClock, RealClock

ROOT = Path(__file__).parents[2]


@pytest.fixture
def clock() -> ManualClock:
    """Time that only the test moves."""
    return ManualClock(autoadvance=False)


@pytest.fixture
async def emulator(clock: ManualClock) -> AsyncIterator[Emulator]:
    """An emulator with generations of 100 s."""
    async with Emulator(clock=clock, pictures="tiny", duration=100) as emulator:
        yield emulator


@pytest.fixture
async def api(emulator: Emulator) -> AsyncIterator[Caller]:
    """A caller of that emulator."""
    async with calling(emulator) as caller:
        yield caller


async def test_the_books_are_open(api: Caller, emulator: Emulator) -> None:
    """Over HTTP the books say what they say in Python, and requests for them are not in them."""
    name = await api.task(prompt="one")
    await api.submit(prompt="two", n=3)
    assert (await api.get("/_emulator/books")).json == emulator.books.summary()
    submits = (await api.get("/_emulator/books/requests?route=submit")).json["data"]
    assert [(each["prompt"], each["status"]) for each in submits] == [("one", 200), ("two", 400)]
    refused = (await api.get("/_emulator/books/requests?status=400")).json["data"]
    assert refused == submits[1:]
    (task,) = (await api.get("/_emulator/books/tasks?prompt=one&status=pending")).json["data"]
    assert (task["id"], task["reserved"], task["charged"]) == (name, 1, None)
    assert (await api.get("/_emulator/books/callbacks")).json == {"data": []}
    assert len(emulator.books.requests()) == 2


async def test_what_never_ends_is_null(api: Caller) -> None:
    """Infinity has no place in JSON."""
    await api.post("/_emulator/faults", {"fault": "TaskHangs"})
    await api.task()
    (task,) = (await api.get("/_emulator/books/tasks")).json["data"]
    assert task["ends_at"] is None


async def test_faults_can_be_set_over_http(api: Caller, emulator: Emulator) -> None:
    """A fault is its name and its fields; all can be listed and cleared."""
    fault = {"fault": "Status", "status": 502, "route": "credits", "nth": [1, 2]}
    answer = await api.post("/_emulator/faults", fault)
    (placed,) = answer.json["data"]
    assert (placed["fault"], placed["status"], placed["nth"]) == ("Status", 502, [1, 2])
    assert (await api.get("/_emulator/faults")).json == answer.json
    assert (await api.get("/v1/credits")).status == 502
    assert (await api.call("DELETE", "/_emulator/faults")).json == {"data": []}
    assert (await api.get("/v1/credits")).status == 200


async def test_the_clock_can_be_moved_over_http(api: Caller, clock: ManualClock) -> None:
    """Time moves by as much as asked for."""
    name = await api.task()
    answer = await api.post("/_emulator/clock", {"advance": 100})
    assert answer.json == {"now": clock.now()} == (await api.get("/_emulator/clock")).json
    assert (await api.read(name))["status"] == "completed"


@pytest.mark.parametrize("status", ["completed", "failed", "cancelled"])
async def test_a_task_can_be_ended_over_http(api: Caller, status: str) -> None:
    """A running task ends as asked for."""
    name = await api.task()
    answer = await api.post(f"/_emulator/tasks/{name}", {"status": status})
    assert answer.json["status"] == status
    assert (await api.read(name))["status"] == status


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/_emulator/faults", "{", 400),
        ("POST", "/_emulator/faults", "[]", 400),
        ("POST", "/_emulator/faults", '{"fault": "Nothing"}', 400),
        ("POST", "/_emulator/faults", '{"fault": "Faults"}', 400),
        ("POST", "/_emulator/faults", '{"fault": "Status", "colour": "red"}', 400),
        ("POST", "/_emulator/faults", '{"fault": "Status", "status": "x"}', 400),
        ("POST", "/_emulator/clock", '{"advance": -1}', 400),
        ("POST", "/_emulator/clock", '{"advance": "x"}', 400),
        ("POST", "/_emulator/tasks/task-1", '{"status": "done"}', 400),
        ("POST", "/_emulator/tasks/task-1", '{"status": "failed"}', 404),
        ("POST", "/_emulator/tasks/task-1", '{"status": "completed", "code": "x"}', 400),
        ("POST", "/_emulator/clock", '{"advance": true}', 400),
        ("POST", "/_emulator/clock", '{"advance": NaN}', 400),
        ("POST", "/_emulator/clock", "{}", 400),
        ("POST", "/_emulator/tasks/task-1", '{"status": "failed", "code": 5}', 400),
        ("POST", "/_emulator/tasks/task-1", '{"status": "failed", "message": {}}', 400),
        ("POST", "/_emulator/tasks/task-1", '{"status": "failed", "task_id": "a"}', 400),
        ("GET", "/_emulator/books/requests?status=x", None, 400),
        ("GET", "/_emulator/books/requests?route=reed", None, 400),
        ("GET", "/_emulator/books/requests?promt=a", None, 400),
        ("GET", "/_emulator/books/tasks?route=read", None, 400),
        ("GET", "/_emulator/books/callbacks?prompt=a", None, 400),
    ],
)
async def test_nonsense_is_refused(
    api: Caller, method: str, path: str, body: str | None, status: int
) -> None:
    """A control request that is not understood is a 4xx in the API's form."""
    answer = await api.call(method, path, data=body)
    assert (answer.status, answer.error["code"]) == (status, status)


async def test_a_real_clock_cannot_be_moved() -> None:
    """Only a manual clock can be moved."""
    async with (
        Emulator(clock=RealClock(), pictures="tiny") as emulator,
        calling(emulator) as api,
    ):
        answer = await api.post("/_emulator/clock", {"advance": 1})
    assert (answer.status, "cannot be moved" in answer.error["message"]) == (400, True)


async def test_control_needs_the_key(api: Caller) -> None:
    """Control requests without the key are refused."""
    answer = await api.get("/_emulator/books", headers={"Authorization": "Bearer wrong"})
    assert answer.status == 401


# In a thread of its own


def asked(emulator: Emulator, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """A request by the standard library alone."""
    connection = http.client.HTTPConnection("127.0.0.1", emulator.port, timeout=5)
    headers = {"Authorization": f"Bearer {emulator.api_key}"}
    connection.request(method, path, None if body is None else json.dumps(body), headers)
    response = connection.getresponse()
    answer = json.loads(response.read())
    connection.close()
    return response.status, answer


def test_it_runs_in_a_thread_of_its_own() -> None:
    """A program without an event loop uses the emulator in a plain `with`."""
    clock = ManualClock()
    with Emulator(clock=clock, pictures="tiny", duration=100) as emulator:
        order = {"model": "wan2.5-text-to-image", "prompt": "A peaceful lake"}
        status, task = asked(emulator, "POST", "/v1/images/generations", order)
        assert (status, task["status"]) == (200, "pending")
        clock.advance(100)
        assert asked(emulator, "GET", f"/v1/tasks/{task['id']}")[1]["status"] == "completed"
        assert emulator.books.charged == 1
    assert "evolink-emulator" not in {thread.name for thread in threading.enumerate()}


def test_what_keeps_it_from_starting_is_raised() -> None:
    """A taken port raises in the thread that starts the emulator."""
    with (
        Emulator(pictures="tiny") as emulator,
        pytest.raises(OSError, match="address already in use"),
        Emulator(pictures="tiny", port=emulator.port),
    ):
        pass


# From a shell


def test_the_module_serves_until_interrupted() -> None:
    """`python -m evolink_async.emulator` says where it is, and ends quietly on Ctrl-C."""
    command = [sys.executable, "-m", "evolink_async.emulator", "--port", "0", "--pictures", "tiny"]
    with subprocess.Popen(  # noqa: S603 - our own
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(2)]
        port = int(lines[0].rpartition(":")[2])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        connection.request("GET", "/openapi.json")
        assert json.load(connection.getresponse())["openapi"] == "3.1.0"
        connection.close()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (0, "")
    assert lines[1] == "EVOLINK_API_KEY=emulator-key\n"
