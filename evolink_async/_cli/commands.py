"""The commands: each turns its arguments into calls and their outcome into an exit code.

Results go to stdout; progress and errors, a line each, to stderr. All text from outside goes
through `printable` before it is printed.
"""

from __future__ import annotations

import asyncio
import functools
import os
import shlex
import sys
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec

import click
from attrs import frozen

from evolink_async._cli.batch import batch
from evolink_async._cli.console import (
    DONE,
    ERROR,
    FAILED,
    INTERRUPTED,
    PROGRAM,
    USAGE,
    fail,
    is_terminal,
    make_emulator,
    open_session,
    print_error,
    print_json,
    print_line,
    print_result,
    progress_bar,
    run_cancellable,
    state,
)
from evolink_async._model.requests import DEFAULT_MODEL, ImageRequest
from evolink_async._model.snapshots import GenerationResult, TaskSnapshot
from evolink_async._polling.policy import PollPolicy
from evolink_async._session import Session
from evolink_async._task import Task
from evolink_async._text import printable
from evolink_async.errors import (
    ConfigurationError,
    DownloadError,
    EvolinkError,
    NotFoundError,
    RequestValidationError,
    SubmitUncertainError,
    TaskCancelledError,
    TaskError,
    TaskFailedError,
)

__all__ = ["cli", "run"]


P = ParamSpec("P")
Show = Callable[[TaskSnapshot], None]


def run(argv: Sequence[str] | None = None) -> int:
    """Run the command line with these arguments, default those of the process.

    Returns:
        The exit code: 0 done, 1 a task failed, 2 usage, 3 API or network, 130 interrupted.
    """
    try:
        code: int = cli.main(argv, prog_name=PROGRAM, standalone_mode=False)
    except click.UsageError as exc:
        where = exc.ctx.command_path if exc.ctx is not None else PROGRAM
        return fail(f"{exc.format_message()} (see {where} --help)", USAGE)
    except (RequestValidationError, ConfigurationError) as exc:
        return fail(exc, USAGE)
    except EvolinkError as exc:
        return fail(exc, FAILED if isinstance(exc, TaskError) else ERROR)
    except (KeyboardInterrupt, click.Abort, asyncio.CancelledError):
        print_error("interrupted")
        return INTERRUPTED
    except OSError as exc:
        return fail(exc, ERROR)
    except Exception as exc:  # noqa: BLE001 - the last resort, for bugs
        for line in "".join(traceback.format_exception(exc)).splitlines():
            print_error(line)
        return fail(f"unexpected {type(exc).__name__}: please report this as a bug", ERROR)
    return code


# ---------------------------------------------------------------------------------------------
# Progress


@contextmanager
def _progress(first: str) -> Iterator[Show]:
    """Shows snapshots on stderr: a bar on a terminal, otherwise a line per change."""
    if not is_terminal(sys.stderr):
        yield lambda snapshot: print_error(state(snapshot))
        return
    with progress_bar(first, timed=True) as update:
        yield lambda snapshot: update(printable(state(snapshot), 80), snapshot.progress or 0, 100)


# ---------------------------------------------------------------------------------------------
# One generation


@frozen(kw_only=True)
class _Options:
    """Options of the commands that wait for a task.

    Attributes:
        folder: Where to save its results; None to print their links.
        overwrite: Whether existing files may be replaced.
        as_json: Whether to print one JSON document.
        emulated: Whether the task ends with this process.
    """

    folder: str | None
    overwrite: bool = False
    as_json: bool = False
    emulated: bool = False

    def pick_up(self, task_id: str) -> str:
        """A message on how to go on with a task that is still running."""
        wait, download = self._command("wait", task_id), self._command("download", task_id)
        return self._unless_emulated(
            f"task {task_id}", f"goes on; pick it up with: {wait}, or: {download}"
        )

    def save_again(self, task_id: str) -> str:
        """A message on how to save a completed task whose files are not all on disk."""
        download = self._command("download", task_id, "--overwrite")
        return self._unless_emulated(
            f"task {task_id}", f"is completed; save its results with: {download}"
        )

    def ask_again(self, key: str) -> str:
        """A message on how to find out what became of a submit."""
        return self._unless_emulated(
            f"the submit with idempotency key {key}",
            f"may have been accepted: the same command with --idempotency-key {key} asks for the "
            f"first answer again, and {PROGRAM} list shows recent tasks",
        )

    def _unless_emulated(self, subject: str, future: str) -> str:
        return f"{subject} {'ends here, with its emulator' if self.emulated else future}"

    def _command(self, name: str, task_id: str, *more: str) -> str:
        words = [PROGRAM, name, task_id]
        if name == "download" and self.folder not in {None, os.curdir}:
            words += ["--out", str(self.folder)]
        return shlex.join([*words, *more])


