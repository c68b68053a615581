"""The command ``batch``: a file of prompts to a folder of pictures, from the command line."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import click
from attrs import asdict

from evolink_async._cli.console import (
    BAR_WIDTH,
    first_interrupt,
    is_terminal,
    open_session,
    print_error,
    print_json,
    print_result,
    progress_bar,
    rich_console,
    run_cancellable,
)
from evolink_async._http.retry import RetryPolicy
from evolink_async._text import printable
from evolink_async.batch import BatchProgress, BatchReport, Problem, run_batch
from evolink_async.errors import RequestValidationError

__all__ = ["batch"]

_READING: Final = "reading the prompts"
_LINE_INTERVAL: Final = 5.0
"""Seconds between two lines of progress in a log."""
_MAX_PROBLEMS: Final = 20
"""Failed items that are printed one by one; the manifest has them all."""


def _number(_context: click.Context, _option: click.Parameter, value: float | None) -> float | None:
    if value is not None and math.isnan(value):
        raise click.BadParameter("nan is no number of credits")
    return value


@click.command("batch")
@click.argument("source", metavar="FILE")
@click.option(
    "--out",
    required=True,
    metavar="DIR",
    help="Folder of this batch: pictures, ledger, manifest and gallery; made if missing.",
)
@click.option(
    "--max-in-flight",
    type=click.IntRange(min=1),
    default=32,
    show_default=True,
    help="Generations running at once.",
)
@click.option(
    "--max-credits",
    type=click.FloatRange(0, 1e15, max_open=True),
    callback=_number,
    metavar="CREDITS",
    help="Most credits all runs may cost together. The first submit of a model, "
    "whose price is not known yet, may cost more.",
)
@click.option(
    "--resend-uncertain",
    is_flag=True,
    help="Submit again, with the same key, what may have been accepted.",
)
@click.option("--retry-failed", is_flag=True, help="Submit failed items again, if that helps.")
@click.option(
    "--resubmit-expired",
    is_flag=True,
    help="Pay again for results whose links expired before they were saved.",
)
@click.option("--skip-invalid", is_flag=True, help="Go on without the bad lines.")
@click.option(
    "--new-key",
    is_flag=True,
    help="Go on with another API key of the same account.",
)
@click.option("--gallery/--no-gallery", default=True, help="Write gallery.html.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.option("--emulator", "emulated", is_flag=True, help="Use an emulator: no key, no money.")
def batch(**arguments: Any) -> int:
    """Generate all of FILE, one prompt a line, or JSON Lines; - is standard input.

    Run the same command again to go on where it ended: nothing is submitted twice.
    The first Ctrl-C stops submitting and waits up to 30 s for what runs, the second
    leaves at once.

    Exit codes: 0 all saved, 1 not all, 2 usage or bad lines, 3 API, network or disk,
    130 interrupted.
    """
    return run_cancellable(_run(**arguments))


async def _run(
    *,
    source: str,
    out: str,
    max_in_flight: int,
    as_json: bool,
    emulated: bool,
    **options: Any,
) -> int:
    stop = asyncio.Event()
    running = asyncio.Event()
    settings: dict[str, Any] = {"max_in_flight": max_in_flight}
    if options["resend_uncertain"]:
        settings["retry"] = RetryPolicy(resend_uncertain=True)

    def follow(now: BatchProgress) -> None:
        running.set()
        show(now)

    with first_interrupt(stop, running):
        try:
            async with _progress() as show, open_session(emulated=emulated, **settings) as session:
                report = await run_batch(
                    session,
                    source,
                    out,
                    stop=stop,
                    emulated=emulated,
                    progress=follow,
                    on_invalid=lambda bad: print_error(f"line {bad.line}: {bad.reason}"),
                    **options,
                )
        except asyncio.CancelledError:
            print_error("left at once; run the same command again to go on")
            raise
        except RequestValidationError as exc:
            if not options["skip_invalid"]:
                exc.add_note("--skip-invalid goes on without bad lines")
            raise
    _print_problems(report, emulated=emulated)
    if as_json:
        print_json(_as_json(report))
    else:
        _print_summary(report)
    return report.exit_code


# ---------------------------------------------------------------------------------------------
# Progress


@asynccontextmanager
async def _progress() -> AsyncIterator[Callable[[BatchProgress], None]]:
    """Shows progress on stderr: a bar on a terminal, otherwise a line every few seconds.

    A line is printed even if nothing has changed, to show that the process is alive.
    """
    if is_terminal(sys.stderr):
        with progress_bar(_READING) as update:
            console = rich_console(stderr=True)
            yield lambda now: update(
                _words(now, console.width - BAR_WIDTH - 1),
                now.saved + now.failed + now.uncertain,
                now.total,
            )
        return
    latest, printed = _READING, ""

    def print_latest() -> None:
        nonlocal printed
        printed = latest
        print_error(latest)

    def show(now: BatchProgress) -> None:
        nonlocal latest
        latest = _words(now)
        if printed in {"", _READING}:
            print_latest()

    async def repeat() -> None:
        while True:
            await asyncio.sleep(_LINE_INTERVAL)
            print_latest()

    repeating = asyncio.create_task(repeat())
    try:
        yield show
    finally:
        repeating.cancel()
        if latest not in {printed, _READING}:
            print_latest()


def _words(now: BatchProgress, width: float = math.inf) -> str:
    """The progress in words; details are left out to fit *width* characters."""
    facts = _facts(now)
    for name in ("rate", "to download", "queued", "running", "uncertain credits", "credits"):
        if len(", ".join(facts.values())) > width:
            facts.pop(name, None)
    return ", ".join(facts.values())


def _facts(now: BatchProgress) -> dict[str, str]:
    facts = {"saved": f"{now.saved} of {now.total} saved"}
    counts = {"running": now.running, "to download": now.completed, "queued": now.queued}
    failures = {"failed": now.failed, "uncertain": now.uncertain}
    facts |= {name: f"{n} {name}" for name, n in counts.items()}
    facts |= {name: f"{n} {name}" for name, n in failures.items() if n}
    facts["credits"] = f"{now.credits:.10g} credits"
    if now.credits_uncertain:
        facts["uncertain credits"] = f"{now.credits_uncertain:.10g} uncertain"
    elif now.credits_uncertain is None:
        facts["uncertain credits"] = "some uncertain"
    if now.rate is not None:
        facts["rate"] = f"{now.rate:.2g}/s" if now.rate < 10 else f"{now.rate:.0f}/s"
    if now.stopping is not None:
        facts["left"] = "stopping"
    elif now.seconds_left is not None:
        facts["left"] = f"about {_span(now.seconds_left)} left"
    return facts


def _span(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------------------------------------
# The end


def _print_problems(report: BatchReport, *, emulated: bool) -> None:
    """Print what went wrong and what can be done about it."""
    failed = [problem for problem in report.problems if problem.state != "uncertain"]
    for problem in failed[:_MAX_PROBLEMS]:
        print_error(_problem(problem))
    unlisted = report.total - report.saved - report.queued - report.uncertain - _MAX_PROBLEMS
    if unlisted > 0:
        print_error(f"... and {unlisted} more items: see the manifest")
    for problem in report.problems:
        if problem.state == "uncertain":
            print_error(_problem(problem))
    for path in report.kept:
        print_error(
            f"kept as {_name(path)}: what had the name of that picture was changed since it was "
            "saved, or is not of this batch"
        )
    for hint in _hints(report):
        print_error(hint)
    if emulated and report.expired:
        print_error(
            "each run with --emulator has an emulator of its own, which knows nothing of those "
            "before: --resubmit-expired makes again what was left running there"
        )
    if report.stop is not None and report.stop.kind != "interrupted":
        print_error(f"error: {report.stop.message}")
    for why in report.unwritten:
        print_error(f"error: {why}")


def _problem(problem: Problem) -> str:
    place = "no longer in the input" if problem.line is None else f"line {problem.line}"
    name = place + (f" ({problem.id})" if problem.id is not None else "")
    if problem.state == "submitted":
        return f"{name}: still running, as task {problem.task_id}"
    if problem.state == "completed":
        why = "" if problem.message is None else f": {problem.message}"
        return f"{name}: generated, not downloaded yet (task {problem.task_id}){why}"
    if problem.state == "uncertain":
        return (
            f"{name}: may have been accepted and charged (idempotency key "
            f"{problem.idempotency_key}): {problem.message}"
        )
    return f"{name}: failed, {problem.code}: {problem.message}"


def _hints(report: BatchReport) -> Iterator[str]:
    if report.uncertain:
        yield (
            f"{report.uncertain} uncertain: --resend-uncertain asks again with the same key, "
            "which the gateway was observed to answer without charging again"
        )
    if report.retryable:
        yield f"{report.retryable} of the failed may succeed later: --retry-failed"
    if report.expired:
        yield (
            f"{report.expired} were not fetched in time: --resubmit-expired polls them once "
            "more, then pays for them again"
        )
    if report.queued:
        price = "" if report.still_to_pay is None else f", about {report.still_to_pay:.10g} credits"
        yield f"{report.queued} not submitted{price}"
    if report.queued or report.running or report.completed:
        yield "run the same command again to go on"


def _rows(report: BatchReport) -> list[tuple[str, str]]:
    counts = {
        "saved": report.saved,
        "to download": report.completed,
        "running": report.running,
        "queued": report.queued,
        "failed": report.failed,
        "uncertain": report.uncertain,
        "bad lines skipped": report.invalid,
    }
    rows = [(name, str(n)) for name, n in counts.items() if n or name == "saved"]
    rows += [("items", str(report.total)), ("credits", f"{report.credits:.10g}")]
    if report.credits_uncertain != 0:
        amount = report.credits_uncertain
        rows.append(("credits uncertain", "unknown" if amount is None else f"{amount:.10g}"))
    rows += [("time", _span(report.seconds)), ("folder", _name(report.folder))]
    if report.gallery is not None:
        rows.append(("gallery", report.gallery.as_uri()))
    return rows


def _name(path: Path) -> str:
    return printable(str(path), 1000)


def _print_summary(report: BatchReport) -> None:
    """Print a table on stdout: with lines on a terminal, otherwise without."""
    rows = _rows(report)
    if not is_terminal(sys.stdout):
        for name, value in rows:
            print_result(f"{name:<17} {value}")
        return
    from rich.table import Table  # noqa: PLC0415 - see rich_console
    from rich.text import Text  # noqa: PLC0415 - see rich_console

    table = Table(show_header=False)
    table.add_column(justify="right", style="dim")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, Text(value))
    rich_console().print(table)


def _as_json(report: BatchReport) -> dict[str, Any]:
    def plain(_report: object, _attribute: object, value: object) -> object:
        return str(value) if isinstance(value, Path) else value

    return {**asdict(report, value_serializer=plain), "exit_code": report.exit_code}
