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
from contextlib import (
    contextmanager,
)
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
    "FAILED",
    "INTERRUPTED",
    "PROGRAM",
    "TROUBLE",
    "USAGE",
    "Console",
    "drive",
    "fail",
    "is_terminal",
    "print_line",
    "say",
    "say_json",
    "signals",
    "state",
    "tell",
]

EMULATED: Final[dict[str, Any]] = {"duration": (20.0, 40.0), "time_scale": 10.0, "credits": 1e9}
"""How ``--emulator`` generates: about as long as in the API page's example, ten times as fast."""


@frozen(kw_only=True)
class Console:
    """What a command needs of the command line it is part of.

    Attributes:
        drive: Runs a coroutine to an exit code, cancelled by the first signal.
        say: A line of the result, on stdout.
        say_json: The result as JSON, on stdout.
        tell: A line for the person at the terminal, on stderr.
        emulator: Makes an emulator of settings.
    """

    drive: Callable[[Coroutine[Any, Any, int]], int]
    say: Callable[[str], None]
    say_json: Callable[[object], None]
    tell: Callable[[str], None]
    emulator: Callable[[dict[str, Any]], Emulator]


def signals() -> tuple[int, ...]:
    """Those that ask to end: Ctrl-C, a service manager's, and a terminal that is closed.

    The last one not under ``nohup``, which has it ignored.
    """
    hangup = getattr(signal, "SIGHUP", None)
    ignored = hangup is None or signal.getsignal(hangup) is signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *(() if ignored else (hangup,)))


@contextmanager
def _first_interrupt(
    stop: asyncio.Event, running: asyncio.Event, console: Console
) -> Iterator[None]:
    """The first signal while it is *running* sets *stop*; any other is for whoever had it before.

    Before that, while the prompts are read, there is nothing to finish.
    """
    loop = asyncio.get_running_loop()
    previous = {number: signal.getsignal(number) for number in signals()}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def announce() -> None:
        stop.set()
        console.tell(
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
TROUBLE: Final = 3
INTERRUPTED: Final = 130
PROGRAM: Final = "evolink-async"
LINE: Final = 2000


def fail(why: BaseException | str, code: int) -> int:
    """Say *why*, and how to go on, in a line each."""
    tell(f"error: {sentence(why)}")
    for note in getattr(why, "__notes__", ()):
        tell(note)
    return code


def sentence(why: BaseException | str) -> str:
    """*why* in words for someone who types commands, where its own are for programs."""
    if isinstance(why, SubmitUncertainError):
        return f"no usable answer came, and nothing was resent: {why.__cause__}"
    if isinstance(why, TaskTimeoutError):
        state = why.snapshot.status if why.snapshot is not None else "not read yet"
        return f"task {why.task_id} did not end in time, it is {state}"
    if isinstance(why, EvolinkError) and why.way_past in WAYS_PAST:
        return f"{why.problem}; {WAYS_PAST[why.way_past]}"
    return str(why)


WAYS_PAST: Final = {
    "api_key": "set EVOLINK_API_KEY; keys are made at https://evolink.ai/dashboard/keys",
    "validate": "to let the API decide, pass --no-validate",
    "overwrite": "pass --overwrite to replace it",
}
"""What is an argument in Python is an option or a variable here."""


def say(text: str) -> None:
    """A line of the result, on stdout."""
    print_line(printable(text, len(text)))


def say_json(value: object) -> None:
    print_line(json.dumps(value, indent=2))  # escapes all that a terminal would obey


def print_line(text: str | bytes) -> None:
    try:
        click.echo(text, file=lenient(sys.stdout))
    except OSError as exc:
        unread = is_unread(exc, sys.stdout)
        discard(sys.stdout)
        if not unread:
            raise


def is_unread(exc: OSError, stream: IO[Any]) -> bool:
    """Whether nobody reads *stream*: a pipe's reader has seen enough, a terminal is closed."""
    device = stat.S_ISCHR(os.fstat(stream.fileno()).st_mode)
    return isinstance(exc, BrokenPipeError) or (device and exc.errno == errno.EIO)


def tell(text: str) -> None:
    """A line for the person at the terminal, on stderr, without the key."""
    key = os.environ.get("EVOLINK_API_KEY", "").strip()
    line = printable(Secret(key).redact(text) if key else text, LINE)
    try:
        click.echo(line, file=lenient(sys.stderr))
    except OSError:  # a paid generation is not given up because nobody listens
        discard(sys.stderr)


def discard(stream: IO[Any]) -> None:
    """Send what *stream* could not write nowhere, or the interpreter fails at its last flush."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def lenient(stream: IO[Any]) -> IO[Any]:
    """*stream*, which from now on shows what its encoding lacks as an escape."""
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


class Notes(logging.Handler):
    """The library's warnings, such as a retry, among the progress."""

    def emit(self, record: logging.LogRecord) -> None:
        """Show one."""
        tell(record.getMessage())


def drive(work: Coroutine[Any, Any, int]) -> int:
    """Run *work*; one of `signals` cancels it, a second one ends the process at once.

    Raises:
        asyncio.CancelledError: It was interrupted.
    """
    runner = asyncio.Runner()
    loop = runner.get_loop()
    job = loop.create_task(work)
    notes = Notes(logging.WARNING)

    def interrupt(*_: object) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        notes.setLevel(logging.CRITICAL)  # what is left behind, the command itself says
        loop.call_soon_threadsafe(job.cancel)

    numbers = signals()
    previous = {number: signal.signal(number, interrupt) for number in numbers}
    logging.getLogger().addHandler(notes)
    try:
        return loop.run_until_complete(job)
    finally:
        if job.cancelled():
            loop.close()  # the runner would wait for threads, such as one looking up a name
        else:
            runner.close()
        logging.getLogger().removeHandler(notes)
        for number, handler in previous.items():
            signal.signal(number, handler)
