"""What a batch costs beside a bare script: CPU per item and wall, over real HTTP on loopback.

Both clients generate and save the same small pictures, each in a process of its own, in turn,
against an emulator in another process::

    python benchmarks/batch_cost.py [--items 2000] [--rounds 5] [--seconds 0] [--folder DIR]

- ``batch``: this library's `run_batch`, 32 in flight: ledger, checked and flushed files,
  manifest and gallery;
- ``bare``: a script with a semaphore of 32: POST, GET of the task, at once and every 0.25 s
  until it has completed, GET of the picture, write. No ledger, no check, no flush.

``--seconds`` is how long a generation takes. With 0 the answer to the POST is already that of a
completed task; ``bare`` polls it nevertheless. ``--folder`` says on which disk the pictures are
saved; the default is the one with the temporary files. CPU is the client process's own, threads
included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import tempfile
import time
from pathlib import Path

import aiohttp
from side_by_side import Row, client, interleaved, machine, print_ratio, print_table, server

from evolink_async import Session
from evolink_async.batch import run_batch

IN_FLIGHT, CONNECTIONS = 32, 16
INTERVAL = 0.25
SIZE = "768x768"


async def batch_client(url: str, key: str, prompts: list[str], folder: Path) -> None:
    requests = [{"prompt": prompt, "size": SIZE} for prompt in prompts]
    async with Session(
        key, base_url=url, max_in_flight=IN_FLIGHT, max_connections=CONNECTIONS
    ) as session:
        await run_batch(session, requests, folder)


async def bare_client(url: str, key: str, prompts: list[str], folder: Path) -> None:
    in_flight = asyncio.Semaphore(IN_FLIGHT)

    async def one(prompt: str) -> None:
        body = {"model": "wan2.5-text-to-image", "prompt": prompt, "size": SIZE}
        async with in_flight:
            async with http.post("/v1/images/generations", json=body) as response:
                task_id = (await response.json())["id"]
            while True:
                async with http.get(f"/v1/tasks/{task_id}") as response:
                    task = await response.json()
                if task["status"] == "completed":
                    break
                await asyncio.sleep(INTERVAL)
            async with http.get(task["results"][0]) as response:
                (folder / f"{task_id}.png").write_bytes(await response.read())

    async with aiohttp.ClientSession(
        url,
        headers={"Authorization": f"Bearer {key}"},
        connector=aiohttp.TCPConnector(limit=CONNECTIONS),
    ) as http:
        await asyncio.gather(*map(one, prompts))


CLIENTS = {"batch": batch_client, "bare": bare_client}


def run_client(options: argparse.Namespace) -> Row:
    """One client, one run, in this process."""
    prompts = [f"A lake {number}" for number in range(options.items)]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        cpu, wall = time.process_time(), time.perf_counter()
        asyncio.run(CLIENTS[options.client](options.url, options.key, prompts, Path(name)))
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        saved = len(list(Path(name).rglob("*.png")))
    assert saved == options.items, f"{saved} of {options.items} pictures saved"
    return {"CPU ms/item": cpu / options.items * 1000, "wall s": wall}


def measure(name: str, options: argparse.Namespace) -> Row:
    """One client, one run, in a process of its own, against a fresh emulator."""
    seconds = str(options.seconds)
    emulator = ("-m", "evolink_async.emulator", "--port=0", "--pictures=tiny", "--credits=1e9")
    with server(*emulator, "--duration", seconds, seconds) as printed:
        url, key = (line.partition("=")[2] for line in printed)
        command = [__file__, f"--client={name}", f"--url={url}", f"--key={key}"]
        command.append(f"--items={options.items}")
        if options.folder is not None:
            command.append(f"--folder={options.folder}")
        return client(*command)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--items", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.0)
    parser.add_argument("--folder")
    parser.add_argument("--client", choices=CLIENTS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    parser.add_argument("--key", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.items, options.rounds) < 1 or options.seconds < 0:
        parser.error("--items and --rounds must be at least 1, --seconds at least 0")
    if options.client:
        print(json.dumps(run_client(options)))
        return
    rows = interleaved(list(CLIENTS), options.rounds, lambda name: measure(name, options))
    print(
        f"{options.items} pictures of {SIZE} in one colour, {options.seconds:g} s each, "
        f"{IN_FLIGHT} in flight, median of {options.rounds} rounds"
    )
    print(machine())
    print_table(rows)
    print_ratio(rows, "CPU ms/item", "batch", "bare")
    print_ratio(rows, "wall s", "batch", "bare")


if __name__ == "__main__":
    main()
