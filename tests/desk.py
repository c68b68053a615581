"""A folder and an emulated API to run batches with."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from attrs import define

from evolink_async import RetryPolicy, Session
from evolink_async.batch import BatchReport, Stop, run_batch
from evolink_async.batch._ledger import LEDGER
from evolink_async.emulator import Emulator, ManualClock, faults

RETRY = RetryPolicy(attempts=2, wait_initial=0.01, wait_jitter=0)


DAY = 24 * 3600.0


@define
class Desk:
    """An emulated API, and a folder to run batches in."""

    emulator: Emulator
    out: Path

    @asynccontextmanager
    async def session(self, **settings: Any) -> AsyncIterator[Session]:
        settings = {"retry": RETRY, "clock": self.emulator.clock, **settings}
        async with Session(
            self.emulator.api_key, base_url=self.emulator.base_url, **settings
        ) as session:
            yield session

    async def run(
        self, source: Any, *, settings: dict[str, Any] | None = None, **options: Any
    ) -> BatchReport:
        async with self.session(**(settings or {})) as session:
            return await run_batch(session, source, self.out, **options)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """What the ledger on disk says."""
        connection = sqlite3.connect(self.out / LEDGER)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    def change(self, sql: str, *values: object) -> None:
        """Have the ledger on disk say something else."""
        connection = sqlite3.connect(self.out / LEDGER)
        with connection:
            connection.execute(sql, values)
        connection.close()

    def wait(self, seconds: float) -> None:
        """Let time pass, the API's and that of this machine, between two runs."""
        assert isinstance(self.emulator.clock, ManualClock)
        self.emulator.clock.advance(seconds)
        self.change(
            "UPDATE items SET submitted_at = submitted_at - ?1, completed_at = completed_at - ?1",
            seconds,
        )

    def states(self) -> dict[str, int]:
        return Counter(state for (state,) in self.rows("SELECT state FROM items WHERE wanted = 1"))

    def manifest(self) -> list[dict[str, Any]]:
        lines = (self.out / "manifest.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def pictures(self) -> list[str]:
        return sorted(path.name for path in self.out.glob("*.png"))

    @property
    def bought(self) -> Counter[str]:
        return Counter(task.prompt for task in self.emulator.books.tasks())


async def until(condition: Callable[[], bool]) -> None:
    """Return once *condition* holds."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.005)


def stop_of(report: BatchReport) -> Stop:
    """Why the batch stopped, which it must have."""
    assert report.stop is not None
    return report.stop


def prompts(count: int, word: str = "lake") -> list[str]:
    return [f"{word} {k}" for k in range(count)]


def not_found(status: int = 404, **which: Any) -> faults.Fault:
    """A host whose links have expired, or that does not have the file yet."""
    return faults.Status(status, route="result", body="no such key", **which)
