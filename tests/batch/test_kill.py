"""Batches that are killed, that fill the disk, and whose API is killed under them."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import random
import secrets
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web
from attrs import field, frozen
from batch_kill import DISK_KINDS, KINDS, Harness, ledger
from batch_outage import Outages
from PIL import Image

from evolink_async import PollPolicy, RetryPolicy, Session
from evolink_async.batch import BatchProgress, BatchReport, run_batch
from evolink_async.emulator import Emulator, RealClock, faults
from evolink_async.emulator._exchange import Exchange
from evolink_async.errors import LedgerError

KILLS = int(os.environ.get("EVOLINK_BATCH_KILLS", "50"))
FULL_DISKS = max(2 * len(DISK_KINDS), KILLS // 10)
OUTAGES = max(4, KILLS // 20)
SEED = int(os.environ.get("EVOLINK_BATCH_SEED", "-1"))
SCALE = 50.0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes, which this system cannot")
@pytest.mark.timeout(60 + 2 * KILLS)
def test_killed_at_every_kind_of_event_nothing_is_lost_or_paid_twice(tmp_path: Path) -> None:
    """Emulator, ledger and folder agree after each batch; EVOLINK_BATCH_KILLS=1000 for more."""
    seed = secrets.randbelow(10**6) if SEED < 0 else SEED
    print(f"EVOLINK_BATCH_SEED={seed}")  # noqa: T201 - to repeat it with
    harness = Harness(KILLS, seed, tmp_path)
    harness.run()
    assert sum(harness.hits.values()) >= KILLS
    assert all(harness.hits[kind] >= 5 for kind in KINDS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes, which this system cannot")
@pytest.mark.timeout(60 + 4 * FULL_DISKS)
def test_a_disk_that_fills_up_at_any_kind_of_write_loses_nothing(tmp_path: Path) -> None:
    """The batch ends with the exit code for a failure, and the next run goes on, paid once."""
    seed = secrets.randbelow(10**6) if SEED < 0 else SEED
    print(f"EVOLINK_BATCH_SEED={seed}")  # noqa: T201 - to repeat it with
    harness = Harness(FULL_DISKS, seed, tmp_path, DISK_KINDS)
    harness.run()
    assert sum(harness.hits.values()) >= FULL_DISKS
    assert all(harness.hits[kind] >= 2 for kind in DISK_KINDS)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes, which this system cannot")
@pytest.mark.timeout(60 + 15 * OUTAGES)
def test_an_api_that_is_killed_and_forgets_everything_costs_only_what_is_named(
    tmp_path: Path,
) -> None:
    """Each task that went down with it is offered by name; nothing else is bought again."""
    seed = secrets.randbelow(10**6) if SEED < 0 else SEED
    print(f"EVOLINK_BATCH_SEED={seed}")  # noqa: T201 - to repeat it with
    outages = Outages(OUTAGES, seed, tmp_path)
    outages.run()
    assert outages.killed >= OUTAGES


def session(emulator: Emulator) -> Session:
    """A session on the emulator's time scale that does not give up soon."""
    return Session(
        emulator.api_key,
        base_url=emulator.base_url,
        max_connections=6,
        clock=RealClock(SCALE),
        poll=PollPolicy(deadline=3600),
        retry=RetryPolicy(attempts=4, wait_max=2),
    )


async def test_an_api_that_is_killed_and_restarted_costs_nothing(tmp_path: Path) -> None:
    """What is sent into the gaps is put off or uncertain, and paid once in the end."""
    prompts = [f"lake {k}" for k in range(60)]
    async with Emulator(pictures="tiny", time_scale=SCALE, duration=(1, 3), estimate=1) as emulator:

        async def restart() -> None:
            for _ in range(4):
                await asyncio.sleep(0.05)
                await emulator.aclose()
                await asyncio.sleep(0.05)
                await emulator.start()

        async with session(emulator) as first:
            restarts = asyncio.create_task(restart())
            report = await run_batch(first, prompts, tmp_path)
            await restarts
        assert report.saved + report.completed + report.uncertain + report.queued == 60
        assert report.failed == 0
        keys = Counter(record.idempotency_key for record in emulator.books.submits())
        assert set(keys.values()) <= {1}
        async with session(emulator) as second:
            last = await run_batch(second, prompts, tmp_path, resend_uncertain=True)
        assert last.saved == 60
        assert Counter(task.prompt for task in emulator.books.tasks()) == Counter(prompts)
        assert emulator.books.charged == 60


@frozen(eq=False)
class Large(faults.RequestFault):
    """Results of 2 MB that take no time to draw."""

    picture: bytes = field(kw_only=True)

    async def after(self, _exchange: Exchange, _response: web.Response) -> web.StreamResponse:
        return web.Response(body=self.picture, content_type="image/png")


def noise() -> bytes:
    """A picture that cannot be compressed."""
    file = io.BytesIO()
    Image.frombytes("RGB", (800, 800), random.Random(1).randbytes(3 * 800 * 800)).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, of 80 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("making a small file system takes root")
    made = subprocess.run(  # noqa: S603 - as root, in a folder of ours
        [mount, "-t", "tmpfs", "-o", "size=80M", "tmpfs", str(folder)],
        check=False,
        capture_output=True,
    )
    if made.returncode:
        pytest.skip(f"cannot mount a small file system: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)  # noqa: S603, S607 - see above


@pytest.mark.parametrize("left", [0, 400_000], ids=["no-room-at-all", "no-room-for-pictures"])
async def test_a_disk_that_fills_up_loses_nothing(small_disk: Path, left: int) -> None:
    """The batch stops and says why; with room made, the same batch completes, paid once."""
    prompts = [f"lake {k}" for k in range(12)]
    filler = small_disk / "filler"

    def fill(now: BatchProgress) -> None:
        if now.saved == 2 and not filler.exists():
            with filler.open("wb", buffering=0) as file:
                with contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(1 << 14))
                file.truncate(file.tell() - left)

    async with Emulator(pictures="tiny", time_scale=SCALE, duration=(1, 3), estimate=1) as emulator:
        emulator.faults.add(Large(route="result", picture=noise()))
        out = small_disk / "out"
        async with session(emulator) as first:
            batch = run_batch(first, prompts, out, progress=fill, grace=1)
            (outcome,) = await asyncio.gather(batch, return_exceptions=True)
        if isinstance(outcome, BatchReport):
            assert outcome.stop is not None
            assert outcome.stop.kind == "disk"
            assert "make room" in outcome.stop.message
        else:  # the ledger was the one to find no room
            assert isinstance(outcome, LedgerError)
            assert not left
        filler.unlink()
        assert len(ledger(out, "SELECT * FROM items")) == 12
        async with session(emulator) as second:
            last = await run_batch(second, prompts, out, resend_uncertain=True)
        assert last.saved == 12
        assert Counter(task.prompt for task in emulator.books.tasks()) == Counter(prompts)
        assert emulator.books.charged == 12
