"""What a submit costs a session in CPU, with the first attempt made directly and by tenacity.

::

    python benchmarks/submit_cost.py [--submits 3200] [--rounds 9]

Nearly all submits succeed at once, and ``_http/retry.py`` shows tenacity only those that do
not. ``direct`` is the library as it is; ``tenacity`` makes the first attempt through tenacity
as well. Both send the same submits, 16 at a time and in turn, to the bare-bones server of
``client_cost.py``, whose tasks have ended when they are answered: nothing is polled.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from client_cost import CONNECTIONS, KEY
from tenacity import AsyncRetrying, retry_if_exception, stop_after_attempt, wait_exponential

from evolink_async import Session
from evolink_async._http.retry import Retries


async def through_tenacity(
    _: Retries, call: Callable[[], Awaitable[Any]], *args: Any, **kwargs: Any
) -> Any:
    """`Retries.run` without the direct first attempt."""
    del args, kwargs
    retrying = AsyncRetrying(
        retry=retry_if_exception(lambda _: False),
        wait=wait_exponential(0.5),
        stop=stop_after_attempt(8),
        before_sleep=lambda _: None,
        reraise=True,
    )
    return await retrying(call)


RUNS: dict[str, Any] = {"direct": Retries.run, "tenacity": through_tenacity}


async def submits(url: str, count: int) -> float:
    """Microseconds of CPU per submit."""
    async with Session(KEY, base_url=url) as session:

        async def submit_some() -> None:
            for _ in range(count // CONNECTIONS):
                await session.submit("A lake 0")

        started = time.process_time()
        await asyncio.gather(*(submit_some() for _ in range(CONNECTIONS)))
        return (time.process_time() - started) / session.stats.submits * 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--submits", type=int, default=3200)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    script = str(Path(__file__).with_name("client_cost.py"))
    server = subprocess.Popen(
        [sys.executable, script, "--serve"], stdout=subprocess.PIPE, text=True
    )
    assert server.stdout is not None
    url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
    cost: dict[str, list[float]] = {name: [] for name in RUNS}
    try:
        for _ in range(options.rounds):
            for name, run in RUNS.items():
                setattr(Retries, "run", run)  # noqa: B010 - not for the type checker
                cost[name].append(asyncio.run(submits(url, options.submits)))
    finally:
        server.terminate()
        server.wait()
    print(
        f"{platform.machine()} {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, aiohttp {version('aiohttp')}, "
        f"tenacity {version('tenacity')}; median of {options.rounds} rounds"
    )
    for name, values in cost.items():
        print(
            f"{name:<9} {statistics.median(values):6.0f} us per submit "
            f"({min(values):.0f} to {max(values):.0f})"
        )


if __name__ == "__main__":
    main()
