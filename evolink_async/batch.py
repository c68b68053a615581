"""A file of prompts in, a folder of pictures out, whatever happens in between.

::

    async with Session() as session:
        report = await run_batch(session, "prompts.jsonl", "out/")

The folder holds the pictures, the ledger (what has been paid for, and what became of it),
``manifest.jsonl`` and ``gallery.html``. Running the same batch again goes on where it ended:
nothing is submitted twice, and nothing that was paid for is forgotten.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import secrets
import stat
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any, Final, TypeVar

from attrs import evolve, field, frozen

from evolink_async._batch_files import Draft, digest_of, is_foreign, present, set_aside, sweep
from evolink_async._batch_input import Source, read
from evolink_async._batch_money import Money
from evolink_async._batch_run import EXPIRED, NOT_FOUND, BatchProgress, Options, Run, Stop
from evolink_async._clock import hold
from evolink_async._gallery import write_gallery
from evolink_async._ledger import EMULATOR, LEDGER, Counts, Invalid, Item, Ledger
from evolink_async._session import Session
from evolink_async._text import printable, shown
from evolink_async.errors import ConfigurationError, LedgerError, RequestValidationError

__all__ = ["BatchProgress", "BatchReport", "Invalid", "Problem", "Stop", "run_batch"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

_SHOWN: Final = 1000
_CHUNK: Final = 500
"""Items of manifest and gallery written at once."""
_MANIFEST: Final = "manifest.jsonl"
_GALLERY: Final = "gallery.html"


@frozen(kw_only=True)
class Problem:
    """An item that is not saved, and why.

    Attributes:
        id: The user's id; None if the line gave none.
        line: Its line in the input, from 1; None if it is not in the input any more.
        state: ``submitted`` (still running), ``completed`` (not downloaded yet), ``failed``
            or ``uncertain``.
        code: A word for the reason: the API's error code, ``submit_uncertain``,
            ``download_failed``, ``results_expired``, ``task_not_found``, ``no_results``, or
            ``http_<status>``.
        message: The reason in words.
        task_id: Its task, if known.
        idempotency_key: The key it was submitted with.
        retryable: Whether ``retry_failed`` would submit it again.
    """

    id: str | None
    line: int | None
    state: str
    code: str | None = None
    message: str | None = None
    task_id: str | None = None
    idempotency_key: str | None = None
    retryable: bool = False


@frozen(kw_only=True)
class BatchReport:
    """What a batch has come to. All counts are items, those of earlier runs included.

    Attributes:
        folder: Where the pictures, the ledger and the rest are.
        total: All items.
        saved: On disk and, if of an earlier run, found unchanged.
        completed: Generated, but not saved.
        running: Submitted, not seen to end; they go on without us.
        queued: Not submitted.
        failed: Will not be made; of these ``retryable`` may succeed if submitted again
            (``retry_failed``), and the results of ``expired`` were lost because nobody
            fetched them in time (``resubmit_expired`` pays for them again).
        retryable: See ``failed``.
        expired: See ``failed``.
        uncertain: May have been accepted and paid for; ``resend_uncertain`` asks again
            with the same idempotency key.
        invalid: Bad lines that were skipped.
        pictures: Files saved by this run.
        credits: Charged or reserved so far, over all runs; at the highest price seen where
            the API has not said how much.
        credits_in_doubt: What uncertain items cost if they were accepted, at that price; not
            among *credits*. None if no price is known.
        still_to_pay: Credits for the queued items at the highest price seen; None if no
            price is known.
        seconds: How long this run took.
        stop: Why it stopped before its end; None if it did not.
        problems: Items that are neither saved nor queued: all uncertain ones, then the first
            1000 others.
        problems_left_out: How many there are beyond these; the manifest has them all.
        kept: Files that had the name of a picture, and were not as the batch saved them: under
            the names they have now.
        manifest: A JSON line per item; None if it could not be written.
        gallery: The page to look at the pictures with; None if none was wanted, or it
            could not be written.
        unwritten: Why manifest or gallery could not be written, or the ledger is gone, with
            what to do.
    """

    folder: Path
    total: int
    saved: int
    completed: int
    running: int
    queued: int
    failed: int
    retryable: int
    expired: int
    uncertain: int
    invalid: int
    pictures: int
    credits: float
    credits_in_doubt: float | None
    still_to_pay: float | None
    seconds: float
    stop: Stop | None
    problems: tuple[Problem, ...] = field(repr=False)
    problems_left_out: int
    kept: tuple[Path, ...]
    manifest: Path | None
    gallery: Path | None
    unwritten: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 all saved, 1 not all, 3 API, network or disk, 130 interrupted."""
        kind = None if self.stop is None else self.stop.kind
        complete = self.saved == self.total
        if kind == "interrupted" and not complete:
            return 130
        if self.unwritten or kind not in {None, "interrupted", "max_credits"}:
            return 3
        return 0 if complete else 1


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
        max_credits=_credits(max_credits),
        grace=_seconds("grace", grace),
        patience=_seconds("patience", patience),
    )
    await asyncio.to_thread(_check_readable, source)
    folder = await asyncio.to_thread(_make_folder, out)
    names = (_MANIFEST, _GALLERY) if gallery else (_MANIFEST,)
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
        unwritten = {name: await _write(ledger, folder / name) for name in names}
        for name in names:
            unwritten[name] = unwritten[name] or await asyncio.to_thread(_gone, folder / name)
        unwritten[LEDGER] = await _lost(ledger)
        return await _report(
            run, invalid=invalid, seconds=time.monotonic() - started, unwritten=unwritten
        )
    finally:
        await ledger.__aexit__()


