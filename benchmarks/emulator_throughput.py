"""How many requests a second the emulator answers on one core.

Claim: at least 2 000 status reads a second on one core, so that it is not what limits a
load test. The emulator runs in a process of its own, on one core where the system lets us
choose; the load comes from this process over bare keep-alive connections. Because other work
may share the machine, the rate per second of the emulator's own CPU time is printed, too.

    python benchmarks/emulator_throughput.py [--seconds 5] [--connections 16]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import time
from multiprocessing.connection import Connection

from evolink_async.emulator import Emulator

ORDER = {"model": "wan2.5-text-to-image", "prompt": "A peaceful lake"}
CLAIM = 2000


def emulate(pipe: Connection) -> None:
    """Serve until a false message; answer every true one with the CPU seconds used."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

    async def run() -> None:
        loop = asyncio.get_running_loop()
        async with Emulator(pictures="tiny", duration=3600, credits=10**9) as emulator:
            pipe.send((emulator.port, emulator.api_key))
            while await loop.run_in_executor(None, pipe.recv):
                pipe.send(time.process_time())

    asyncio.run(run())


def request(method: str, path: str, key: str, body: object = None) -> bytes:
    """One HTTP request, ready for the wire."""
    data = b"" if body is None else json.dumps(body).encode()
    head = (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    )
    return head.encode() + data


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, data: bytes) -> bytes:
    """Send a request and read its answer."""
    writer.write(data)
    head = await reader.readuntil(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise RuntimeError(head.decode())
    length = head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0]
    return await reader.readexactly(int(length))


async def load(port: int, data: bytes, connections: int, seconds: float) -> float:
    """Answers a second to the same request over so many connections."""
    answered = 0
    end = time.perf_counter() + seconds

    async def one() -> None:
        nonlocal answered
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        while time.perf_counter() < end:
            await ask(reader, writer, data)
            answered += 1
        writer.close()
        await writer.wait_closed()

    start = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(connections)))
    return answered / (time.perf_counter() - start)


async def submitted(port: int, key: str) -> list[str]:
    """The ids of 50 accepted tasks."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    order = request("POST", "/v1/images/generations", key, ORDER)
    names = [json.loads(await ask(reader, writer, order))["id"] for _ in range(50)]
    writer.close()
    await writer.wait_closed()
    return names


def cpu_seconds(pipe: Connection) -> float:
    """CPU seconds the emulator has used."""
    pipe.send(True)
    used: float = pipe.recv()
    return used


def main() -> None:
    """Print a table of rates."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=5.0, help="per row")
    parser.add_argument("--connections", type=int, default=16)
    options = parser.parse_args()
    pipe, other = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=emulate, args=(other,))
    process.start()
    port, key = pipe.recv()
    names = asyncio.run(submitted(port, key))
    rows = {
        "status reads": request("GET", f"/v1/tasks/{names[0]}", key),
        "batch reads of 50": request("POST", "/v1/tasks/batch", key, {"task_ids": names}),
        "submits": request("POST", "/v1/images/generations", key, ORDER),
    }
    print(f"{'':<20}{'per second':>12}{'per CPU second':>16}")
    for name, data in rows.items():
        before = cpu_seconds(pipe)
        start = time.perf_counter()
        rate = asyncio.run(load(port, data, options.connections, options.seconds))
        share = (cpu_seconds(pipe) - before) / (time.perf_counter() - start)
        verdict = f"  claim: {CLAIM}" if name == "status reads" else ""
        print(f"{name:<20}{rate:>12.0f}{rate / share:>16.0f}{verdict}")
    pipe.send(False)
    process.join()


if __name__ == "__main__":
    main()
