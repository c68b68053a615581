"""How much code of this package one task passes through, from ``submit`` to ``await``.

One task runs alone against an emulator in another thread, while every call of a function of
this package is counted, the emulator's own apart::

    python benchmarks/call_path.py [--seconds 8] [--price 0.05] [--functions]

The files are those with a function that was called between the submit and the result. The calls
of a poll are those between the arrivals of two consecutive polls at the emulator. A coroutine
that goes on after an ``await`` is not called again; a comprehension is part of its function.
The price of a poll is a tenth of the default, so that there are several to look at.
``--functions`` lists the functions called in the median poll.
"""

from __future__ import annotations

import argparse
import asyncio
import dis
import platform
import statistics
import sys
from collections import Counter
from functools import cache
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import evolink_async
from evolink_async import PollPolicy, Session
from evolink_async.emulator import Emulator, RealClock

PACKAGE = Path(evolink_async.__file__).parent
Call = tuple[float, str, str]
"""When, which file, which function."""


@cache
def place(code: CodeType) -> str | None:
    """The file of *code* within the package; None elsewhere, in the emulator, in comprehensions."""
    path = Path(code.co_filename)
    if not path.is_relative_to(PACKAGE) or path.is_relative_to(PACKAGE / "emulator"):
        return None
    part = code.co_name.startswith("<") and code.co_name != "<lambda>"
    return None if part else path.relative_to(PACKAGE).as_posix()


@cache
def beginning(code: CodeType) -> int:
    """Where *code* stands when it is called, and not resumed."""
    return next(
        step.offset
        for step in dis.get_instructions(code)
        if (step.opname, step.arg) == ("RESUME", 0)
    )


async def record(
    emulator: Emulator, clock: RealClock, price: float
) -> tuple[list[Call], list[float]]:
    """All calls from submit to result, and when polls arrived."""
    calls: list[Call] = []

    def profile(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and (where := place(code)) and frame.f_lasti <= beginning(code):
            calls.append((clock.now(), where, code.co_qualname))

    poll = PollPolicy(price=price)
    async with Session(emulator.api_key, base_url=emulator.base_url, poll=poll) as session:
        await session.credits()  # opens the session and imports what is imported late
        sys.setprofile(profile)
        task = await session.submit("A peaceful lake")
        await task
        sys.setprofile(None)
    return calls, [read.time for read in emulator.books.reads(task.id)]


def report(calls: list[Call], polls: list[float], *, functions: bool) -> None:
    cycles = [[call for call in calls if start <= call[0] < end] for start, end in pairwise(polls)]
    if not cycles:
        raise SystemExit("fewer than two polls were sent: give more --seconds")
    median = sorted(cycles, key=len)[len(cycles) // 2]
    total = Counter(where for _, where, _ in calls)
    a_poll = Counter(where for _, where, _ in median)
    print(f"{'file':<28}{'calls in all':>14}{'in a poll':>12}")
    for where, count in total.most_common():
        print(f"{where:<28}{count:>14}{a_poll[where]:>12}")
    print(f"{len(total)} files touched, {len(calls)} calls in all, {len(polls)} polls")
    counts = [len(cycle) for cycle in cycles]
    print(
        f"{statistics.median(counts):g} calls a poll ({min(counts)} to {max(counts)}); the median "
        f"poll: {len({call[1:] for call in median})} functions in {len(a_poll)} files"
    )
    if functions:
        for _, where, name in median:
            print(f"  {where:<26}{name}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="of the generation")
    parser.add_argument("--price", type=float, default=0.05, help="of a poll, in seconds of delay")
    parser.add_argument("--functions", action="store_true", help="list those of the median poll")
    options = parser.parse_args()
    clock = RealClock()
    with Emulator(clock=clock, duration=options.seconds, pictures="tiny") as emulator:
        calls, polls = asyncio.run(record(emulator, clock, options.price))
    print(
        f"one task of {options.seconds:g} s, price {options.price:g}, "
        f"Python {platform.python_version()}, evolink-async {version('evolink-async')}"
    )
    report(calls, polls, functions=options.functions)


if __name__ == "__main__":
    main()
