"""What a batch's ledger costs: changes a second with full durability, and stalls of the loop.

    python benchmarks/ledger_cost.py [--folder DIR] [--flush MS]
    python benchmarks/ledger_cost.py --batch 1000 [--seconds S ...] [--in-flight 32] [--flush 5]

Lives of items (submitting, submitted, completed, saved: four changes each) run at the same
time, as in a batch; a task beside them notes how late the event loop wakes it. The baseline
is the plain way: one synchronous commit per change on the event loop.

With ``--batch``, whole batches of so many tiny pictures against an emulator in another process,
whose generations take so many seconds: once with changes that share a commit, once with a commit
for each. The folder says which disk is measured; the default is the one with
the temporary files. ``--flush`` makes each flush of ledger and pictures so many milliseconds
slower, as on a disk without a cache.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from evolink_async import Session
from evolink_async.batch import _connection, run_batch
from evolink_async.batch._ledger import Entry, File, Ledger

ITEMS = 2000
CHANGES = 4
IN_FLIGHT = 32
SNAPSHOT = '{"id": "task-unified-1757156493-imcg5zqt", "status": "completed"}' + " " * 700


@asynccontextmanager
async def stalls() -> AsyncIterator[list[float]]:
    """How late, in seconds, the loop is each millisecond."""
    late: list[float] = []

    async def watch() -> None:
        while True:
            before = time.perf_counter()
            await asyncio.sleep(0.001)
            late.append(time.perf_counter() - before - 0.001)

    watcher = asyncio.create_task(watch())
    yield late
    watcher.cancel()


def slow_flushes(seconds: float) -> None:
    """Make each commit, and each flush of a file, of this process so much slower."""

    class Slow(sqlite3.Connection):
        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if sql == "COMMIT":
                time.sleep(seconds)
            return super().execute(sql, *values)

    connect, flush = sqlite3.connect, os.fsync

    def connect_slow(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, factory=Slow, **options)
        return connection

    def flush_slowly(file: int) -> None:
        time.sleep(seconds)
        flush(file)

    sqlite3.connect = connect_slow  # type: ignore[assignment]  # as sqlite3 has it
    os.fsync = flush_slowly  # type: ignore[assignment]  # as os has it


# ---------------------------------------------------------------------------------------------
# The ledger alone


async def live(ledger: Ledger, number: int) -> None:
    """The four changes of one item, each awaited until it is on disk."""
    await ledger.submitting(number, f"{number:032d}")
    await ledger.submitted(number, key=None, task_id=f"task-{number}", reserved=1.0)
    await ledger.completed(number, snapshot=SNAPSHOT, used=1.0, stems=(f"picture-{number}",))
    await ledger.saved(number, [File(name=f"picture-{number}-1.png", sha256="0" * 64, bytes=1)])


async def in_thread(path: Path, at_once: int) -> float:
    """Seconds for all changes, *at_once* items under way."""
    lines = [
        Entry(
            line=k,
            user_id=None,
            digest=f"{k}",
            request='{"prompt": "a lake"}',
            metadata=None,
            model="m",
            pictures=1,
        )
        for k in range(1, ITEMS + 1)
    ]
    async with Ledger(path) as ledger:
        await ledger.load(lines, skip_invalid=False)
        numbers = iter(range(1, ITEMS + 1))

        async def work() -> None:
            for number in numbers:
                await live(ledger, number)

        started = time.perf_counter()
        await asyncio.gather(*(work() for _ in range(at_once)))
        return time.perf_counter() - started


async def on_the_loop(path: Path) -> float:
    """Seconds for as many changes, each committed by itself where the loop runs."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.executescript(
        "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;"
        "CREATE TABLE items (number INTEGER PRIMARY KEY, state TEXT)"
    )
    started = time.perf_counter()
    for number in range(ITEMS):
        for state in range(CHANGES):
            connection.execute("BEGIN")
            connection.execute("INSERT OR REPLACE INTO items VALUES (?, ?)", (number, str(state)))
            connection.execute("COMMIT")
            await asyncio.sleep(0)
    connection.close()
    return time.perf_counter() - started


async def measure(name: str, run: Callable[[], Awaitable[float]]) -> None:
    async with stalls() as late:
        seconds = await run()
    worst, late_ones = max(late) * 1000, sum(each > 0.005 for each in late)
    print(
        f"{name:<28} {ITEMS * CHANGES / seconds:>8.0f} changes/s   longest stall {worst:6.1f} ms   "
        f"{late_ones} over 5 ms"
    )


async def measure_ledger(folder: Path) -> None:
    await measure("one commit each, on the loop", lambda: on_the_loop(folder / "plain.sqlite3"))
    for at_once in (1, IN_FLIGHT, 500):
        path = folder / f"ledger{at_once}.sqlite3"
        await measure(f"ledger, {at_once} items at once", partial(in_thread, path, at_once))


# ---------------------------------------------------------------------------------------------
# Whole batches


@contextmanager
def emulator(seconds: float) -> Iterator[tuple[str, str]]:
    """Address and key of an emulator in a process of its own."""
    options = ("--port=0", "--pictures=tiny", "--credits=1e9")
    duration = ("--duration", str(seconds), str(seconds))
    server = subprocess.Popen(
        [sys.executable, "-m", "evolink_async.emulator", *options, *duration],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert server.stdout is not None
    url, key = (server.stdout.readline().strip().partition("=")[2] for _ in range(2))
    try:
        yield url, key
    finally:
        server.terminate()
        server.communicate()


async def batch(items: int, seconds: float, folder: Path, in_flight: int) -> float:
    """Seconds for a whole batch."""
    with emulator(seconds) as (url, key):
        started = time.perf_counter()
        async with Session(key, base_url=url, max_in_flight=in_flight) as session:
            report = await run_batch(session, [f"lake {k}" for k in range(items)], folder)
        assert report.saved == items
        return time.perf_counter() - started


async def measure_batches(items: int, seconds: float, folder: Path, in_flight: int) -> None:
    group = _connection.GROUP
    shared = await batch(items, seconds, folder / f"shared{seconds}", in_flight)
    setattr(_connection, "GROUP", 1)  # noqa: B010 - a constant to everybody else
    alone = await batch(items, seconds, folder / f"alone{seconds}", in_flight)
    setattr(_connection, "GROUP", group)  # noqa: B010
    print(
        f"{items} items, {seconds:g} s each, {in_flight} in flight: {shared:.1f} s with shared "
        f"commits, {alone:.1f} s with one for each change: {alone / shared:.2f}x"
    )


async def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder")
    parser.add_argument("--flush", type=float, default=0.0, metavar="MS")
    parser.add_argument("--batch", type=int, metavar="ITEMS")
    parser.add_argument("--in-flight", type=int, default=IN_FLIGHT)
    parser.add_argument("--seconds", type=float, nargs="+", default=[0.0, 2.0])
    options = parser.parse_args()
    if options.flush:
        slow_flushes(options.flush / 1000)
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        if options.batch is None:
            await measure_ledger(Path(name))
            return
        for seconds in options.seconds:
            await measure_batches(options.batch, seconds, Path(name), options.in_flight)


if __name__ == "__main__":
    asyncio.run(main())
