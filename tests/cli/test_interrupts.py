"""Commands that are interrupted, and what they say about the task they leave."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import EVOLINK, KEY, TASK, Ended, Run
from hostile import HostileServer, answer, error, hang, snapshot

from evolink_async import Session
from evolink_async._cli import commands

# ---------------------------------------------------------------------------------------------
# Interrupts


@contextmanager
def process(argv: Sequence[str], folder: Path) -> Iterator[subprocess.Popen[str]]:
    """The command as a process of its own; it is killed at the end if it still runs."""
    child = subprocess.Popen(  # noqa: S603 - our own interpreter
        [sys.executable, *argv],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )
    try:
        yield child
    finally:
        child.kill()
        child.communicate()


def ended_by(child: subprocess.Popen[str], *numbers: signal.Signals) -> Ended:
    for number in numbers:
        child.send_signal(number)
    out, err = child.communicate(timeout=30)
    return Ended(child.returncode, out, err)


def heard(server: HostileServer) -> threading.Event:
    """Set once *server* has received a request."""
    event = threading.Event()
    server.on_request = lambda _: event.set()
    return event


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_interrupted_while_waiting(
    server: HostileServer, tmp_path: Path, number: signal.Signals
) -> None:
    """The id of what goes on and how to pick it up are printed; exit code 130."""
    with process([*EVOLINK, "generate", "A lake", "--out", "out"], tmp_path) as child:
        assert child.stderr is not None
        assert "pending" in child.stderr.readline()
        ended = ended_by(child, number)
    assert (ended.code, ended.out) == (130, "")
    hint, last = ended.err.splitlines()
    assert f"evolink-async wait {TASK}" in hint
    assert f"evolink-async download {TASK} --out out" in hint
    assert last == "interrupted"


def test_interrupted_in_the_middle_of_a_submit(server: HostileServer, tmp_path: Path) -> None:
    """The key of a submit in the air is printed, and nothing waits for its answer."""
    server.script = [hang]
    received = heard(server)
    with process([*EVOLINK, "generate", "A lake"], tmp_path) as child:
        assert received.wait(30)
        ended = ended_by(child, signal.SIGINT)
    assert (ended.code, ended.out) == (130, "")
    (post,) = server.posts
    hint, last = ended.err.splitlines()
    assert f"--idempotency-key {post.headers['Idempotency-Key']}" in hint
    assert "may have been accepted" in hint
    assert last == "interrupted"


def test_interrupted_before_anything_was_sent(server: HostileServer, tmp_path: Path) -> None:
    """A submit that was refused, and waits to be sent again, has cost nothing."""
    server.script = [error(429, Retry_After="100")]
    with process([*EVOLINK, "generate", "A lake"], tmp_path) as child:
        assert child.stderr is not None
        while "cooling down" not in child.stderr.readline():
            pass
        ended = ended_by(child, signal.SIGINT)
    assert ended.code == 130
    assert ended.err.splitlines()[-2:] == ["nothing was submitted", "interrupted"]


@pytest.mark.parametrize("emulated", [False, True])
def test_interrupted_just_as_the_answer_came(emulated: bool) -> None:  # noqa: FBT001 - a parameter
    """A submit that was accepted in the last moment is reported with its task."""
    task = Session(KEY).task(TASK)
    message = commands._left_behind(task, commands._Options(folder="out", emulated=emulated))
    assert message.startswith(f"task {TASK}")
    assert ("evolink-async download" in message) is not emulated


@pytest.mark.parametrize("command", ["generate", "download"])
def test_interrupted_while_downloading(server: HostileServer, tmp_path: Path, command: str) -> None:
    """A paid result that is not on disk yet is not lost."""
    done = snapshot(status="completed", results=[f"{server.base_url}/slow.png"])
    server.script, server.reads = [answer(200, done)], [answer(200, done), hang]
    if command == "generate":
        server.reads = [hang]
    received = threading.Event()
    server.on_request = lambda request: received.set() if "slow" in request.path else None
    argument = "A lake" if command == "generate" else TASK
    with process([*EVOLINK, command, argument, "--out", "out"], tmp_path) as child:
        assert received.wait(30)
        ended = ended_by(child, signal.SIGINT)
    assert (ended.code, ended.out) == (130, "")
    assert f"evolink-async download {TASK} --out out --overwrite" in ended.err
    assert list((tmp_path / "out").iterdir()) == []


def test_interrupted_with_an_emulator(tmp_path: Path) -> None:
    """A task on an embedded emulator ends with it, and the message says so."""
    with process([*EVOLINK, "generate", "A lake", "--emulator"], tmp_path) as child:
        assert child.stderr is not None
        assert "pending" in child.stderr.readline()
        ended = ended_by(child, signal.SIGINT)
    assert ended.code == 130
    hint, last = ended.err.splitlines()
    assert "ends here, with its emulator" in hint
    assert last == "interrupted"


def test_interrupted_during_status(server: HostileServer, tmp_path: Path) -> None:
    """A command that only asks has no task to report."""
    server.reads = [hang]
    received = heard(server)
    with process([*EVOLINK, "credits"], tmp_path) as child:
        assert received.wait(30)
        ended = ended_by(child, signal.SIGINT)
    assert ended == Ended(130, "", "interrupted\n")


def test_interrupted_while_a_name_is_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread that hangs in the resolver does not delay the exit."""
    monkeypatch.setenv("EVOLINK_API_KEY", KEY)
    code = (
        "import socket, sys, time\n"
        "def hang(*_, **__):\n"
        "    print('resolving', flush=True)\n"
        "    time.sleep(1000)\n"
        "socket.getaddrinfo = hang\n"
        "sys.argv = ['evolink-async', 'credits']\n"
        "from evolink_async.__main__ import main\n"
        "sys.exit(main())"
    )
    with process(["-c", code], tmp_path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "resolving\n"
        ended = ended_by(child, signal.SIGINT)
    assert ended == Ended(130, "", "interrupted\n")


def test_a_second_interrupt_ends_the_process_at_once(tmp_path: Path) -> None:
    """Even if the first interrupt is still being handled, the second one ends the process."""
    code = (
        "import asyncio\n"
        "from evolink_async._cli import console\n"
        "async def stubborn():\n"
        "    print('ready', flush=True)\n"
        "    while True:\n"
        "        try:\n"
        "            await asyncio.Event().wait()\n"
        "        except asyncio.CancelledError:\n"
        "            print('never', flush=True)\n"
        "console.run_cancellable(stubborn())"
    )
    with process(["-c", code], tmp_path) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        child.send_signal(signal.SIGINT)
        assert child.stdout.readline() == "never\n"
        ended = ended_by(child, signal.SIGINT)
    assert ended == Ended(-signal.SIGINT, "", "")


def test_the_emulator_serves_until_interrupted(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It prints its address, serves the other commands, and ends without an error."""
    options = ["--port", "0", "--credits", "7", "--duration", "1", "2", "--time-scale", "1000"]
    options += ["--pictures", "tiny", "--seed", "3"]
    with process([*EVOLINK, "emulator", *options], tmp_path) as child:
        assert child.stdout is not None
        for _ in range(2):
            name, _, value = child.stdout.readline().strip().partition("=")
            monkeypatch.setenv(name, value)
        assert run("credits").out.startswith("account: 7 left, 0 used")
        ended = ended_by(child, signal.SIGINT)
    assert ended == Ended(0, "", "")


def test_an_emulator_on_a_taken_port(run: Run, server: HostileServer) -> None:
    """A port that is in use is exit code 3."""
    ended = run("emulator", "--port", server.base_url.rpartition(":")[2])
    assert ended.code == 3
    assert len(ended.errors) == 1
