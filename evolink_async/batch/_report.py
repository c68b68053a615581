"""What a batch has come to."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from attrs import field, frozen

from evolink_async.batch._budget import Money
from evolink_async.batch._context import RunContext
from evolink_async.batch._ledger import Item
from evolink_async.batch._manifest import GALLERY, MANIFEST
from evolink_async.batch._progress import BatchCounts, Stop, batch_counts
from evolink_async.batch._saving import Saver

__all__ = ["BatchReport", "Problem", "report"]

_SHOWN: Final = 1000
"""Problems that are named in a report, apart from uncertain items."""


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
class BatchReport(BatchCounts):
    """What a batch has come to; see `BatchCounts` for the other attributes.

    Attributes:
        folder: Where the pictures, the ledger and the rest are.
        retryable: Failed items that may succeed if submitted again (``retry_failed``).
        expired: Failed items whose results were lost because nobody fetched them in time
            (``resubmit_expired`` pays for them again).
        invalid: Bad lines that were skipped.
        pictures: Files saved by this run.
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
    retryable: int
    expired: int
    invalid: int
    pictures: int
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


async def report(
    run: RunContext,
    saver: Saver,
    *,
    invalid: int,
    seconds: float,
    unwritten: Mapping[str, str | None],
) -> BatchReport:
    """What the batch has come to, by its ledger."""
    counts = await run.ledger.counts()
    shared = batch_counts(counts.states, Money.of(counts))
    problems = [_problem(item) async for item in run.ledger.items("uncertain")]
    others = await run.ledger.page("submitting", "submitted", "completed", "failed", limit=_SHOWN)
    problems += map(_problem, others)
    priced = counts.pictures.keys() <= counts.prices.keys()
    written = {name: run.folder / name for name, why in unwritten.items() if why is None}
    return BatchReport(
        **shared,
        folder=run.folder,
        retryable=counts.retryable,
        expired=counts.expired,
        invalid=invalid,
        pictures=saver.pictures,
        still_to_pay=(
            sum(counts.prices[model] * n for model, n in counts.pictures.items())
            if priced
            else None
        ),
        seconds=seconds,
        stop=run.stop,
        problems=tuple(problems),
        problems_left_out=(shared["total"] - shared["saved"] - shared["queued"] - len(problems)),
        kept=tuple(saver.kept),
        manifest=written.get(MANIFEST),
        gallery=written.get(GALLERY),
        unwritten=tuple(why for why in unwritten.values() if why is not None),
    )


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
