"""What a running task holds in memory, and how long the event loop stalls meanwhile.

    python benchmarks/memory.py [--tasks 10000 100000] [--clients session,bare,coroutine]

Each client runs in a process of its own against a server in another. All tasks are
submitted, nobody awaits any, then every one of them is read once or more; the growth of the
resident memory is divided by their number. The stall is the longest time the event loop did
not run, without full garbage collections, which are given apart; beside it the longest in
processor time, which leaves out pauses of the machine itself. Clients:

- ``session``: this library; its tasks' handles are dropped after `Session.submit`;
- ``bare``: a future per task, all read together 50 ids a request, last answers not kept;
- ``coroutine``: a coroutine per task that sleeps between reads and keeps the last answer.

Linux: resident memory is read from /proc.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import logging
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import aiohttp
from client_cost import BATCH, CONNECTIONS, KEY

from evolink_async import PollPolicy, Session

SECONDS = 100_000.0
"""How long each task runs: longer than the measurement."""


def resident() -> int:
    """Bytes of resident memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


class Stalls:
    """The longest the event loop did not run, full garbage collections apart."""

    def __init__(self) -> None:
        self.longest = self.longest_busy = self.longest_collection = 0.0
        self._collecting = self._collected = 0.0

    async def watch(self) -> None:
        gc.callbacks.append(self._note)
        while True:
            self._collected = 0.0
            before, busy_before = time.perf_counter(), time.thread_time()
            await asyncio.sleep(0.001)
            stall = time.perf_counter() - before - 0.001 - self._collected
            self.longest = max(self.longest, stall)
            busy = time.thread_time() - busy_before - self._collected
            self.longest_busy = max(self.longest_busy, busy)

    def _note(self, phase: str, info: dict[str, int]) -> None:
        if info["generation"] < 2:
            return
        if phase == "start":
            self._collecting = time.perf_counter()
        else:
            took = time.perf_counter() - self._collecting
            self._collected += took
            self.longest_collection = max(self.longest_collection, took)


async def session_client(url: str, count: int) -> float:
    ids: list[str] = []

    async def submit() -> None:
        ids.append((await session.submit(f"A lake {SECONDS}")).id)

    policy = PollPolicy(deadline=None, max_interval=3600)
    async with Session(KEY, base_url=url, max_in_flight=count, poll=policy) as session:
        await at_once(count, submit)
        before = session.stats.ids_read
        for k, task_id in enumerate(ids):  # poll all of them now
            session.nudge(task_id)
            if k % 100 == 0:
                await asyncio.sleep(0)
        while session.stats.ids_read < before + count:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)  # for the last answers
        return settle()


async def bare_client(url: str, count: int) -> float:
    waiting: dict[str, asyncio.Future[None]] = {}
    loop = asyncio.get_running_loop()

    async def submit() -> None:
        body = {"model": "wan2.5-text-to-image", "prompt": f"A lake {SECONDS}"}
        async with http.post("/v1/images/generations", json=body) as response:
            waiting[(await response.json())["id"]] = loop.create_future()

    async with open_http(url) as http:
        await at_once(count, submit)
        ids = list(waiting)
        for k in range(0, count, BATCH):
            async with http.post("/v1/tasks/batch", json={"task_ids": ids[k : k + BATCH]}) as got:
                await got.json()
        return settle()


async def coroutine_client(url: str, count: int) -> float:
    read = 0

    async def watch() -> None:
        nonlocal read
        body = {"model": "wan2.5-text-to-image", "prompt": f"A lake {SECONDS}"}
        async with permits, http.post("/v1/images/generations", json=body) as response:
            task = await response.json()
        while task["status"] != "completed":
            async with permits, http.get(f"/v1/tasks/{task['id']}") as response:
                task = await response.json()
            read += 1
            await asyncio.sleep(3600)

    permits = asyncio.Semaphore(CONNECTIONS)
    async with open_http(url) as http:
        tasks = [asyncio.create_task(watch()) for _ in range(count)]
        while read < count:  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(0.01)
        size = settle()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return size


def open_http(url: str) -> aiohttp.ClientSession:
    return aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=CONNECTIONS))


async def at_once(count: int, submit: Any) -> None:
    """Submit *count* times, as many at once as there are connections."""
    for k in range(0, count, CONNECTIONS):
        await asyncio.gather(*(submit() for _ in range(min(CONNECTIONS, count - k))))


def settle() -> float:
    gc.collect()
    return resident()


CLIENTS = {"session": session_client, "bare": bare_client, "coroutine": coroutine_client}


async def measure(client: str, url: str, count: int) -> dict[str, float]:
    stalls = Stalls()
    watch = asyncio.create_task(stalls.watch())
    before = settle()
    started = time.perf_counter()
    after = await CLIENTS[client](url, count)
    watch.cancel()
    return {
        "kB/task": (after - before) / count / 1000,
        "longest stall ms": stalls.longest * 1000,
        "in processor time": stalls.longest_busy * 1000,
        "longest full gc ms": stalls.longest_collection * 1000,
        "took s": time.perf_counter() - started,
    }


def in_a_process(client: str, count: int) -> dict[str, float]:
    script = str(Path(__file__).with_name("client_cost.py"))
    command = [sys.executable, script, "--serve", f"--speed={25 / SECONDS}"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
        command = [sys.executable, __file__, "--client", client, "--url", url, "--tasks"]
        run = subprocess.run([*command, str(count)], check=True, stdout=subprocess.PIPE)
        row: dict[str, float] = json.loads(run.stdout)
        return row
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tasks", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--clients", default=",".join(CLIENTS))
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.client:
        logging.disable(logging.WARNING)  # closing names each of the tasks that still run
        row = asyncio.run(measure(options.client, options.url, options.tasks[0]))
        print(json.dumps(row))
        return
    print(
        f"{platform.machine()}, {platform.system()}, Python {platform.python_version()}, "
        f"aiohttp {version('aiohttp')}, evolink-async {version('evolink-async')}"
    )
    for count in options.tasks:
        for client in options.clients.split(","):
            row = in_a_process(client, count)
            cells = ", ".join(f"{name} {value:.2f}" for name, value in row.items())
            print(f"{count:>7} {client:<10} {cells}", flush=True)


if __name__ == "__main__":
    main()