async def _submit(
    session: Session, request: ImageRequest, key: str | None, options: _Options
) -> Task:
    """Submit; if interrupted, stop at once and print what became of the submit."""
    submit = asyncio.create_task(session.submit(request, idempotency_key=key))
    try:
        return await asyncio.shield(submit)
    except asyncio.CancelledError:
        await session.aclose(grace=0)
        (outcome,) = await asyncio.gather(submit, return_exceptions=True)
        print_error(_left_behind(outcome, options))
        raise
    except SubmitUncertainError as exc:
        exc.add_note(options.ask_again(exc.idempotency_key))
        raise


def _left_behind(outcome: Task | BaseException, options: _Options) -> str:
    if isinstance(outcome, Task):
        return options.pick_up(outcome.id)
    if isinstance(outcome, SubmitUncertainError):
        return options.ask_again(outcome.idempotency_key)
    return "nothing was submitted"


async def _follow(task: Task, options: _Options, show: Show) -> GenerationResult:
    """Show the progress of *task* and return its result; if interrupted, say how to go on."""
    try:
        async for snapshot in task.updates():
            show(snapshot)
        return await task
    except asyncio.CancelledError:
        print_error(options.pick_up(task.id))
        raise
    except (TaskFailedError, TaskCancelledError, NotFoundError):
        raise  # the task has ended
    except EvolinkError as exc:
        exc.add_note(options.pick_up(task.id))
        raise


async def _deliver(session: Session, result: GenerationResult, options: _Options) -> int:
    """Save the results if asked to, and print their paths or links."""
    if not result.urls:
        return fail(f"task {result.task_id} completed without results", FAILED)
    paths = await _save(session, result, options)
    if options.as_json:
        files = {} if options.folder is None else {"files": [str(path) for path in paths]}
        print_json({**result.to_json(), **files})
        return DONE
    for path in paths:
        print_line(os.fsencode(path))  # the bytes of the name, for other programs
    if options.folder is None:
        for url in result.urls:
            print_result(url)
    return DONE


async def _save(session: Session, result: GenerationResult, options: _Options) -> tuple[Path, ...]:
    if options.folder is None:
        return ()
    try:
        return await session.download(result, options.folder, overwrite=options.overwrite)
    except asyncio.CancelledError:
        print_error(options.save_again(result.task_id))
        raise
    except DownloadError as exc:
        exc.add_note(options.save_again(result.task_id))
        raise


@contextmanager
def _documented(options: _Options) -> Iterator[None]:
    """With ``--json``, print a task that did not complete as well."""
    try:
        yield
    except TaskError as exc:
        if options.as_json and exc.snapshot is not None:
            print_json(exc.snapshot.raw)
        raise


def _waiting(deadline: float | None) -> dict[str, Any]:
    return {} if deadline is None else {"poll": PollPolicy(deadline=deadline)}


async def _resume(task_id: str, options: _Options, *, deadline: float | None) -> int:
    async with open_session(**_waiting(deadline)) as session:
        task = session.task(task_id)
        with _documented(options), _progress(task_id) as show:
            result = await _follow(task, options, show)
        return await _deliver(session, result, options)


# ---------------------------------------------------------------------------------------------
# Commands


_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
_overwrite = click.option("--overwrite", is_flag=True, help="Replace existing files.")
_out = click.option(
    "--out",
    "folder",
    metavar="DIR",
    type=click.Path(file_okay=False),
    default=os.curdir,
    help="Folder to save in; made if missing. Default: the current one.",
)
_timeout = click.option(
    "--timeout",
    "deadline",
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    help="Stop waiting after so long; the task goes on. Default: an hour.",
)


def _cancellable(command: Callable[P, Coroutine[Any, Any, int]]) -> Callable[P, int]:
    """Runs *command* until a signal cancels it; its options are declared above."""

    @functools.wraps(command)
    def run_command(*args: P.args, **kwargs: P.kwargs) -> int:
        return run_cancellable(command(*args, **kwargs))

    return run_command


@click.group(no_args_is_help=False, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name=PROGRAM)
def cli() -> None:
    """Generate images on EvoLink.

    The API key is read from EVOLINK_API_KEY, the address of the API from EVOLINK_BASE_URL.
    Results go to stdout, progress and errors to stderr.

    Exit codes: 0 done, 1 a task failed or did not end in time, 2 usage, 3 API, network or
    disk, 130 interrupted.
    """