async def _claim(ledger: Ledger, session: Session, *, emulated: bool, new_key: bool) -> None:
    if emulated:
        await ledger.claim(EMULATOR, None)
        return
    url, key = session._base_url, session._key.reveal()  # noqa: SLF001 - one package
    await ledger.claim(url, key, replace_key=new_key)


def _credits(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1e15:
        raise ConfigurationError(
            f"max_credits={value!r} is not allowed: a number of credits, 0 or more, or None"
        )
    return float(value)


def _seconds(name: str, value: object) -> float:
    number = not isinstance(value, bool) and isinstance(value, int | float)
    if not number or not 0 <= value < 1e9:  # type: ignore[operator]  # number says so
        raise ConfigurationError(f"{name}={shown(value)} is not allowed: seconds, 0 or more")
    return float(value)  # type: ignore[arg-type]  # as above


def _check(name: str, value: object, fits: bool, allowed: str) -> None:  # noqa: FBT001 - private
    if value is not None and not fits:
        raise ConfigurationError(f"{name}={shown(value)} is not allowed: {allowed}, or None")


def _make_folder(out: str | os.PathLike[str]) -> Path:
    if not isinstance(out, str | os.PathLike) or not os.fspath(out):
        raise ConfigurationError(f"out={shown(out)} is not allowed: the path of a folder")
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
        raise ConfigurationError("source='' is not allowed: the path of a file, or '-'")
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
    for path in (folder / name for name in (_MANIFEST, _GALLERY)):
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


async def _report(
    run: Run, *, invalid: int, seconds: float, unwritten: Mapping[str, str | None]
) -> BatchReport:
    """What it has come to, by the ledger."""
    counts = await run.ledger.counts()
    states, money = counts.states, Money.of(counts)
    problems = [_problem(item) async for item in _all_items(run.ledger, run.folder, "uncertain")]
    others = await run.ledger.page("submitting", "submitted", "completed", "failed", limit=_SHOWN)
    problems += map(_problem, others)
    all_of_them = sum(states.values()) - states.get("saved", 0) - states.get("queued", 0)
    written = {name: run.folder / name for name, why in unwritten.items() if why is None}
    return BatchReport(
        folder=run.folder,
        total=sum(states.values()),
        saved=states.get("saved", 0),
        completed=states.get("completed", 0),
        running=states.get("submitted", 0) + states.get("submitting", 0),
        queued=states.get("queued", 0),
        failed=states.get("failed", 0),
        retryable=counts.retryable,
        expired=counts.expired,
        uncertain=states.get("uncertain", 0),
        invalid=invalid,
        pictures=run.pictures,
        credits=money.credits,
        credits_in_doubt=money.in_doubt,
        still_to_pay=_still_to_pay(counts),
        seconds=seconds,
        stop=run.stop,
        problems=tuple(problems),
        problems_left_out=all_of_them - len(problems),
        kept=tuple(run.kept),
        manifest=written.get(_MANIFEST),
        gallery=written.get(_GALLERY),
        unwritten=tuple(why for why in unwritten.values() if why is not None),
    )


def _still_to_pay(counts: Counts) -> float | None:
    if any(model not in counts.prices for model in counts.pictures):
        return None
    return sum(counts.prices[model] * n for model, n in counts.pictures.items())


def _problem(item: Item) -> Problem:
    return Problem(
        id=item.user_id,
        line=item.line if item.wanted else None,
        state=item.state,
        code=item.code,
        message=item.message,
        task_id=item.task_id,
        idempotency_key=item.idempotency_key,
        retryable=item.retryable,
    )


async def _all_items(ledger: Ledger, folder: Path, *states: str) -> AsyncIterator[Item]:
    """Every item that counts, or those in one of *states*, with the files that are there."""
    after = (0, 0)
    while page := await ledger.page(*states, after=after, limit=500):
        for item in page:
            if item.state == "saved" or not item.files:
                yield item
            else:
                yield evolve(item, files=await asyncio.to_thread(present, folder, item.files))
        after = (page[-1].line, page[-1].number)


async def _manifest_lines(items: AsyncIterator[Item]) -> AsyncIterator[str]:
    async for item in items:
        yield json.dumps(_record(item)) + "\n"


def _record(item: Item) -> Mapping[str, Any]:
    snapshot = item.snapshot or {}
    return {
        "id": item.user_id,
        "line": item.line if item.wanted else None,
        "state": item.state,
        "request": item.request,
        "metadata": item.metadata,
        "files": [
            {"name": file.name, "sha256": file.sha256, "bytes": file.bytes} for file in item.files
        ],
        "task_id": item.task_id,
        "idempotency_key": item.idempotency_key,
        "credits": item.credits_used if item.credits_used is not None else item.credits_reserved,
        "duration": snapshot.get("duration"),
        "error": None if item.code is None else {"code": item.code, "message": item.message},
        "times": item.times,
    }


async def _write(ledger: Ledger, path: Path) -> str | None:
    """Replace manifest or gallery as a whole; returns why not, with what to do, if not."""
    try:
        try:
            await _replace(ledger, path)
        except FileNotFoundError:
            # Its folder was removed meanwhile, perhaps with the ledger: then nothing else names
            # what was paid for. A draft makes the folder anew.
            await _replace(ledger, path)
    except FileExistsError as exc:
        why = f"{exc.strerror}; move it"
    except OSError as exc:
        why = f"{exc.strerror or exc}; see to that"
    except LedgerError as exc:
        why = str(exc)
    else:
        return None
    return f"{printable(str(path))} cannot be written: {why}, then run the same batch again"


async def _replace(ledger: Ledger, path: Path) -> None:
    draft = Draft(path)
    await asyncio.to_thread(draft.open)
    try:
        await _fill(draft, ledger)
        digest = await asyncio.to_thread(draft.finish)
        ours = await ledger.outputs(path.name)
        now = await asyncio.to_thread(digest_of, path)
        # Before it has the name: killed in between, the next run must know both.
        await ledger.record_outputs(path.name, {digest} | (ours & {now}))
        await asyncio.to_thread(draft.publish, ours)
    finally:
        await asyncio.to_thread(draft.discard)


def _gone(path: Path) -> str | None:
    """What to say of a file that was written, should it be gone since."""
    if os.path.lexists(path):
        return None
    return (
        f"{printable(str(path))} was removed as soon as it was written; see what clears its folder"
    )


async def _lost(ledger: Ledger) -> str | None:
    loss = await ledger.loss()
    if loss is None:
        return None
    return (
        f"the ledger {printable(str(ledger.path))} was {loss} while it was in use: a new one "
        f"knows nothing of what was paid for; {_MANIFEST}, if it was written, names it all"
    )


async def _fill(draft: Draft, ledger: Ledger) -> None:
    items = _all_items(ledger, draft.path.parent)
    pieces = (
        _manifest_lines(items)
        if draft.path.name == _MANIFEST
        else write_gallery(items, title=draft.path.parent.name)
    )
    chunk: list[str] = []
    async for piece in pieces:
        chunk.append(piece)
        if len(chunk) >= _CHUNK:
            await asyncio.to_thread(draft.write, "".join(chunk))
            chunk.clear()
    await asyncio.to_thread(draft.write, "".join(chunk))
