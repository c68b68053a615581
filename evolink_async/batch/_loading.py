"""The input of a batch, read into its ledger: what is new, what is known, what is gone."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import sqlite3
import threading
import time
from collections.abc import AsyncGenerator, Iterable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from itertools import islice
from typing import Final, TypeVar

from attrs import astuple

from evolink_async.batch._rows import Entry, Invalid, Loaded

__all__ = ["begin", "chunks", "finish", "forget", "requeue", "take"]

T = TypeVar("T")

_CHUNK: Final = 500
"""Input lines in memory, and in one transaction."""


async def chunks(lines: Iterable[T]) -> AsyncGenerator[list[T], None]:
    """*lines* in lists of some hundred, iterated in a daemon thread.

    The next line may never come, as from a terminal: nobody waits for the thread, not even
    at the end of the process.
    """
    wanted: queue.SimpleQueue[Future[list[T]] | None] = queue.SimpleQueue()
    threading.Thread(
        target=_read, args=(iter(lines), wanted), name="evolink-input", daemon=True
    ).start()
    try:
        while True:
            chunk: Future[list[T]] = Future()
            wanted.put(chunk)
            if not (found := await asyncio.wrap_future(chunk)):
                return
            yield found
    finally:
        wanted.put(None)


def _read(lines: Iterator[T], wanted: queue.SimpleQueue[Future[list[T]] | None]) -> None:
    """Fill each chunk that is *wanted*, until none is."""
    while (chunk := wanted.get()) is not None:
        with contextlib.suppress(InvalidStateError):  # cancelled: nobody waits any more
            try:
                found = list(islice(_until_cancelled(chunk, lines), _CHUNK))
            except BaseException as exc:  # noqa: BLE001 - it belongs to the caller
                chunk.set_exception(exc)
            else:
                chunk.set_result(found)


def _until_cancelled(chunk: Future[list[T]], lines: Iterator[T]) -> Iterator[T]:
    for line in lines:
        if chunk.cancelled():
            return
        yield line


def begin(connection: sqlite3.Connection) -> None:
    """Make room for a new input."""
    connection.execute("DELETE FROM incoming")
    connection.execute("DELETE FROM invalid")


def take(connection: sqlite3.Connection, chunk: Sequence[Entry | Invalid]) -> None:
    """Note a part of the new input, without touching any item."""
    connection.executemany(
        "INSERT INTO incoming VALUES (?, ?, ?, ?, ?, ?, ?)",
        [astuple(each, recurse=False) for each in chunk if isinstance(each, Entry)],
    )
    connection.executemany(
        "INSERT INTO invalid VALUES (?, ?)",
        [astuple(each, recurse=False) for each in chunk if isinstance(each, Invalid)],
    )


def finish(connection: sqlite3.Connection, *, skip_invalid: bool) -> Loaded:
    """Make items of the new input, if all lines are good or bad ones may be skipped."""
    _find_conflicts(connection)
    valid, invalid = (
        connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]  # noqa: S608 - ours
        for table in ("incoming", "invalid")
    )
    if valid and (skip_invalid or not invalid):
        _merge(connection)
    return Loaded(valid=valid, invalid=invalid)


def _find_conflicts(connection: sqlite3.Connection) -> None:
    """Lines whose id stands above already, or belongs to another request, are bad ones."""
    connection.execute(
        """
        INSERT INTO invalid
        SELECT line, 'id: it is the id of line ' || first || ', too; each line needs its own'
        FROM (SELECT line, min(line) OVER (PARTITION BY user_id) AS first
              FROM incoming WHERE user_id IS NOT NULL)
        WHERE line > first
        """
    )
    connection.execute(
        """
        INSERT OR IGNORE INTO invalid
        SELECT incoming.line, 'id: it is the id of an item that was already submitted with '
            || 'another request; give the changed line a new id'
        FROM incoming JOIN items ON items.identity = 'id:' || incoming.user_id
        WHERE items.digest != incoming.digest AND items.state NOT IN ('queued', 'failed')
        """
    )
    connection.execute("DELETE FROM incoming WHERE line IN (SELECT line FROM invalid)")


_IDENTITY: Final = (
    "CASE WHEN user_id IS NOT NULL THEN 'id:' || user_id ELSE 'sha256:' || digest || ':' || "
    "row_number() OVER (PARTITION BY user_id IS NULL, digest ORDER BY line) END"
)
_MATCH: Final = f"""
CREATE TEMP TABLE lines AS SELECT line, user_id, digest, {_IDENTITY} AS identity FROM incoming;
CREATE INDEX temp.lines_by_identity ON lines (identity);
CREATE TEMP TABLE edited AS
    SELECT DISTINCT digest FROM items WHERE identity NOT IN (SELECT identity FROM lines)
    INTERSECT SELECT digest FROM lines;
CREATE INDEX temp.edited_by_digest ON edited (digest);
CREATE TEMP TABLE free AS
    SELECT identity, user_id, digest, user_id IS NULL AS unnamed,
        row_number() OVER (PARTITION BY digest, user_id IS NULL ORDER BY line) AS k
    FROM lines WHERE digest IN (SELECT digest FROM edited)
        AND (user_id IS NULL OR identity NOT IN (SELECT identity FROM items));
