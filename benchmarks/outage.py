"""What a server that fails sees of one session, in emulated time over real HTTP on loopback.

A thousand tasks are running when the server begins to answer 503 (or 429), and goes on for
a minute::

    python benchmarks/outage.py [--tasks 1000] [--seconds 60]

Counted by the emulator: requests refused, the busiest second afterwards, and how much later
than without the outage the last task was known to have ended.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import platform
from collections import Counter
from importlib.metadata import version

from evolink_async import Session
from evolink_async.emulator import Emulator, ManualClock, faults


async def measure(tasks: int, seconds: float, status: int, without: tuple[str, ...]) -> str:
    """One row: *status* for *seconds* while *tasks* run."""
    async with Emulator(
        clock=ManualClock(), duration=(20, 60), pictures="tiny", credits=10**9, without=without
    ) as emulator:
        async with Session(
            emulator.api_key, base_url=emulator.base_url, clock=emulator.clock, max_in_flight=tasks
        ) as session:
            running = await asyncio.gather(*(session.submit(f"lake {k}") for k in range(tasks)))
            start = emulator.clock.now()
            emulator.faults.add(faults.Outage(0, seconds, status=status))
            await asyncio.gather(*running)
            ended = emulator.clock.now() - start
        seen = emulator.books.requests()
    refused = [record for record in seen if record.status == status]
    after = Counter(int(record.time) for record in seen if record.time >= start + seconds)
    return f"{len(refused):>8} {max(after.values(), default=0):>14} {ended:>10.1f}"


async def report(tasks: int, seconds: float) -> None:
    """Every row."""
    print(f"{tasks} tasks of 20 to 60 s, all running; the outage begins with them")
    print("answer  batch endpoint   refused  busiest second    all known after, s")
    for status in (503, 429):
        for without, has in (((), "yes"), (("batch",), "no")):
            row = await measure(tasks, seconds, status, without)
            print(f"{status:<7} {has:<14} {row}", flush=True)


def main() -> None:
    """Parse the options and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    if min(options.tasks, options.seconds) <= 0:
        parser.error("--tasks and --seconds must be above 0")
    logging.disable(logging.WARNING)
    print(
        f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}, "
        f"evolink-async {version('evolink-async')}"
    )
    asyncio.run(report(options.tasks, options.seconds))


if __name__ == "__main__":
    main()
