"""Printing, progress, signals and exit codes of the command line."""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import signal
import stat
import sys
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, Final

import click
from attrs import frozen

from evolink_async._http.secret import Secret
from evolink_async._model.snapshots import TaskSnapshot
from evolink_async._text import printable
from evolink_async.errors import (
    EvolinkError,
    SubmitUncertainError,
    TaskTimeoutError,
)

if TYPE_CHECKING:
    from evolink_async.emulator import Emulator

__all__ = [
    "DONE",
    "EMULATED",
    "ERROR",
    "FAILED",
    "INTERRUPTED",
    "PROGRAM",
    "USAGE",
    "Console",
    "fail",
    "is_terminal",
    "print_error",
    "print_json",
    "print_line",
    "print_result",
    "run_cancellable",
    "signals",
    "state",
]

EMULATED: Final[dict[str, Any]] = {"duration": (20.0, 40.0), "time_scale": 10.0, "credits": 1e9}
"""Settings of ``--emulator``: the API page's example durations, ten times as fast."""


@frozen(kw_only=True)
class Console:
    """Functions of the command line that a command in another module uses.

    Attributes:
        run_cancellable: Runs a coroutine to its exit code; the first signal cancels it.
        print_result: Prints a line of the result on stdout.
        print_json: Prints the result as JSON on stdout.
        print_error: Prints a line on stderr.
        emulator: Makes an emulator with these settings.
    """

    run_cancellable: Callable[[Coroutine[Any, Any, int]], int]
    print_result: Callable[[str], None]
    print_json: Callable[[object], None]
    print_error: Callable[[str], None]
    emulator: Callable[[dict[str, Any]], Emulator]


def signals() -> tuple[int, ...]:
    """The signals that ask a process to end: SIGINT, SIGTERM and, unless ignored, SIGHUP.

    ``nohup`` ignores SIGHUP.
    """
    hangup = getattr(signal, "SIGHUP", None)
    ignored = hangup is None or signal.getsignal(hangup) is signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *(() if ignored else (hangup,)))


@contextmanager
def _first_interrupt(
    stop: asyncio.Event, running: asyncio.Event, console: Console
) -> Iterator[None]:
    """The first signal after *running* is set sets *stop*; all others have their usual effect.

    While the prompts are still being read there is nothing to finish.
    """
    loop = asyncio.get_running_loop()
    previous = {number: signal.getsignal(number) for number in signals()}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def announce() -> None:
        stop.set()
        console.print_error(
            "stopping: no more is submitted, what runs has 30 s to finish; interrupt again to "
            "leave at once"
        )

    def interrupt(number: int, frame: FrameType | None) -> None:
        restore()
        handler = previous[number]
        if running.is_set():
            loop.call_soon_threadsafe(announce)
        elif callable(handler):
            handler(number, frame)

    for number in previous:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        restore()


def is_terminal(stream: Any) -> bool:
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
ERROR: Final = 3
INTERRUPTED: Final = 130
PROGRAM: Final = "evolink-async"


def fail(why: BaseException | str, code: int) -> int:
    """Print *why* and its notes, a line each; returns *code*."""
    print_error(f"error: {sentence(why)}")
    for note in getattr(why, "__notes__", ()):
        print_error(note)
    return code


def sentence(why: BaseException | str) -> str:
    """The message of *why*, with advice for the command line instead of for Python code."""
    if isinstance(why, SubmitUncertainError):
        return f"no usable answer came, and nothing was resent: {why.__cause__}"
    if isinstance(why, TaskTimeoutError):
        state = why.snapshot.status if why.snapshot is not None else "not read yet"
        return f"task {why.task_id} did not end in time, it is {state}"
    if isinstance(why, EvolinkError) and why.way_past in OPTIONS:
        return f"{why.problem}; {OPTIONS[why.way_past]}"
    return str(why)


OPTIONS: Final = {
    "api_key": "set EVOLINK_API_KEY; keys are made at https://evolink.ai/dashboard/keys",
    "validate": "to let the API decide, pass --no-validate",
    "overwrite": "pass --overwrite to replace it",
}
"""Advice for the command line, by the argument that the Python message names."""


def print_result(text: str) -> None:
    """Print a line of the result on stdout."""
    print_line(printable(text, len(text)))


def print_json(value: object) -> None:
    print_line(json.dumps(value, indent=2))  # JSON escapes control characters


def print_line(text: str | bytes) -> None:
    try:
        click.echo(text, file=lenient(sys.stdout))
    except OSError as exc:
        unread = is_unread(exc, sys.stdout)
        discard(sys.stdout)
        if not unread:
            raise


def is_unread(exc: OSError, stream: IO[Any]) -> bool:
    """Whether nobody reads *stream* any more: a closed pipe or terminal."""
    device = stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    return isinstance(exc, BrokenPipeError) or (device and exc.errno == errno.EIO)


def print_error(text: str) -> None:
    """Print a line on stderr, without the API key."""
    key = os.environ.get("EVOLINK_API_KEY", "").strip()
    line = printable(Secret(key).redact(text) if key else text, 2000)
    try:
        click.echo(line, file=lenient(sys.stderr))
    except OSError:  # a paid generation goes on although nobody reads stderr
        discard(sys.stderr)


def discard(stream: IO[Any]) -> None:
    """Redirect *stream* to the null device, or the interpreter fails when it flushes at exit."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, stream.fileno())
    os.close(null)


def lenient(stream: IO[Any]) -> IO[Any]:
    """*stream*, set to escape the characters that its encoding lacks."""
    reconfigure = getattr(stream, "reconfigure", None)
    if reconfigure is not None:
        reconfigure(errors="backslashreplace")
    return stream


def state(snapshot: TaskSnapshot) -> str:
    words = [snapshot.id, snapshot.status]
    if snapshot.progress is not None:
        words.append(f"{snapshot.progress} %")
    if snapshot.error_code is not None:
        words.append(f"{snapshot.error_code}: {snapshot.error_message or ''}")
    return " ".join(words)


class _WarningHandler(logging.Handler):
    """Prints the library's warnings, such as a retry, on stderr."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one."""
        print_error(record.getMessage())


def run_cancellable(work: Coroutine[Any, Any, int]) -> int:
    """Run *work*; one of `signals` cancels it, a second one ends the process at once.

    Raises:
        asyncio.CancelledError: It was interrupted.
    """
    runner = asyncio.Runner()
    loop = runner.get_loop()
    job = loop.create_task(work)
    warnings = _WarningHandler(logging.WARNING)

    def interrupt(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        warnings.setLevel(logging.CRITICAL)  # the command itself says what it leaves
        loop.call_soon_threadsafe(job.cancel)

    numbers = signals()
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    logging.getLogger().addHandler(warnings)
    try:
        return loop.run_until_complete(job)
    finally:
        if job.cancelled():
            loop.close()  # the runner would wait for threads, such as one that resolves a name
        else:
            runner.close()
        logging.getLogger().removeHandler(warnings)
        for number, handler in previous.items():
            signal.signal(number, handler)
