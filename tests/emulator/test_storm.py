"""The client in a storm: all faults at once, one request in five hit.

``EVOLINK_TEST_STORM=5000`` runs it with that many tasks.
"""

from __future__ import annotations

import asyncio
import math
import os
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from evolink_async import (
    DownloadError,
    NotFoundError,
    Outcome,
    PollPolicy,
    RateLimitError,
    ServerError,
    Session,
    SubmitUncertainError,
    TaskCancelledError,
    TaskFailedError,
    TaskTimeoutError,
    Timeout,
)
from evolink_async.emulator import Emulator, ManualClock, TaskRecord
from evolink_async.emulator._tasks import Timeline
from evolink_async.emulator.faults import (
    Endless,
    Fault,
    FewerResults,
    Garbled,
    Latency,
    Outage,
    ProgressFallsBack,
    Reset,
    SlowDrip,
    Stalled,
    Status,
    TaskCancelled,
    TaskFails,
    TaskHangs,
    TaskLags,
    TaskVanishes,
    Truncated,
    UnknownStatus,
    WrongLength,
)

TASKS = int(os.environ.get("EVOLINK_TEST_STORM", "250"))
CODES = (
    "content_policy_violation",
    "invalid_parameters",
    "image_processing_error",
    "image_dimension_mismatch",
    "request_cancelled",
    "resource_not_found",
    "generation_failed_no_content",
    "generation_timeout",
    "service_error",
    "service_unavailable",
    "resource_exhausted",
    "quota_exceeded",
    "unknown_error",
    "brand_new",
)
PAGE = "<html><body>gateway</body></html>"


def storm() -> tuple[Fault, ...]:
    """Every fault there is; the request faults together hit one request in five."""
    kinds: list[tuple[type[Fault], tuple[Any, ...], dict[str, Any]]] = [
        (Status, (500,), {}),
        (Status, (500,), {"processed": True}),
        (Status, (502,), {"body": PAGE}),
        (Status, (503,), {"retry_after": 1}),
        (Status, (503,), {"body": PAGE}),
        (Status, (503,), {"retry_after": 2, "as_date": True}),
        (Status, (429,), {"retry_after": 1}),
        (Status, (429,), {}),
        (Status, (504,), {"body": PAGE}),
        (Status, (520,), {"processed": True, "body": PAGE}),
        (Latency, (0.01,), {}),
        (Reset, ("before",), {}),
        (Reset, ("during",), {}),
        (Reset, ("after",), {}),
        (Truncated, (20,), {}),
        (WrongLength, (50,), {}),
        (Garbled, (), {}),
        (Garbled, ("[]",), {}),
        (SlowDrip, (100, 0.002), {}),
        (Endless, (), {}),
        (Stalled, (), {}),
    ]
    share = 1 - 0.8 ** (1 / len(kinds))
    return (
        *(kind(*values, **more, rate=share) for kind, values, more in kinds),
        *(TaskFails(code, rate=0.01) for code in CODES),
        TaskCancelled(rate=0.02),
        TaskHangs(rate=0.01),
        TaskVanishes(rate=0.01),
        TaskLags(rate=0.02),
        ProgressFallsBack(rate=0.05),
        UnknownStatus(rate=0.05),
        FewerResults(1, rate=0.05),
        Outage(60, 20),
        Outage(120, 10, status=None),
    )


def agrees(outcome: Outcome, record: TaskRecord, timeline: Timeline) -> bool:
    """Whether the caller's outcome is the one in the books."""
    error = outcome.error
    if error is None:
        return outcome.result is not None and outcome.result.urls == record.result_urls
    if isinstance(error, TaskFailedError):
        return (record.status, timeline.error_code) == ("failed", error.code)
    if isinstance(error, TaskCancelledError):
        return record.status == "cancelled"
    if isinstance(error, NotFoundError):
        return timeline.vanishes_at < math.inf
    if isinstance(error, TaskTimeoutError):
        return timeline.ends_at == math.inf
    return isinstance(error, SubmitUncertainError)


@pytest.mark.timeout(1200)
async def test_every_task_ends_as_the_books_say(tmp_path: Path) -> None:
    """In a storm every task ends as the books say or is uncertain, and none is bought twice."""
    before = asyncio.all_tasks()
    clock = ManualClock()
    async with Emulator(
        clock=clock, pictures="tiny", duration=(5, 40), credits=10**6, faults=storm(), seed=7
    ) as emulator:
        async with Session(
            emulator.api_key,
            base_url=emulator.base_url,
            clock=clock,
            max_in_flight=100,
            poll=PollPolicy(deadline=900),
            timeout=Timeout(connect=2, submit=0.5, read=0.5),
        ) as session:
            outcomes = [
                outcome async for outcome in session.map(f"picture {i}" for i in range(TASKS))
            ]
        assert emulator._runner is not None
        assert emulator._runner.server is not None
        await asyncio.sleep(0.05)
        assert emulator._runner.server.connections == []

    assert asyncio.all_tasks() == before
    assert sorted(outcome.index for outcome in outcomes) == list(range(TASKS))
    bought: dict[str, list[TaskRecord]] = {}
    for record in emulator.books.tasks():
        bought.setdefault(record.prompt, []).append(record)
    assert {prompt: len(records) for prompt, records in bought.items() if len(records) > 1} == {}
    disagreeing = []
    for outcome in outcomes:
        records = bought.get(f"picture {outcome.index}")
        if records is None:
            refused = (SubmitUncertainError, RateLimitError, ServerError)
            assert isinstance(outcome.error, refused), outcome
        elif not agrees(outcome, records[0], emulator._service.tasks[records[0].id].timeline):
            disagreeing.append((outcome, records[0]))
    assert disagreeing == []
    hit = sum(bool(entry.faults) for entry in emulator.books.requests())
    kinds = Counter(type(outcome.error).__name__ for outcome in outcomes)
    print(f"{hit} of {len(emulator.books.requests())} requests hit; {dict(kinds)}")  # noqa: T201


async def test_downloads_in_a_storm(tmp_path: Path) -> None:
    """A download in a storm leaves whole pictures or says that it failed; nothing in between."""
    clock = ManualClock()
    async with (
        Emulator(clock=clock, pictures="tiny", seed=7) as emulator,
        Session(
            emulator.api_key,
            base_url=emulator.base_url,
            clock=clock,
            timeout=Timeout(connect=2, submit=5, read=0.2),
        ) as session,
    ):
        results = [await session.generate(f"picture {i}", n=4) for i in range(15)]
        emulator.faults.add(*storm())
        for number, result in enumerate(results):
            folder = tmp_path / str(number)
            with suppress(DownloadError):
                assert len(await session.download(result, folder)) == 4
            for path in folder.iterdir() if folder.exists() else ():
                assert path.suffix == ".png"
                assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
