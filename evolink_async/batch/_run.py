"""`run_batch`: the whole of one run, from its input to its report.

Workers, at most as many as generations may run at once, take items from the ledger in the order
of the input, and see each to its result; a few others save the results. Every step that costs
money is recorded before it is taken, every step that is paid for as soon as it is known.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Final

from attrs import define, evolve, field

from evolink_async._checks import number, refuse
from evolink_async._model.snapshots import GenerationResult
from evolink_async._session import Session
from evolink_async._task import Task
from evolink_async._text import printable
from evolink_async.batch._budget import Money
from evolink_async.batch._context import Options, RunContext
from evolink_async.batch._files import damage, make_folder, sweep
from evolink_async.batch._input import Source, check_readable, name_of, read
from evolink_async.batch._items import LiveItem
from evolink_async.batch._ledger import EMULATOR, LEDGER, Invalid, Item, Ledger
from evolink_async.batch._manifest import GALLERY, MANIFEST, gone, write
from evolink_async.batch._progress import BatchProgress, Progress
from evolink_async.batch._report import BatchReport, report
from evolink_async.batch._saving import Saver
from evolink_async.errors import ConfigurationError, RequestValidationError

__all__ = ["run_batch"]

logger = logging.getLogger(__name__)

_DOWNLOADS: Final = 8
"""Items downloaded at once."""
_BACKLOG: Final = 64
"""Completed items that may wait for a download before no more are submitted."""
_MIN_FREE: Final = 64 * 1024 * 1024
"""Bytes the disk must have left before anything more is bought."""


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
    outage_timeout: float = 1800.0,
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
        gallery: Whether to write ``gallery.html``. As ``manifest.jsonl``, it is replaced.
        stop: Set it to stop submitting, wait for what runs at most *grace* seconds, and
            return; looked at once the input is read.
        grace: See *stop*, in real seconds; also what running tasks are given after a failure
            that stops the batch.
        outage_timeout: Seconds of the session's clock the API may be unreachable or refuse all
            submits before the batch stops.
        progress: Called on the event loop at each change of an item's state, and each second.
            What it raises ends the batch at once, as a cancellation would, and is raised here.
        on_invalid: Called with each bad line.

    Raises:
        RequestValidationError: Lines are bad and *skip_invalid* is not set, or all are;
            nothing was sent.
        ConfigurationError: *source* is empty or would be overwritten, *source* or *out*
            cannot be used, or another argument is none of what is allowed.
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
        grace=number("grace", grace, unit="seconds"),
        outage_timeout=number("outage_timeout", outage_timeout, unit="seconds"),
        progress=progress,
    )
    if max_credits is not None:
        max_credits = number("max_credits", max_credits, most=1e15, unit="None, or credits")
    await asyncio.to_thread(check_readable, source)
    folder = await asyncio.to_thread(make_folder, out)
    names = (MANIFEST, GALLERY) if gallery else (MANIFEST,)
    await asyncio.to_thread(_check_source, folder, source)
    async with Ledger(folder / LEDGER, session.clock) as ledger:
        if emulated:
            await ledger.claim(EMULATOR, None)
        else:
            await ledger.claim(session.base_url, session.fingerprint, replace_key=new_key)
        await asyncio.to_thread(sweep, folder)
        invalid = await _load(ledger, source, skip_invalid=skip_invalid, on_invalid=on_invalid)
        if retry_failed or resubmit_expired:
            await ledger.reattach_lost()
        await ledger.reopen_expired()  # the files, the links, or the clock may be as they were
        if retry_failed:
            await ledger.requeue_failed()
        counts = await ledger.counts()
        context = RunContext(
            session=session,
            ledger=ledger,
            folder=folder,
            options=options,
            money=Money.of(counts, limit=max_credits),
            progress=Progress(dict(counts.states)),
        )
        run = _Run(context)
        await run.go(stop)
        unwritten = {name: await write(ledger, folder / name) for name in names}
        for name in names:
            unwritten[name] = unwritten[name] or await asyncio.to_thread(gone, folder / name)
        unwritten[LEDGER] = await _lost(ledger)
        return await report(
            context,
            run.saver,
            invalid=invalid,
            seconds=time.monotonic() - started,
            unwritten=unwritten,
        )


@define(eq=False)
class _Run:
    """The workers of one run, and what makes them wait."""

    context: RunContext
    saver: Saver = field(init=False)
    _feed: AsyncGenerator[Item, None] = field(init=False)
    _feeding: asyncio.Lock = field(factory=asyncio.Lock, init=False)
    _turn: asyncio.Lock = field(factory=asyncio.Lock, init=False)
    _submits: asyncio.Semaphore = field(init=False)
    _generating: set[LiveItem] = field(factory=set, init=False)
    _to_save: asyncio.Queue[tuple[LiveItem, GenerationResult, str]] = field(init=False)
    _disk_checked_at: float = field(default=float("-inf"), init=False)

    def __attrs_post_init__(self) -> None:
        self.saver = Saver(self.context)
        # As many as may be in the air, and no more: what a crash leaves behind in state
        # "submitting" is uncertain, and some of it may have been refused and be waiting.
        self._submits = asyncio.Semaphore(self.context.session.max_connections)
        self._to_save = asyncio.Queue(_BACKLOG)

    async def go(self, stop: asyncio.Event | None) -> None:
        """Run until everything has ended, or no more can be done."""
        context = self.context
        context.report()
        loop = asyncio.get_running_loop()
        work = loop.create_task(context.guard(self._work()))
        work.add_done_callback(lambda _: context.ending.set())
        tasks = [work, loop.create_task(context.guard(context.keep_reporting()))]
        if stop is not None:
            tasks.append(loop.create_task(context.guard(self._obey(stop))))
        try:
            with contextlib.suppress(TimeoutError):
                while not work.done() and context.error is None:
                    context.ending.clear()
                    async with asyncio.timeout_at(context.leave_at):
                        await context.ending.wait()
        finally:
            for each in tasks:
                each.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            context.report()
        if context.error is not None:
            raise context.error

    async def _obey(self, stop: asyncio.Event) -> None:
        await stop.wait()
        self.context.halt("interrupted", "it was interrupted; run the same batch again to go on")

    async def _work(self) -> None:
        """Do all there is to do, then buy anew what turned out to be lost."""
        context, states = self.context, ["submitted", "queued"]
        if context.options.resend_uncertain:
            states.insert(1, "uncertain")
        async with asyncio.TaskGroup() as group:
            savers = [group.create_task(self._save()) for _ in range(_DOWNLOADS)]
            # Before anything else completes: each completed item is taken up once.
            await context.guard(self._resume_completed())
            verifying = group.create_task(context.guard(self._verify()))
            await self._generate(*states)
            await verifying
            await self._to_save.join()
            if context.replaced:
                await self._generate("failed")
                await self._to_save.join()
            for saver in savers:
                saver.cancel()

    async def _items(self, *states: str) -> AsyncGenerator[Item, None]:
        """The items in these states, one state after the other, each in the order of the input."""
        for state in states:
            async with aclosing(self.context.ledger.items(state)) as items:
                async for item in items:
                    if state != "failed" or item.number in self.context.replaced:
                        yield item

    # -- generating ------------------------------------------------------------------------

    async def _generate(self, *states: str) -> None:
        """See all items in these states to their results."""
        context = self.context
        count = sum(context.progress.states.get(state, 0) for state in states)
        async with aclosing(self._items(*states)) as self._feed, asyncio.TaskGroup() as group:
            for _ in range(min(count, context.session.max_in_flight)):
                group.create_task(context.guard(self._generate_each()))

    async def _generate_each(self) -> None:
        """One worker: take an item, see it to its result, and hand that on to be saved."""
        while self.context.going:
            async with self._feeding:
                item = await anext(self._feed, None)
            if item is None or not self.context.going:
                return
            live = LiveItem(self.context, item)
            try:
                task = await self._task_of(live)
                result = None if task is None else await live.result(task)
            finally:
                self._generating.discard(live)
                if not live.recorded and item.state != "submitted":
                    self.context.money.withdraw(item)
                self.context.notify()
            if result is not None:
                stem = await live.completed(result)
                await self._to_save.put((live, result, stem))

    async def _task_of(self, live: LiveItem) -> Task | None:
        """The task of an item, submitted if need be as soon as it may be; None if it has none."""
        if live.item.state == "submitted":
            self._generating.add(live)
            return live.attach()
        while True:
            async with self._submits:
                if not await self._may_submit(live):
                    return None
                task = await live.submit()
            if not live.put_off:
                return task
            self._generating.discard(live)

    async def _may_submit(self, live: LiveItem) -> bool:
        """Wait until it may be submitted; False if nothing more is to be."""
        context = self.context
        async with self._turn:  # in the order of the input
            while await self._has_disk():
                if not context.paused and self._may_pay(live.item):
                    context.money.reserve(live.item)
                    self._generating.add(live)
                    return True
                if context.going:
                    await context.next_change()
        return False

    async def _has_disk(self) -> bool:
        """Whether what is bought could be saved, and more is to be; asked once a second."""
        now, context = time.monotonic(), self.context
        if context.going and now - self._disk_checked_at >= 1.0:
            self._disk_checked_at = now
            free = (await context.in_thread(shutil.disk_usage, context.folder)).free
            if free < _MIN_FREE:
                context.halt(
                    "disk",
                    f"only {free // 1024**2} MB are left on the disk of {context.folder}; make "
                    "room and run the same batch again",
                )
        return context.going

    def _may_pay(self, item: Item) -> bool:
        if self.context.money.allows(item):
            return True
        if not self._generating:  # nothing is under way that may change that
            self.context.halt("max_credits", self._why_not(item))
        return False

    def _why_not(self, item: Item) -> str:
        """Why *item* cannot be paid for."""
        money = self.context.money
        if unknown := money.unknown(item):
            return (
                f"the API has not said yet what a result of {printable(item.model, 80)} costs, and "
                f"{unknown} are or may be paid for: another could break the limit of "
                f"{money.limit:g} credits; have uncertain items resent first, or go on without "
                "a limit"
            )
        return (
            f"at most {money.limit:g} credits may be spent, and {money.committed:g} are spent or "
            "may be; raise the limit to go on"
        )

    # -- saving ----------------------------------------------------------------------------

    async def _save(self) -> None:
        """One of those that save results, until cancelled."""
        while True:
            completed = await self._to_save.get()
            await self.context.guard(self.saver.save(*completed))
            self._to_save.task_done()

    async def _resume_completed(self) -> None:
        """Have saved what earlier runs left to be downloaded, also if nothing more is bought."""
        async with aclosing(self.context.ledger.items("completed")) as items:
            async for item in items:
                await self._resume(item)

    async def _verify(self) -> None:
        """Download again what an earlier run saved and is not there any more, or has changed."""
        context = self.context
        async with aclosing(context.ledger.items("saved")) as items:
            async for item in items:
                damaged = await context.in_thread(damage, context.folder, item.files)
                if damaged:
                    await context.ledger.damaged(item.number)
                    logger.info("%s: %s: downloaded again", item.place, damaged)
                    context.moved("saved", "completed")
                    await self._resume(evolve(item, state="completed"))

    async def _resume(self, item: Item) -> None:
        live = LiveItem(self.context, item)
        result = GenerationResult.from_json(item.snapshot)
        await self._to_save.put((live, result, await live.completed(result)))


def _check(name: str, value: object, fits: bool, allowed: str) -> None:  # noqa: FBT001 - private
    if value is not None and not fits:
        raise refuse(name, value, f"{allowed}, or None")


def _check_source(folder: Path, source: Source) -> None:
    """Refuse to write over the input."""
    if not isinstance(source, str | os.PathLike) or source == "-":
        return
    for path in (folder / MANIFEST, folder / GALLERY):
        if path.exists() and path.samefile(source):
            raise ConfigurationError(
                f"the input {printable(str(path))} would be overwritten: the batch writes a file "
                "of that name; rename it, or choose another folder"
            )


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
            f"there is nothing to do: {name_of(source)} holds no prompt, blank lines aside; "
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


async def _lost(ledger: Ledger) -> str | None:
    loss = await ledger.loss()
    if loss is None:
        return None
    return (
        f"the ledger {printable(str(ledger.path))} was {loss} while it was in use: a new one "
        f"knows nothing of what was paid for. {MANIFEST}, if it was written, names it all: copy "
        "it before the batch is run again, which replaces it"
    )
