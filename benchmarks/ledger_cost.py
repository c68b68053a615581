"""What a batch's ledger costs: changes a second with full durability, and stalls of the loop.

    python benchmarks/ledger_cost.py [folder]

Lives of items (submitting, submitted, completed, saved: four changes each) run at the same
time, as in a batch; a task beside them notes how late the event loop wakes it. The baseline
is the plain way: one synchronous commit per change on the event loop. The folder says which
disk is measured; the default is the one with the temporary files.
"""

from __future__ import annotations

import asyncio
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

from evolink_async.batch._ledger import Entry, File, Ledger

ITEMS = 2000
CHANGES = 4
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
            connection.execute("INSERT OR REPLACE INTO items VALUES (?, ?)", (number, str(state)))
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


async def main(folder: Path) -> None:
    await measure("one commit each, on the loop", lambda: on_the_loop(folder / "plain.sqlite3"))
    for at_once in (1, 32, 500):
        path = folder / f"ledger{at_once}.sqlite3"
        await measure(f"ledger, {at_once} items at once", partial(in_thread, path, at_once))


if __name__ == "__main__":
    where = sys.argv[1] if len(sys.argv) > 1 else None
    with tempfile.TemporaryDirectory(dir=where) as name:
        asyncio.run(main(Path(name)))
