"""`run_batch`: the whole of one run, from its input to its report."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
import stat
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from evolink_async._checks import number, refuse
from evolink_async._clock import hold
from evolink_async._session import Session
from evolink_async._text import printable
from evolink_async.batch._files import is_foreign, set_aside, sweep
from evolink_async.batch._input import Source, read
from evolink_async.batch._items import EXPIRED, NOT_FOUND, BatchProgress, Options, Run
from evolink_async.batch._ledger import EMULATOR, LEDGER, Invalid, Ledger
from evolink_async.batch._manifest import (
    GALLERY,
    MANIFEST,
    gone,
    write,
)
from evolink_async.batch._report import (
    BatchReport,
    report,
)
from evolink_async.errors import ConfigurationError, RequestValidationError

__all__ = ["run_batch"]

logger = logging.getLogger(__name__)
T = TypeVar("T")


async def run_batch(
    session: Session,
    source: Source,
    out: str | os.PathLike[str],
    *,
    resend_uncertain: bool = False,
    retry_failed: bool = False,
    resubmit_expired: bool = False,
    skip_invalid: bool = False,
    new_key: bool = False,
    emulated: bool = False,
    max_credits: float | None = None,
    gallery: bool = True,
    stop: asyncio.Event | None = None,
    grace: float = 30.0,
    patience: float = 1800.0,
    progress: Callable[[BatchProgress], None] | None = None,
    on_invalid: Callable[[Invalid], None] | None = None,
) -> BatchReport:
    """Generate and save everything *source* asks for, going on where an earlier run ended.

    All of *source* is read into the ledger and checked before anything is submitted. An
    item is known by its ``id``, or by its request and how many equal ones stand above it:
    inserting, deleting and moving lines between runs costs exactly the difference, and a line
    that is given an id later, or loses it, keeps what was bought for it. At most
    ``max_in_flight`` tasks of the session run at once, those of an earlier run included.

    Cancelled, it leaves at once: what was in the air is recorded as uncertain.

    Args:
        session: Submits, watches and downloads.
        source: A file of prompts (UTF-8 text, one a line, or JSON Lines), ``-`` for standard input,
            or an iterable (read in a thread) of prompts, mappings or requests. An object
            holds the fields of `ImageRequest`, or ``path`` and ``body`` of a `RawRequest`;
            an optional unique ``id``; anything else is kept for the manifest.
        out: Folder of this batch; made if missing.
        resend_uncertain: Submit uncertain items again, with the same idempotency key, also
            those no longer in the input: they may be paid for. The gateway has been observed
            to answer such a repeat with the first response; the API's page does not promise it.
        retry_failed: Submit failed items again, where the API's table of task errors or
            the refusal (403, 404) says that may help.
        resubmit_expired: Submit, and pay for, items again whose results can no longer be had.
            Before that the files, the links and the task are looked at once more.
        skip_invalid: Go on without the bad lines.
        new_key: The session's key replaces the one this batch was begun with, of the same
            account. Otherwise another key, as another base URL, is refused: it knows nothing
            of the tasks of earlier runs.
        emulated: The session talks to an emulator that has another address in each run.
        max_credits: Most credits this batch may cost, all its runs together. Before the
            first answer for a model its price is unknown: one submit of it is risked. What
            the API states no cost of counts at the highest price seen.
        gallery: Whether to write ``gallery.html``.
        stop: Set it to stop submitting, wait for what runs at most *grace* seconds, and
            return; looked at once the input is read.
        grace: See *stop*, in real seconds; also after trouble that may keep running tasks
            from ending.
        patience: Seconds of the session's clock the API may be unreachable or refuse all
            submits before the batch stops.
        progress: Called on the event loop at each change of an item's state, and each second.
            What it raises ends the batch at once, as a cancellation would, and is raised here.
        on_invalid: Called with each bad line.

    Raises:
        RequestValidationError: Lines are bad and *skip_invalid* is not set, or all are;
            nothing was sent.
        ConfigurationError: *source* is empty, *source* or *out* cannot be used, a file
            there would be overwritten, or another argument is none of what is allowed.
        LedgerError: The ledger is in use, damaged, of a newer format, belongs to another API
            or key, or cannot be written.
    """
    started = time.monotonic()
    _check("stop", stop, isinstance(stop, asyncio.Event), "an asyncio.Event")
    _check("progress", progress, callable(progress), "a function")
    _check("on_invalid", on_invalid, callable(on_invalid), "a function")
    options = Options(
        resend_uncertain=resend_uncertain,
        resubmit_expired=resubmit_expired,
        max_credits=(
            None
            if max_credits is None
            else number("max_credits", max_credits, most=1e15, unit="None, or credits")
        ),
        grace=number("grace", grace, unit="seconds"),
        patience=number("patience", patience, unit="seconds"),
    )
    await asyncio.to_thread(_check_readable, source)
    folder = await asyncio.to_thread(_make_folder, out)
    names = (MANIFEST, GALLERY) if gallery else (MANIFEST,)
    await asyncio.to_thread(_check_source, folder, source)
    with hold(session.clock):
        ledger = await Ledger(folder / LEDGER).__aenter__()
    try:
        await _check_outputs(ledger, folder, names)
        await _claim(ledger, session, emulated=emulated, new_key=new_key)
        await asyncio.to_thread(sweep, folder)
        invalid = await _load(ledger, source, skip_invalid=skip_invalid, on_invalid=on_invalid)
        if retry_failed or resubmit_expired:
            await ledger.reattach(NOT_FOUND)
        await ledger.reopen(EXPIRED)  # the files, the links, or the clock may be as they were
        if retry_failed:
            await ledger.requeue_failed()
        run = Run(
            session=session,
            ledger=ledger,
            folder=folder,
            options=options,
            counts=await ledger.counts(),
            progress=progress,
        )
        await run.go(stop)
        await ledger.restore()
        unwritten = {name: await write(ledger, folder / name) for name in names}
        for name in names:
            unwritten[name] = unwritten[name] or await asyncio.to_thread(gone, folder / name)
        unwritten[LEDGER] = await _lost(ledger)
        return await report(
            run, invalid=invalid, seconds=time.monotonic() - started, unwritten=unwritten
        )
    finally:
        await ledger.__aexit__()


async def _claim(ledger: Ledger, session: Session, *, emulated: bool, new_key: bool) -> None:
    if emulated:
        await ledger.claim(EMULATOR, None)
        return
    await ledger.claim(session.base_url, session.fingerprint, replace_key=new_key)


def _check(name: str, value: object, fits: bool, allowed: str) -> None:  # noqa: FBT001 - private
    if value is not None and not fits:
        raise refuse(name, value, f"{allowed}, or None")


def _make_folder(out: str | os.PathLike[str]) -> Path:
    if not isinstance(out, str | os.PathLike) or not os.fspath(out):
        raise refuse("out", out, "the path of a folder")
    folder = Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{secrets.token_hex(8)}.probe"
        probe.touch()
        probe.unlink()
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it cannot be the name of a folder"
        raise ConfigurationError(
            f"the folder {printable(str(folder))} cannot be written to: {why}; choose another one"
        ) from exc
    return folder.resolve()


def _check_readable(source: Source) -> None:
    """Refuse an input that is not there, before a folder is made for it."""
    if not isinstance(source, str | os.PathLike):
        return
    why: object = None
    if source == "-":
        if sys.stdin is None:
            raise ConfigurationError("the prompts cannot be read: standard input is closed")
        return
    if not os.fspath(source):
        raise refuse("source", source, "the path of a file, or '-'")
    try:
        mode = Path(source).stat().st_mode  # not opened: a pipe can be read only once
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it cannot be the name of a file"
    else:
        why = "it is a folder" if stat.S_ISDIR(mode) else None
    if why is not None:
        name = printable(os.fspath(source))
        raise ConfigurationError(f"the prompts cannot be read from {name}: {why}")


def _check_source(folder: Path, source: Source) -> None:
    """Refuse to write over the input."""
    for path in (folder / name for name in (MANIFEST, GALLERY)):
        if _is_source(path, source):
            raise ConfigurationError(
                f"the input {printable(str(path))} would be overwritten: the batch writes a file "
                "of that name; rename it, or choose another folder"
            )


async def _check_outputs(ledger: Ledger, folder: Path, names: tuple[str, ...]) -> None:
    """Refuse to write over what is not as a batch wrote it."""
    for path in (folder / name for name in names):
        ours = await ledger.outputs(path.name)
        if "" in ours:
            await asyncio.to_thread(_keep_old, path)
        elif await asyncio.to_thread(is_foreign, path, ours):
            raise ConfigurationError(
                f"{printable(str(path))} would be overwritten, and it is not what the batch "
                "wrote there; move it, or choose another folder"
            )


def _keep_old(path: Path) -> None:
    """Nobody knows any more whether a batch wrote it: it gets another name."""
    kept = set_aside(path)
    if kept is not None:
        logger.warning("%s, perhaps of an older version, is kept as %s", path.name, kept.name)


def _is_source(path: Path, source: Source) -> bool:
    if not isinstance(source, str | os.PathLike) or source == "-":
        return False
    try:
        return path.samefile(source)
    except (OSError, ValueError):
        return False


async def _load(
    ledger: Ledger,
    source: Source,
    *,
    skip_invalid: bool,
    on_invalid: Callable[[Invalid], None] | None,
) -> int:
    """Read the input into the ledger; returns how many lines were bad."""
    loaded = await ledger.load(read(source), skip_invalid=skip_invalid)
    if not loaded.valid and not loaded.invalid:
        raise ConfigurationError(
            f"there is nothing to do: {_name_of(source)} holds no prompt, blank lines aside; "
            "nothing was submitted"
        )
    if not loaded.invalid:
        return 0
    first = (await ledger.invalid(limit=1))[0]
    after = 0
    while on_invalid is not None and (bad := await ledger.invalid(after)):
        for each in bad:
            on_invalid(each)
        after = bad[-1].line
    if not skip_invalid or not loaded.valid:
        advice = "correct or skip them" if loaded.valid else "correct them"
        raise RequestValidationError(
            f"{loaded.invalid} of {loaded.valid + loaded.invalid} lines cannot be submitted, the "
            f"first is line {first.line}: {first.reason}. Nothing was submitted: {advice}",
            field=f"line {first.line}",
            value=None,
            allowed="a prompt, or an object with the fields of a request",
        )
    return loaded.invalid


def _name_of(source: Source) -> str:
    if source == "-":
        return "standard input"
    return printable(os.fspath(source)) if isinstance(source, str | os.PathLike) else "the input"


# ---------------------------------------------------------------------------------------------
# Telling


async def _lost(ledger: Ledger) -> str | None:
    loss = await ledger.loss()
    if loss is None:
        return None
    return (
        f"the ledger {printable(str(ledger.path))} was {loss} while it was in use: a new one "
        f"knows nothing of what was paid for; {MANIFEST}, if it was written, names it all"
    )
