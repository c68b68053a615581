"""Callbacks: what they save, what lost ones cost, and how many forged ones are refused.

::

    python benchmarks/callback_flood.py reads [--tasks 1000]
    python benchmarks/callback_flood.py flood [--deliveries 100000]

``reads`` generates many at once, on loopback in real time at ten times the speed: with
every callback delivered, with one in ten lost, with all lost, and by polling alone.

``flood`` sends forged deliveries from processes of their own over raw sockets, as fast as
they are answered, to an aiohttp.web application with running tasks: half of them to paths
with a wrong signature, half to the path of one task, as if its URL had leaked.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import resource
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from aiohttp import web

from evolink_async import PollPolicy, Session, Task
from evolink_async.emulator import Emulator, RealClock, faults
from evolink_async.webhook import CallbackReceiver

PUBLIC = "https://app.example.com/hooks/evolink"
SPEED = 10.0
SENDERS = 4


@asynccontextmanager
async def served(app: web.Application) -> AsyncIterator[int]:
    """*app* on a port of loopback."""
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        yield int(runner.addresses[0][1])
    finally:
        await runner.cleanup()


def application() -> tuple[web.Application, dict[str, CallbackReceiver]]:
    """An application and the place where its receiver is set later."""
    inside: dict[str, CallbackReceiver] = {}

    async def handle(request: web.Request) -> web.Response:
        return await inside["receiver"].aiohttp_handler(request)

    app = web.Application()
    app.router.add_route("*", "/hooks/evolink/{token}", handle)
    return app, inside


# -- reads -------------------------------------------------------------------------------------


async def generate(count: int, *, lost: float | None, in_flight: int) -> tuple[float, ...]:
    """Requests and ids read per task, mean and worst delay in seconds; None: no callbacks."""
    app, inside = application()
    async with (
        served(app) as port,
        Emulator(
            clock=RealClock(SPEED),
            duration=(10, 60),
            pictures="tiny",
            credits=1e9,
            callback_origin=f"http://127.0.0.1:{port}",
        ) as emulator,
        Session(
            emulator.api_key,
            base_url=emulator.base_url,
            max_in_flight=in_flight,
            clock=emulator.clock,
        ) as session,
    ):
        if lost is not None:
            inside["receiver"] = CallbackReceiver(session, public_url=PUBLIC)
            emulator.faults.add(faults.CallbackDropped(rate=lost))
        delays: list[float] = []

        async def noticed(task: Task) -> None:
            await task
            delays.append(emulator.clock.now() - emulator.books.task(task.id).ends_at)

        async def one(number: int) -> None:
            await noticed(await session.submit(f"lake {number}"))

        await asyncio.gather(*map(one, range(count)))
        stats = session.stats
        return stats.reads / count, stats.ids_read / count, sum(delays) / count, max(delays)


async def reads(count: int) -> None:
    print(f"{count} tasks of 10 to 60 s, at {SPEED:g} times the speed")
    print("delay: from a task's end to the return of its await, in the tasks' seconds; its")
    print("mean in real milliseconds last")
    print(f"{'':34} {'reads/task':>10} {'ids/task':>8} {'delay':>7} {'worst':>7} {'real ms':>8}")
    cases = {"polling alone": None, "all callbacks": 0.0, "10 % lost": 0.1, "all lost": 1.0}
    for in_flight in (count, max(1, count // 10)):
        for name, lost in cases.items():
            row = await generate(count, lost=lost, in_flight=in_flight)
            label = f"{name}, {in_flight} in flight"
            real = row[2] / SPEED * 1e3
            figures = f"{row[0]:10.2f} {row[1]:8.2f} {row[2]:7.2f} {row[3]:7.1f} {real:8.1f}"
            print(f"{label:34} {figures}")


# -- flood -------------------------------------------------------------------------------------


def post(path: str, body: bytes) -> bytes:
    head = f"POST {path} HTTP/1.1\r\nHost: app\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def send(port: int, payload: bytes, count: int, status: bytes) -> None:
    """Send *payload* so often over one connection, sixteen at a time before reading answers."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        buffer = b""
        left = count
        while left:
            some = min(16, left)
            connection.sendall(payload * some)
            while buffer.count(b"HTTP/1.1 ") < some or not buffer.endswith(b"\r\n\r\n"):
                data = connection.recv(1 << 16)
                assert data, "the connection was closed"
                buffer += data
            assert buffer.count(b"HTTP/1.1 " + status) == some, buffer[:200]
            buffer = b""
            left -= some


async def flood(count: int) -> None:
    app, inside = application()
    policy = PollPolicy(min_interval=0.25)
    async with (
        served(app) as port,
        Emulator(
            clock=RealClock(),
            duration=3600,
            pictures="tiny",
            credits=1e9,
            callback_origin=f"http://127.0.0.1:{port}",
        ) as emulator,
        Session(
            emulator.api_key, base_url=emulator.base_url, max_in_flight=100, poll=policy
        ) as session,
    ):
        receiver = inside["receiver"] = CallbackReceiver(session, public_url=PUBLIC)
        tasks = [await session.submit(f"lake {k}") for k in range(100)]
        await attack(tasks, port, count // 20)  # warm up
        before, reads_before = receiver.stats, session.stats.reads
        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = time.perf_counter()
        await attack(tasks, port, count)
        took = time.perf_counter() - began
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - resident
        after = receiver.stats
        extra = session.stats.reads - reads_before
        bound = took / policy.min_interval + 1
        print(
            f"{after.received - before.received} forged deliveries in {took:.1f} s: "
            f"{(after.received - before.received) / took:.0f} a second"
        )
        print(
            f"refused {after.forged - before.forged}, to a leaked URL "
            f"{after.nudged - before.nudged}"
        )
        print(f"reads {extra}; the bound, one per leaked task and min_interval: {bound:.0f}")
        print(f"peak resident memory grew by {grown / 1024:.1f} MiB")
        assert all(not task.done() for task in tasks)
        assert extra <= bound + 10, "more reads than the bound and the safety reads explain"
        for task in tasks:
            emulator.complete(task.id)
        await asyncio.gather(*tasks)
        genuine = receiver.stats.nudged - after.nudged
        print(f"then {genuine} genuine callbacks, all 100 tasks completed")


async def attack(tasks: list[Task], port: int, count: int) -> None:
    """*count* deliveries, half of them to a leaked URL, from processes of their own."""
    lie: dict[str, Any] = {"id": tasks[0].id, "status": "completed", "progress": 100}
    body = json.dumps(lie | {"results": ["https://evil.example/x.png"]}).encode()
    assert tasks[0].request is not None
    leaked = (tasks[0].request.callback_url or "").removeprefix("https://app.example.com")
    wrong = leaked[:-8] + "AAAAAAAA"
    each = count // SENDERS
    jobs = [(leaked, b"204"), (wrong, b"404")] * (SENDERS // 2)
    context = multiprocessing.get_context("spawn")
    loop = asyncio.get_running_loop()
    senders = [
        context.Process(target=send, args=(port, post(path, body), each, status))
        for path, status in jobs
    ]
    for sender in senders:
        sender.start()
    for sender in senders:
        await loop.run_in_executor(None, sender.join)
        assert sender.exitcode == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("what", choices=("reads", "flood"))
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--deliveries", type=int, default=100_000)
    options = parser.parse_args()
    asyncio.run(reads(options.tasks) if options.what == "reads" else flood(options.deliveries))


if __name__ == "__main__":
    main()
