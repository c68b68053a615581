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
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from types import FrameType
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar

import click

from evolink_async._http.secret import Secret
from evolink_async._model.snapshots import TaskSnapshot
from evolink_async._session import Session
from evolink_async._text import printable
from evolink_async.errors import (
    ConfigurationError,
    EvolinkError,
    SubmitUncertainError,
    TaskTimeoutError,
)

if TYPE_CHECKING:
    from rich.console import Console as RichConsole

    from evolink_async.emulator import Emulator

__all__ = [
    "BAR_WIDTH",
    "DONE",
    "EMULATED",
    "ERROR",
    "FAILED",
    "INTERRUPTED",
    "PROGRAM",
    "USAGE",
    "fail",
    "first_interrupt",
    "is_terminal",
    "make_emulator",
    "open_session",
    "print_error",
    "print_json",
    "print_line",
    "print_result",
    "progress_bar",
    "rich_console",
    "run_cancellable",
    "state",
]

T = TypeVar("T")

EMULATED: Final[dict[str, Any]] = {"duration": (20.0, 40.0), "time_scale": 10.0, "credits": 1e9}
"""Settings of ``--emulator``: the API page's example durations, ten times as fast."""


@asynccontextmanager
async def open_session(*, emulated: bool = False, **settings: Any) -> AsyncIterator[Session]:
    """A session with the API, or with an emulator made for it; left at once in the end."""
    async with AsyncExitStack() as stack:
        if emulated:
            emulator = await stack.enter_async_context(make_emulator(EMULATED))
            settings["api_key"] = emulator.api_key
            settings["base_url"] = emulator.base_url
            settings["clock"] = emulator.clock
        session = Session(**settings)
        stack.push_async_callback(session.aclose, grace=0)
        yield session


def make_emulator(settings: dict[str, Any]) -> Emulator:
    """An emulator with these settings.

    Raises:
        ConfigurationError: It cannot have them, or its extra is not installed.
    """
    from evolink_async.emulator import Emulator  # noqa: PLC0415 - loads aiohttp

    try:
        return Emulator(**settings)
    except (ImportError, ValueError) as exc:
        raise ConfigurationError(str(exc)) from exc


def signals() -> tuple[int, ...]:
    """The signals that ask a process to end: SIGINT, SIGTERM and, unless ignored, SIGHUP.

    ``nohup`` ignores SIGHUP.
    """
    hangup = getattr(signal, "SIGHUP", None)
    ignored = hangup is None or signal.getsignal(hangup) is signal.SIG_IGN
    return (signal.SIGINT, signal.SIGTERM, *(() if ignored else (hangup,)))


@contextmanager
def first_interrupt(stop: asyncio.Event, running: asyncio.Event) -> Iterator[None]:
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
        print_error(
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


def rich_console(*, stderr: bool = False) -> RichConsole:
    """A console of rich that prints text as it is."""
    # Imported here, because rich takes long to import and --help does not need it.
    from rich.console import Console as RichConsole  # noqa: PLC0415

    return RichConsole(stderr=stderr, markup=False, emoji=False, highlight=False)


@contextmanager
def progress_bar(
    first: str, *, timed: bool = False
) -> Iterator[Callable[[str, float, float | None], None]]:
    """A bar on stderr, and the words *first* beside it.

    Yields a function that updates it with words, how much is done, and how much there is.
    """
    from rich.progress import (  # noqa: PLC0415 - see rich_console
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
    )

    progress = Progress(
        BarColumn(bar_width=BAR_WIDTH),
        TextColumn("{task.description}", markup=False),
        *([TimeElapsedColumn()] if timed else []),
        console=rich_console(stderr=True),
        transient=True,
    )
    with progress:
        bar = progress.add_task(first, total=None)
        yield lambda words, done, total: progress.update(
            bar, description=words, completed=done, total=total
        )


DONE: Final = 0
FAILED: Final = 1
USAGE: Final = 2
ERROR: Final = 3
INTERRUPTED: Final = 130
PROGRAM: Final = "evolink-async"
BAR_WIDTH: Final = 12
"""Columns of a progress bar; with it the text of a batch fits 80 columns."""


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


def run_cancellable(work: Coroutine[Any, Any, T]) -> T:
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