CREATE INDEX temp.free_by_digest ON free (digest, unnamed, k);
CREATE TEMP TABLE spare AS
    SELECT number, digest, user_id, line, row_number() OVER (
        PARTITION BY digest ORDER BY CASE state WHEN 'saved' THEN 0 WHEN 'completed' THEN 1
            WHEN 'submitted' THEN 2 WHEN 'failed' THEN 4 WHEN 'queued' THEN 5 ELSE 3 END,
            user_id IS NOT NULL, line, number) AS place
    FROM items WHERE digest IN (SELECT digest FROM edited)
        AND (user_id IS NULL OR identity NOT IN (SELECT identity FROM lines));
CREATE TEMP TABLE taken AS
    SELECT number, digest, line, 1 AS unnamed FROM spare
    WHERE place <= (SELECT count(*) FROM free WHERE free.digest = spare.digest AND unnamed);
INSERT INTO taken
    SELECT number, digest, line, 0 FROM (
        SELECT *, row_number() OVER (PARTITION BY digest ORDER BY place) AS next
        FROM spare WHERE user_id IS NULL AND number NOT IN (SELECT number FROM taken)) AS rest
    WHERE next <= (SELECT count(*) FROM free WHERE free.digest = rest.digest AND NOT unnamed);
CREATE TEMP TABLE matched AS
    SELECT number, identity, free.user_id AS user_id FROM (
        SELECT *, row_number() OVER (PARTITION BY digest, unnamed ORDER BY line, number) AS k
        FROM taken) AS own
    JOIN free ON free.digest = own.digest AND free.unnamed = own.unnamed AND free.k = own.k;
CREATE INDEX temp.matched_by_number ON matched (number);
"""  # noqa: S608 - ours
"""Which items the lines of an edited input take over.

``lines`` is the new input, ``edited`` the requests for which lines have come and gone. Of
those, ``free`` lines look for an item, ``spare`` items have lost their line, those with the
most progress first; ``taken`` are the spare items that a free line gets, ``matched`` pairs
both.
"""


def _adopt(connection: sqlite3.Connection) -> None:
    """Let lines take over equal items whose own lines are gone.

    A line without an id takes any such item, those with the most progress first. A line with
    a new id takes only an item without an id: another id asks for another picture.
    """
    if connection.execute("SELECT 1 FROM items LIMIT 1").fetchone() is None:
        return
    for statement in _MATCH.split(";"):
        connection.execute(statement)
    # Items that lose their identity do so first: no two may have the same one.
    connection.execute(
        "UPDATE items SET identity = 'left:' || number WHERE number IN (SELECT number FROM spare)"
        " AND (user_id IS NULL OR number IN (SELECT number FROM matched))"
    )
    connection.execute(
        "UPDATE items SET identity = matched.identity, user_id = matched.user_id "
        "FROM matched WHERE matched.number = items.number"
    )
    for table in ("lines", "edited", "free", "spare", "taken", "matched"):
        connection.execute(f"DROP TABLE temp.{table}")


def _merge(connection: sqlite3.Connection) -> None:
    """Queue what is new, keep what is known, note what is gone."""
    _adopt(connection)
    # Only an item that was never paid for can get here with another request.
    requeue(
        connection,
        "number IN (SELECT number FROM items JOIN incoming ON items.identity = 'id:' || "
        "incoming.user_id WHERE items.digest != incoming.digest)",
    )
    connection.execute("UPDATE items SET wanted = 0 WHERE wanted = 1")
    connection.execute(
        f"""
        INSERT INTO items (identity, user_id, digest, line, request, metadata, model, pictures,
                           queued_at)
        SELECT {_IDENTITY}, user_id, digest, line, request, metadata, model, pictures, ?
        FROM incoming WHERE true ORDER BY line
        ON CONFLICT (identity) DO UPDATE SET
            wanted = 1, line = excluded.line, metadata = excluded.metadata,
            request = excluded.request, model = excluded.model,
            pictures = excluded.pictures, digest = excluded.digest
        """,  # noqa: S608 - ours
        (time.time(),),
    )
    connection.execute("DELETE FROM incoming")


def requeue(connection: sqlite3.Connection, which: str) -> int:
    """Queue items anew; returns how many."""
    forget(connection, which)
    return connection.execute(
        "UPDATE items SET state = 'queued', idempotency_key = NULL, code = NULL, message = NULL, "  # noqa: S608 - ours
        "retryable = 0, queued_at = ?, submitting_at = NULL, ended_at = NULL "
        f"WHERE {which}",
        (time.time(),),
    ).rowcount


def forget(connection: sqlite3.Connection, which: str) -> None:
    """Remove the task and files of items, and keep what they have cost."""
    connection.execute(
        f"DELETE FROM files WHERE item IN (SELECT number FROM items WHERE {which})"  # noqa: S608 - ours
    )
    connection.execute(
        "UPDATE items SET credits_before = credits_before + coalesce(credits_used, 0), "  # noqa: S608 - ours
        "credits_used = NULL, credits_reserved = NULL, task_id = NULL, snapshot = NULL, "
        f"stem = NULL, submitted_at = NULL, completed_at = NULL WHERE {which}"
    )
