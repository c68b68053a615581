"""What a ledger holds, as values, and the questions that are asked of it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from typing import Any, Final

from attrs import field, frozen

__all__ = ["Counts", "Entry", "File", "Invalid", "Item", "Loaded", "counts", "files", "page"]


@frozen(kw_only=True)
class Entry:
    """One good line of the input.

    Attributes:
        line: Its number, from 1.
        user_id: The id the user gave it, if any.
        digest: A hash of the request it makes.
        request: The request, as JSON.
        metadata: What else the line holds, as JSON; None for nothing.
        model: What the price depends on.
        pictures: How many results are ordered.
    """

    line: int
    user_id: str | None
    digest: str
    request: str
    metadata: str | None
    model: str
    pictures: int


@frozen
class Invalid:
    """One bad line of the input: its number, from 1, and what is wrong with it."""

    line: int
    reason: str


@frozen(kw_only=True)
class Loaded:
    """How many good and bad lines the input has."""

    valid: int
    invalid: int


@frozen(kw_only=True)
class File:
    """A saved result: its name in the folder, SHA-256 in hexadecimal, size in bytes."""

    name: str
    sha256: str
    bytes: int


@frozen(kw_only=True)
class Item:
    """One item as the ledger has it."""

    number: int
    identity: str
    user_id: str | None
    line: int
    wanted: bool
    request: Mapping[str, Any] = field(hash=False)
    metadata: Mapping[str, Any] = field(hash=False)
    model: str
    pictures: int
    state: str
    idempotency_key: str | None = None
    task_id: str | None = None
    snapshot: Mapping[str, Any] | None = field(default=None, hash=False)
    code: str | None = None
    message: str | None = None
    retryable: bool = False
    credits_reserved: float | None = None
    credits_used: float | None = None
    times: Mapping[str, float] = field(factory=dict, hash=False)
    files: tuple[File, ...] = ()

    @property
    def place(self) -> str:
        """Where it stands in the input, in words."""
        return f"line {self.line}" if self.wanted else "an item no longer in the input"


@frozen(kw_only=True)
class Counts:
    """The whole ledger in numbers.

    Attributes:
        states: Items by state; those that have left the input count once paid for.
        pictures: Results ordered by items not submitted yet, by model.
        spent: Credits charged, or reserved and not yet settled, over all runs, as far as the
            API has said it.
        unstated: Results that are charged, or will be, at a price the API has not said, by
            model.
        prices: Highest price of one result seen, by model.
        uncertain: Results ordered by uncertain items, by model: they may have been charged.
        retryable: Failed items that may be retried.
        expired: Failed items whose results were lost by waiting too long.
    """

    states: Mapping[str, int] = field(hash=False)
    pictures: Mapping[str, int] = field(hash=False)
    spent: float
    unstated: Mapping[str, int] = field(hash=False)
    prices: Mapping[str, float] = field(hash=False)
    uncertain: Mapping[str, int] = field(hash=False)
    retryable: int
    expired: int


_COLUMNS: Final = (
    "number, identity, user_id, line, wanted, request, metadata, model, pictures, state, "
    "idempotency_key, task_id, snapshot, code, message, retryable, credits_reserved, "
    "credits_used, queued_at, submitting_at, submitted_at, completed_at, saved_at, ended_at"
)
_TIMES: Final = ("queued", "submitting", "submitted", "completed", "saved", "ended")
_PAID: Final = "('submitted', 'completed', 'saved')"
_RELEVANT: Final = "(wanted = 1 OR state NOT IN ('queued', 'failed'))"
"""An item whose line is gone counts only if it has cost, or may have cost, something."""


def page(
    connection: sqlite3.Connection, states: Sequence[str], after: tuple[int, int], limit: int
) -> tuple[Item, ...]:
    """The next items in one of *states* behind line and number *after*."""
    among = f"state IN ({', '.join('?' * len(states))}) AND" if states else ""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM items WHERE {among} (line, number) > (?, ?) AND {_RELEVANT} "  # noqa: S608 - ours
        "ORDER BY line, number LIMIT ?",
        (*states, *after, limit),
    ).fetchall()
    return tuple(_item(connection, row) for row in rows)


def _item(connection: sqlite3.Connection, row: tuple[Any, ...]) -> Item:
    return Item(
        number=row[0],
        identity=row[1],
        user_id=row[2],
        line=row[3],
        wanted=bool(row[4]),
        request=json.loads(row[5]),
        metadata=json.loads(row[6]) if row[6] is not None else {},
        model=row[7],
        pictures=row[8],
        state=row[9],
        idempotency_key=row[10],
        task_id=row[11],
        snapshot=json.loads(row[12]) if row[12] is not None else None,
        code=row[13],
        message=row[14],
        retryable=bool(row[15]),
        credits_reserved=row[16],
        credits_used=row[17],
        times={name: at for name, at in zip(_TIMES, row[18:], strict=True) if at is not None},
        files=tuple(files(connection, row[0]).values()),
    )


def files(connection: sqlite3.Connection, number: int) -> dict[int, File]:
    """The files recorded for an item, by position from 1."""
    rows = connection.execute(
        "SELECT position, name, sha256, bytes FROM files WHERE item = ? ORDER BY position",
        (number,),
    )
    return {k: File(name=name, sha256=sha256, bytes=size) for k, name, sha256, size in rows}


def counts(connection: sqlite3.Connection) -> Counts:
    """The whole ledger in numbers."""

    def table(sql: str) -> dict[str, Any]:
        return dict(connection.execute(sql).fetchall())

    def number(sql: str) -> Any:
        return connection.execute(sql).fetchone()[0]

    return Counts(
        states=table(f"SELECT state, count(*) FROM items WHERE {_RELEVANT} GROUP BY state"),  # noqa: S608 - ours
        pictures=table(
            "SELECT model, sum(pictures) FROM items WHERE state = 'queued' AND wanted = 1 "
            "GROUP BY model"
        ),
        spent=number(
            # The API gives back what a failed item reserved, unless it says otherwise.
            "SELECT coalesce(sum(credits_before + coalesce(credits_used, "  # noqa: S608 - ours
            f"iif(state IN {_PAID}, credits_reserved, 0), 0)), 0) FROM items"
        ),
        unstated=table(
            "SELECT model, sum(pictures) FROM items WHERE credits_used IS NULL AND "  # noqa: S608 - ours
            f"credits_reserved IS NULL AND (state IN {_PAID} OR state = 'failed' AND code IN "
            "('results_expired', 'task_not_found', 'no_results')) GROUP BY model"
        ),
        prices=table(
            # A failed item may have cost nothing: what it used is no price.
            "SELECT model, max(price) FROM (SELECT model, max(coalesce(credits_reserved, used), "
            "coalesce(used, credits_reserved)) / pictures AS price FROM (SELECT *, "
            "iif(state = 'failed', NULL, credits_used) AS used FROM items)) "
            "WHERE price IS NOT NULL GROUP BY model"
        ),
        uncertain=table(
            "SELECT model, sum(pictures) FROM items WHERE state = 'uncertain' GROUP BY model"
        ),
        retryable=number(
            "SELECT count(*) FROM items WHERE state = 'failed' AND wanted = 1 AND retryable = 1"
        ),
        expired=number(
            "SELECT count(*) FROM items WHERE state = 'failed' AND wanted = 1 "
            "AND code IN ('results_expired', 'task_not_found')"
        ),
    )
