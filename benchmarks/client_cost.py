"""What watching costs a client: requests, delay and CPU per task, over real HTTP on loopback.

Four clients run the same durations, each in a process of its own, in turn::

    python benchmarks/client_cost.py [--tasks 2000] [--rounds 5] [--speed 1] [--price 0.5]
                                     [--clients session,bare,coroutine,tenacity] [--url URL]

- ``session``: this library, through `Session.submit` and ``await task``;
- ``bare``: one aiohttp coroutine that polls everything every second, 50 ids a request;
- ``coroutine``: a coroutine per task that polls its task every second;
- ``tenacity``: a coroutine per task with tenacity's exponential backoff, 1 s to 10 s.

All are submitted at once; durations are lognormal, median 25 s, sigma 0.4. ``--speed 5``
runs everything five times as fast (durations, intervals, price) and reports in unscaled
seconds. The server is a bare-bones one in another process. ``--url`` takes any other, which then
decides the durations; when its tasks end cannot be seen, so no delay is reported.
CPU is the client process's own, from the first submit to the last result.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, ClassVar
from urllib.request import urlopen

import aiohttp
from tenacity import AsyncRetrying, retry_if_result, wait_exponential

from evolink_async import PollPolicy, Session

MEDIAN, SIGMA = 25.0, 0.4
INTERVAL, BATCH, CONNECTIONS = 1.0, 50, 16
KEY = "benchmark-key"
Learned = dict[str, float]


# --- the server ------------------------------------------------------------------------------


class Server(asyncio.Protocol):
    """Just enough of the API: submit, read, batch read; and ``/ends``, which the report needs."""

    ends: ClassVar[dict[str, float]] = {}
    counts: ClassVar[dict[str, int]] = {"submits": 0, "reads": 0, "ids": 0}
    estimate: ClassVar[float] = MEDIAN

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (cut := self.buffer.find(b"\r\n\r\n")) >= 0:
            head = self.buffer[:cut].decode("latin-1")
            length = next(
                (
                    int(line.split(":")[1])
                    for line in head.lower().split("\r\n")
                    if line.startswith("content-length:")
                ),
                0,
            )
            if len(self.buffer) < cut + 4 + length:
                return
            body = self.buffer[cut + 4 : cut + 4 + length]
            self.buffer = self.buffer[cut + 4 + length :]
            method, path, _ = head.split(" ", 2)
            answer = json.dumps(self.answer(method, path, body)).encode()
            self.transport.write(  # type: ignore[attr-defined]  # a stream's transport
                b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
                b"Content-Length: %d\r\n\r\n" % len(answer) + answer
            )

    def answer(self, method: str, path: str, body: bytes) -> Any:
        counts = self.counts
        if path == "/ends":
            return {"ends": self.ends, **counts}
        if path == "/v1/tasks/batch":
            ids = json.loads(body)["task_ids"]
            counts["reads"] += 1
            counts["ids"] += len(ids)
            return {"data": [self.task(task_id) for task_id in ids]}
        if method == "POST":
            counts["submits"] += 1
            seconds = float(json.loads(body)["prompt"].split()[-1])
            task_id = f"task-unified-1757156493-{counts['submits']:08}"
            self.ends[task_id] = time.time() + seconds
            return self.task(task_id)
        counts["reads"] += 1
        counts["ids"] += 1
        return self.task(path.rsplit("/", 1)[1])

    def task(self, task_id: str) -> dict[str, Any]:
        done = time.time() >= self.ends[task_id]
        task: dict[str, Any] = {
            "created": 1757156493,
            "id": task_id,
            "model": "wan2.5-text-to-image",
            "object": "image.generation.task",
            "progress": 100 if done else 40,
            "status": "completed" if done else "processing",
            "task_info": {"can_cancel": True, "estimated_time": self.estimate},
            "type": "image",
            "usage": {"billing_rule": "per_call", "credits_reserved": 1, "user_group": "default"},
        }
        if done:
            task["results"] = [f"https://files.example.com/{task_id}.png"]
        return task


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


# --- the clients -----------------------------------------------------------------------------

Client = Callable[[str, list[float], argparse.Namespace], Coroutine[Any, Any, Learned]]


async def session_client(url: str, durations: list[float], options: argparse.Namespace) -> Learned:
    speed = options.speed
    poll = PollPolicy(
        price=options.price / speed,
        min_interval=0.25 / speed,
        max_interval=60 / speed,
        deadline=3600 / speed,
    )
    learned: Learned = {}

    async def one(seconds: float) -> None:
        task = await session.submit(f"A lake {seconds}")
        await task
        learned[task.id] = time.time()

    async with Session(
        options.key, base_url=url, max_in_flight=len(durations), poll=poll
    ) as session:
        options.started = time.process_time()
        await asyncio.gather(*map(one, durations))
    return learned


async def bare_client(url: str, durations: list[float], options: argparse.Namespace) -> Learned:
    waiting: dict[str, asyncio.Future[None]] = {}
    learned: Learned = {}
    loop = asyncio.get_running_loop()
    permits = asyncio.Semaphore(CONNECTIONS)

    async def one(seconds: float) -> None:
        body = {"model": "wan2.5-text-to-image", "prompt": f"A lake {seconds}"}
        async with permits, http.post("/v1/images/generations", json=body) as response:
            task_id = (await response.json())["id"]
        future = waiting[task_id] = loop.create_future()
        await future
        learned[task_id] = time.time()

    async def read_all() -> None:
        while True:
            await asyncio.sleep(INTERVAL / options.speed)
            ids = list(waiting)
            batches = [ids[k : k + BATCH] for k in range(0, len(ids), BATCH)]
            await asyncio.gather(*map(read, batches))

    async def read(ids: list[str]) -> None:
        async with permits, http.post("/v1/tasks/batch", json={"task_ids": ids}) as response:
            tasks = (await response.json())["data"]
        for task in tasks:
            if task["status"] in {"completed", "failed", "cancelled"}:
                waiting.pop(task["id"]).set_result(None)

    async with open_http(url, options) as http:
        options.started = time.process_time()
        reader = asyncio.create_task(read_all())
        await asyncio.gather(*map(one, durations))
        reader.cancel()
    return learned


async def coroutine_client(
    url: str, durations: list[float], options: argparse.Namespace
) -> Learned:
    learned: Learned = {}

    async def one(seconds: float) -> None:
        body = {"model": "wan2.5-text-to-image", "prompt": f"A lake {seconds}"}
        async with http.post("/v1/images/generations", json=body) as response:
            task_id = (await response.json())["id"]
        while True:
            await asyncio.sleep(INTERVAL / options.speed)
            async with http.get(f"/v1/tasks/{task_id}") as response:
                if (await response.json())["status"] in {"completed", "failed", "cancelled"}:
                    break
        learned[task_id] = time.time()

    async with open_http(url, options) as http:
        options.started = time.process_time()
        await asyncio.gather(*map(one, durations))
    return learned


async def tenacity_client(url: str, durations: list[float], options: argparse.Namespace) -> Learned:
    learned: Learned = {}

    async def status(task_id: str) -> str:
        async with http.get(f"/v1/tasks/{task_id}") as response:
            return str((await response.json())["status"])

    async def one(seconds: float) -> None:
        body = {"model": "wan2.5-text-to-image", "prompt": f"A lake {seconds}"}
        async with http.post("/v1/images/generations", json=body) as response:
            task_id = (await response.json())["id"]
        polling = AsyncRetrying(
            retry=retry_if_result(lambda word: word not in {"completed", "failed", "cancelled"}),
            wait=wait_exponential(multiplier=1 / options.speed, max=10 / options.speed),
        )
        await polling(status, task_id)
        learned[task_id] = time.time()

    async with open_http(url, options) as http:
        options.started = time.process_time()
        await asyncio.gather(*map(one, durations))
    return learned


def open_http(url: str, options: argparse.Namespace) -> Any:
    return aiohttp.ClientSession(
        url,
        headers={"Authorization": f"Bearer {options.key}"},
        connector=aiohttp.TCPConnector(limit=CONNECTIONS),
        timeout=aiohttp.ClientTimeout(total=None),
    )


CLIENTS: dict[str, Client] = {
    "session": session_client,
    "bare": bare_client,
    "coroutine": coroutine_client,
    "tenacity": tenacity_client,
}


def run_client(options: argparse.Namespace) -> None:
    """One client, one run, in this process: prints when it learned of which end."""
    rng = random.Random(options.seed)
    durations = [
        MEDIAN * math.exp(SIGMA * rng.gauss(0, 1)) / options.speed for _ in range(options.tasks)
    ]
    learned = asyncio.run(CLIENTS[options.client](options.url, durations, options))
    print(json.dumps({"cpu": time.process_time() - options.started, "learned": learned}))


# --- the driver ------------------------------------------------------------------------------


def measure(client: str, seed: int, options: argparse.Namespace) -> dict[str, float]:
    """Requests per task, mean and 95th percentile delay in seconds, CPU ms per task."""
    url, server = options.url, None
    if url is None:
        server = subprocess.Popen(
            [sys.executable, __file__, "--serve", f"--speed={options.speed}"],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.stdout is not None
        url = f"http://127.0.0.1:{server.stdout.readline().strip()}"
    try:
        command = [sys.executable, __file__, "--client", client, "--url", url]
        command += [f"--{name}={getattr(options, name)}" for name in ("tasks", "speed", "price")]
        command += ["--key", options.key, f"--seed={seed}"]
        answer = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        row = {"CPU ms/task": answer["cpu"] / options.tasks * 1000}
        if server is not None:
            with urlopen(f"{url}/ends") as ends:
                books = json.load(ends)
            delays = sorted(
                (answer["learned"][task_id] - end) * options.speed
                for task_id, end in books["ends"].items()
            )
            row["requests/task"] = (books["submits"] + books["reads"]) / options.tasks
            row["ids read/task"] = books["ids"] / options.tasks
            row["delay s"] = statistics.mean(delays)
            row["delay p95 s"] = delays[int(0.95 * len(delays))]
        return row
    finally:
        if server is not None:
            server.terminate()
            server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--speed", type=float, default=1.0)
    parser.add_argument("--price", type=float, default=0.5)
    parser.add_argument("--clients", default=",".join(CLIENTS))
    parser.add_argument("--url")
    parser.add_argument("--key", default=os.environ.get("EVOLINK_API_KEY", KEY))
    parser.add_argument("--seed", type=int, default=1, help=argparse.SUPPRESS)
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.tasks, options.rounds, options.speed, options.price) <= 0:
        parser.error("--tasks, --rounds, --speed and --price must be above 0")
    Server.estimate = MEDIAN / options.speed
    if options.serve:
        asyncio.run(serve())
    elif options.client:
        run_client(options)
    else:
        report(options)


def report(options: argparse.Namespace) -> None:
    names = options.clients.split(",")
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for seed in range(options.rounds):
        for name in names:
            rounds[name].append(measure(name, seed, options))
            print(f"round {seed + 1} {name}: {rounds[name][-1]}", file=sys.stderr)
    print(
        f"{options.tasks} tasks at once, lognormal({MEDIAN:g}, {SIGMA:g}), "
        f"price {options.price:g}, speed {options.speed:g}, median of {options.rounds} rounds"
    )
    print(
        f"{platform.machine()} {os.cpu_count()} cores, {platform.system()}, "
        f"Python {platform.python_version()}, aiohttp {version('aiohttp')}, "
        f"evolink-async {version('evolink-async')} "
        + ("with msgspec" if find_spec("msgspec") else "without msgspec")
    )
    columns = list(rounds[names[0]][0])
    print("client     " + "".join(f"{column:>15}" for column in columns))
    for name in names:
        cells = [statistics.median(row[c] for row in rounds[name]) for c in columns]
        print(f"{name:<11}" + "".join(f"{cell:>15.3f}" for cell in cells))
    if "session" in names and "bare" in names:
        pairs = zip(rounds["session"], rounds["bare"], strict=True)
        ratios = sorted(a["CPU ms/task"] / b["CPU ms/task"] for a, b in pairs)
        print(
            f"session / bare CPU, round by round: median {statistics.median(ratios):.2f} "
            f"({ratios[0]:.2f} to {ratios[-1]:.2f})"
        )


if __name__ == "__main__":
    main()
