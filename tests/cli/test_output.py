"""What reaches stdout, stderr and a terminal."""

from __future__ import annotations

import asyncio
import io
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import pytest
from command_line import CLEAR, EVOLINK, KEY, TASK, UNSEEN, Run, python, submit
from hostile import HostileServer, answer, snapshot

from evolink_async.__main__ import main
from evolink_async.emulator import Emulator

# ---------------------------------------------------------------------------------------------
# Output that fails


def test_an_unexpected_error_does_not_show_the_key(
    run: Run, server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A bug is reported with its traceback, but without the key."""
    row = {"id": "task-1", "status": "new", "created_at": 1}
    server.reads = [answer(200, {"data": [row], "total": 1})]

    def broken(*_: object) -> None:
        raise RuntimeError(f"Bearer {KEY}\n{CLEAR}")

    monkeypatch.setattr(time, "gmtime", broken)
    ended = run("list")
    assert ended.code == 3
    assert "unexpected RuntimeError" in ended.errors[0]
    assert "in broken" in ended.err
    assert KEY not in ended.err
    assert not UNSEEN.search(ended.err)


def test_output_may_be_any_text_stream(run: Run, api: Emulator) -> None:
    """A program that replaces sys.stdout by what it has can call the command line."""
    task_id = submit(api)
    with redirect_stdout(io.StringIO()) as stdout:
        assert run("status", task_id).code == 0
    assert stdout.getvalue() == f"{task_id} completed 100 %\n"


def test_what_an_encoding_lacks_is_escaped(
    run: Run, server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A character that the encoding lacks does not end the command."""
    server.reads = [answer(200, snapshot(status="moderé"))]
    stdout = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stdout)
    assert run("status", TASK).code == 0
    stdout.seek(0)
    assert stdout.read() == f"{TASK} moder\\xe9 0 %\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_result_that_cannot_be_written_is_an_error(api: Emulator) -> None:
    """A full disk under stdout is an error."""
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, *EVOLINK, "wait", submit(api)], stdout=full, check=False
        )
    assert ended.returncode == 3


def test_a_command_runs_without_output_streams(
    run: Run, api: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With stdout and stderr closed, files are saved nevertheless."""
    task_id = submit(api)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)
        patch.setattr(sys, "stderr", None)
        code = main(["download", task_id])
    assert code == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_while_importing() -> None:
    """Ctrl-C while modules are imported is exit code 130 and no traceback."""
    ended = python(
        "import sys\n"
        "class InterruptedImport:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'click':\n"
        "            raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, InterruptedImport())\n"
        "from evolink_async.__main__ import main\n"
        "sys.exit(main(['--help']))"
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", "")


def test_an_interrupt_before_anything_began(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while still importing or parsing is exit code 130 and no traceback."""

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(asyncio, "Runner", interrupted)
    with pytest.warns(RuntimeWarning, match="never awaited"):
        ended = run("credits")
    assert (ended.code, ended.out) == (130, "")
    assert ended.err.splitlines()[-1] == "interrupted"


def test_a_reader_that_leaves_does_not_stop_a_command(api: Emulator, tmp_path: Path) -> None:
    """Files are saved and the exit code is 0 even if nobody reads stdout and stderr any more."""
    task_id = submit(api)
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        ended = subprocess.run(  # noqa: S603 - our own interpreter
            [sys.executable, *EVOLINK, "download", task_id, "--out", tmp_path],
            stdout=write_end,
            stderr=write_end,
            check=False,
        )
    finally:
        os.close(write_end)
    assert ended.returncode == 0
    assert len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------------------------------------
# On a terminal


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], str]]:
    """Stderr on a pseudo-terminal; yields a function that returns what was written to it."""
    ours, theirs = os.openpty()
    shown = bytearray()

    def drain() -> None:
        try:
            while data := os.read(ours, 65536):
                shown.extend(data)
        except OSError:  # Linux raises it when the other end is closed
            pass

    thread = threading.Thread(target=drain)
    thread.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    try:
        with open(theirs, "w", encoding="utf-8") as stderr, monkeypatch.context() as patch:  # noqa: PTH123 - a descriptor
            patch.setattr(sys, "stderr", stderr)
            yield lambda: shown.decode("utf-8", "replace")
    finally:
        thread.join(10)
        os.close(ours)


@pytest.mark.usefixtures("fast")
def test_a_terminal_gets_a_bar(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal progress is a bar, and stdout still holds paths only."""
    with terminal(monkeypatch) as shown:
        ended = run("generate", "A lake", "--emulator")
    assert ended.code == 0
    assert len(ended.out.splitlines()) == 1
    assert "━" in shown()
    assert "completed" in shown()


def test_a_bar_shows_no_control_characters_of_the_server(
    run: Run, server: HostileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Status words and markup from the server are inert on a terminal."""
    odd = snapshot(status=f"odd{CLEAR}[red]", progress=5)
    done = snapshot(status="completed", results=[f"{server.base_url}/x"])
    server.reads = [answer(200, odd), answer(200, done)]
    with terminal(monkeypatch) as shown:
        ended = run("wait", TASK)
    assert ended.code == 0
    assert CLEAR not in shown()
    assert "\x1b]0;owned" not in shown()
    assert re.search(rf"{TASK} odd[^━]*\[red\]", shown())


@pytest.mark.usefixtures("fast")
def test_a_dumb_terminal_gets_lines(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal that cannot move its cursor gets lines instead of a bar."""
    with terminal(monkeypatch) as shown:
        monkeypatch.setenv("TERM", "dumb")
        ended = run("generate", "A lake", "--emulator")
    assert ended.code == 0
    assert "\x1b" not in shown()
    assert "completed 100 %" in shown()
