"""How fast results are saved, beside a bare loop that only writes them, on loopback.

Both clients fetch the same pictures, 16 at once, each in a process of its own, in turn, from
a server in another process::

    python benchmarks/download_speed.py [--pictures 300] [--megabytes 2] [--rounds 5]
                                        [--folder DIR]

- ``session``: this library's `Session.download`: each picture is streamed to a temporary name,
  checked, flushed to disk and renamed;
- ``bare``: aiohttp, each chunk written to the file as it comes. No check, no flush.

``--folder`` says on which disk the pictures are saved; the default is the one with the
temporary files. CPU is the client process's own, threads included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import struct
import tempfile
import time
import zlib
from pathlib import Path
from random import Random
from typing import ClassVar

import aiohttp
from side_by_side import Row, client, interleaved, machine, print_ratio, print_table, server

from evolink_async import GenerationResult, Session

AT_ONCE = 16
CHUNK = 64 * 1024
KEY = "benchmark-key"


# --- the server ------------------------------------------------------------------------------


def picture(size: int) -> bytes:
    """A PNG of about *size* bytes: grey noise, not compressed."""
    side = max(1, round(size**0.5))
    rows = b"".join(b"\0" + Random(row).randbytes(side) for row in range(side))
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(rows, 0)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


class Server(asyncio.Protocol):
    """Answers every GET with the same picture."""

    answer: ClassVar[bytes] = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport
        self.buffer = b""

    def data_received(self, data: bytes) -> None:
        *requests, self.buffer = (self.buffer + data).split(b"\r\n\r\n")
        for _ in requests:
            self.transport.write(self.answer)  # type: ignore[attr-defined]  # a stream's transport


async def serve(size: int) -> None:
    body = picture(size)
    head = "HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: {}\r\n\r\n"
    Server.answer = head.format(len(body)).encode() + body
    listening = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0)
    print(listening.sockets[0].getsockname()[1], len(body), sep="\n", flush=True)
    await listening.serve_forever()


# --- the clients -----------------------------------------------------------------------------


async def session_client(url: str, count: int, folder: Path) -> None:
    async with Session(KEY, base_url=url, max_connections=AT_ONCE) as session:

        async def save(numbers: range) -> None:
            for number in numbers:
                await session.download(result(url, number), folder)

        await asyncio.gather(*(save(range(first, count, AT_ONCE)) for first in range(AT_ONCE)))


def result(url: str, number: int) -> GenerationResult:
    """A completed task with one picture."""
    return GenerationResult.from_json(
        {
            "created": 1757156493,
            "id": f"task-unified-1757156493-{number:08}",
            "model": "wan2.5-text-to-image",
            "object": "image.generation.task",
            "progress": 100,
            "status": "completed",
            "task_info": {"can_cancel": False, "estimated_time": 0},
            "type": "image",
            "usage": {"billing_rule": "per_call", "credits_reserved": 1, "user_group": "default"},
            "results": [f"{url}/{number}.png"],
        }
    )


async def bare_client(url: str, count: int, folder: Path) -> None:
    async def save(numbers: range) -> None:
        for number in numbers:
            async with http.get(f"/{number}.png") as response:
                with (folder / f"{number}.png").open("wb") as file:
                    async for chunk in response.content.iter_chunked(CHUNK):
                        file.write(chunk)

    connector = aiohttp.TCPConnector(limit=AT_ONCE)
    async with aiohttp.ClientSession(url, connector=connector) as http:
        await asyncio.gather(*(save(range(first, count, AT_ONCE)) for first in range(AT_ONCE)))


CLIENTS = {"session": session_client, "bare": bare_client}


def run_client(options: argparse.Namespace) -> Row:
    """One client, one run, in this process."""
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        cpu, wall = time.process_time(), time.perf_counter()
        asyncio.run(CLIENTS[options.client](options.url, options.pictures, Path(name)))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        sizes = [path.stat().st_size for path in Path(name).rglob("*.png")]
    assert sizes == [options.bytes] * options.pictures, "a picture is missing or cut"
    megabytes = sum(sizes) / 1e6
    return {"MB/s": megabytes / wall, "CPU ms/MB": cpu / megabytes * 1000, "wall s": wall}


# --- the driver ------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pictures", type=int, default=300)
    parser.add_argument("--megabytes", type=float, default=2.0, help="of one picture")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--bytes", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.pictures, options.rounds) < 1 or options.megabytes <= 0:
        parser.error("--pictures and --rounds must be at least 1, --megabytes above 0")
    if options.serve:
        asyncio.run(serve(round(options.megabytes * 1e6)))
    elif options.client:
        print(json.dumps(run_client(options)))
    else:
        report(options)


def report(options: argparse.Namespace) -> None:
    with server(__file__, "--serve", f"--megabytes={options.megabytes}") as (port, size):
        command = [__file__, f"--url=http://127.0.0.1:{port}", f"--bytes={size}"]
        command.append(f"--pictures={options.pictures}")
        if options.folder is not None:
            command.append(f"--folder={options.folder}")
        rows = interleaved(
            list(CLIENTS), options.rounds, lambda name: client(*command, f"--client={name}")
        )
    print(
        f"{options.pictures} pictures of {int(size) / 1e6:.2f} MB, {AT_ONCE} at once, "
        f"median of {options.rounds} rounds"
    )
    print(machine())
    print_table(rows)
    print_ratio(rows, "MB/s", "session", "bare")


if __name__ == "__main__":
    main()