@cli.command()
@click.argument("prompt")
@click.option("--size", metavar="WxH", help="Width and height in pixels, such as 1280x1280.")
@click.option("--n", type=int, metavar="N", help="Pictures to make: 1, 2 or 4.")
@click.option("--no-prompt-extend", is_flag=True, help="Do not let a model rewrite the prompt.")
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help="Model to ask.")
@click.option("--no-validate", is_flag=True, help="Let the API decide what it allows.")
@click.option("--idempotency-key", "key", help="Key of an earlier submit to ask for again.")
@_out
@_overwrite
@_timeout
@_json
@click.option("--emulator", "emulated", is_flag=True, help="Use an emulator: no key, no money.")
@_cancellable
async def generate(
    *,
    prompt: str,
    size: str | None,
    n: int | None,
    no_prompt_extend: bool,
    model: str,
    no_validate: bool,
    key: str | None,
    folder: str,
    overwrite: bool,
    deadline: float | None,
    as_json: bool,
    emulated: bool,
) -> int:
    """Generate pictures from PROMPT, save them, print their paths."""
    request = ImageRequest(
        prompt,
        model=model,
        size=size,
        n=n,
        prompt_extend=False if no_prompt_extend else None,
        validate=not no_validate,
    )
    options = _Options(folder=folder, overwrite=overwrite, as_json=as_json, emulated=emulated)
    async with open_session(emulated=emulated, **_waiting(deadline)) as session:
        path = Path(folder)  # before anything is paid for
        await asyncio.to_thread(path.mkdir, parents=True, exist_ok=True)
        with _documented(options), _progress("submitting") as show:
            task = await _submit(session, request, key, options)
            result = await _follow(task, options, show)
        return await _deliver(session, result, options)


@cli.command()
@click.argument("task_id", metavar="ID")
@_json
@_cancellable
async def status(*, task_id: str, as_json: bool) -> int:
    """Print how the task ID is doing."""
    async with open_session() as session:
        snapshot = await session.task(task_id).refresh()
    if as_json:
        print_json(snapshot.raw)
    else:
        print_result(state(snapshot))
    return DONE


@cli.command()
@click.argument("task_id", metavar="ID")
@_timeout
@_json
@_cancellable
async def wait(*, task_id: str, deadline: float | None, as_json: bool) -> int:
    """Wait for the task ID and print the links to its results."""
    return await _resume(task_id, _Options(folder=None, as_json=as_json), deadline=deadline)


@cli.command()
@click.argument("task_id", metavar="ID")
@_out
@_overwrite
@_timeout
@_json
@_cancellable
async def download(
    *, task_id: str, folder: str, overwrite: bool, deadline: float | None, as_json: bool
) -> int:
    """Wait for the task ID, save its results, print their paths."""
    options = _Options(folder=folder, overwrite=overwrite, as_json=as_json)
    return await _resume(task_id, options, deadline=deadline)


@cli.command("list")
@click.option(
    "--status",
    type=click.Choice(["processing", "completed", "failed", "cancelled"]),
    help="Only tasks in this state; processing includes those that wait.",
)
@click.option("--model", help="Only tasks of this model.")
@click.option(
    "--limit", type=click.IntRange(min=1), default=20, show_default=True, help="At most so many."
)
@_json
@_cancellable
async def list_tasks(*, as_json: bool, **filters: Any) -> int:
    """Print the account's recent tasks, newest first."""
    async with open_session() as session:
        rows = [row async for row in session.list(**filters)]
    if as_json:
        print_json([row.to_json() for row in rows])
    else:
        for row in rows:
            when, model = _when(row.created), row.model or "-"
            print_result(f"{row.id:<34} {row.status:<10} {when} {model}")
    return DONE


def _when(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    try:
        return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
    except (ValueError, OverflowError, OSError):  # out of range
        return "-"


@cli.command("credits")
@_json
@_cancellable
async def show_credits(*, as_json: bool) -> int:
    """Print how many credits are left."""
    async with open_session() as session:
        found = await session.credits()
    if as_json:
        print_json(found.to_json())
    else:
        limit = "no limit" if found.token_unlimited else f"{_amount(found.token_remaining)} left"
        print_result(f"account: {_amount(found.remaining)} left, {_amount(found.used)} used")
        print_result(f"this key: {limit}, {_amount(found.token_used)} used")
    return DONE


def _amount(number: float | None) -> str:
    return "?" if number is None else f"{number:.10g}"


@cli.command("emulator")
@click.option("--port", type=click.IntRange(0, 65535), default=8765, show_default=True)
@click.option("--credits", type=float, help="Credits the account has at first.")
@click.option(
    "--duration",
    type=(float, float),
    metavar="LEAST MOST",
    help="Seconds a generation takes.",
)
@click.option("--time-scale", type=float, help="Emulated seconds per real second.")
@click.option("--pictures", help="full: drawn from the prompt; tiny: of one colour.")
@click.option("--seed", type=int, help="Of everything drawn by chance.")
def serve_emulator(**settings: Any) -> int:
    """Serve an emulated API on this machine until interrupted."""
    from evolink_async.emulator import serve  # noqa: PLC0415 - loads aiohttp

    given = {name: value for name, value in settings.items() if value is not None}
    with suppress(asyncio.CancelledError):
        run_cancellable(serve(make_emulator(given)))
    return DONE


cli.add_command(batch)
