"""Kills the API under a running batch, and compares all books in the end.

    python tests/batch_outage.py --kills 50 --seed 7

The API is an emulator in a process of its own. It kills itself with SIGKILL when the k-th
submit has arrived, was accepted, or is being answered, and is started again on the same port,
knowing nothing of what it had accepted. What it accepts it writes down first, in a file that
outlives it.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aiohttp import web
from attrs import define, field, frozen
from batch_kill import ITEMS, SCALE, STOPPED, Plan, check_files, children, ledger, start

from evolink_async.emulator import Emulator
from evolink_async.emulator._exchange import Exchange
from evolink_async.emulator._server import serve
from evolink_async.emulator.faults import Armed, RequestFault

RUNS = 8
"""Runs of a batch after which all that is left must be named."""
LOST = {"task_not_found", "results_expired"}
"""Codes of items that an API which has lost its memory does not know any more."""


# ---------------------------------------------------------------------------------------------
# The API


@frozen(kw_only=True)
class Life:
    """From a start of the API to its end."""

    port: int
    journal: str
    seed: int
    nth: int | None = None
    when: str = "received"


@frozen(eq=False)
class Journal(RequestFault):
    """Writes down each accepted submit before it is answered."""

    path: str = field(kw_only=True)

    async def after(self, exchange: Exchange, response: web.Response) -> web.StreamResponse:
        if response.status == web.HTTPOk.status_code and not exchange.replayed:
            assert isinstance(response.body, bytes)
            record = {
                "id": json.loads(response.body)["id"],
                "prompt": exchange.data["prompt"],
                "key": exchange.request.headers["Idempotency-Key"],
            }
            self._write(json.dumps(record) + "\n")
        return response

    def _write(self, line: str) -> None:
        with Path(self.path).open("a") as file:
            file.write(line)


@frozen(eq=False)
class Death(RequestFault):
    """Kills this process."""

    when: str = field(kw_only=True)

    async def before(self, _exchange: Exchange, _armed: Armed) -> web.StreamResponse | None:
        if self.when == "received":
            die()
        return None

    async def after(self, _exchange: Exchange, response: web.Response) -> web.StreamResponse:
        if self.when == "accepted":
            die()
        asyncio.get_running_loop().call_later(0.001, die)
        return response


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


async def live(life: Life) -> None:
    """Serve until killed."""
    emulator = Emulator(
        port=life.port,
        pictures="tiny",
        time_scale=SCALE,
        duration=(1, 3),
        estimate=1,
        seed=life.seed,
    )
    emulator.faults.add(Journal(route="submit", path=life.journal))
    if life.nth is not None:
        emulator.faults.add(Death(route="submit", nth=life.nth, when=life.when))
    await serve(emulator)


@contextlib.contextmanager
def api(lives: list[Life]) -> Iterator[list[int]]:
    """An API that lives these *lives*, one after the other; yields the exit codes so far."""
    codes: list[int] = []
    process: list[subprocess.Popen[str]] = []
    ending = threading.Event()

    def run() -> None:
        for life in lives:
            if ending.is_set():
                return
            process[:] = [born(life)]
            codes.append(process[0].wait())

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield codes
    finally:
        ending.set()
        while thread.is_alive():
            for each in process:
                each.kill()
            thread.join(0.05)


def born(life: Life) -> subprocess.Popen[str]:
    """A process that serves."""
    given = {name: getattr(life, name) for name in ("port", "journal", "seed", "nth", "when")}
    # PYTHONSAFEPATH would keep this file from finding its neighbour.
    environment = {name: word for name, word in os.environ.items() if name != "PYTHONSAFEPATH"}
    return subprocess.Popen(  # noqa: S603 - this very file
        [sys.executable, __file__, "--live", json.dumps(given)],
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# ---------------------------------------------------------------------------------------------
# The harness


@define
class Outages:
    """Kills APIs under batches and checks what is left."""

    kills: int
    seed: int
    folder: Path
    killed: int = field(default=0, init=False)
    batches: int = field(default=0, init=False)
    lost: int = field(default=0, init=False)
    uncertain: int = field(default=0, init=False)

    def run(self) -> None:
        """Kill as often as asked.

        Raises:
            AssertionError: Something was lost without a word, or bought twice.
        """
        draw = random.Random(self.seed)
        with children() as zygote:
            while self.killed < self.kills:
                self.batches += 1
                out = self.folder / f"batch{self.batches}"
                port = free_port()
                lives = [
                    Life(
                        port=port,
                        journal=f"{out}.journal",
                        seed=draw.randrange(10**6),
                        nth=nth,
                        when=draw.choice(("received", "accepted", "answered")),
                    )
                    for nth in (draw.randint(1, 12), draw.randint(1, 6), None)
                ]
                with api(lives) as codes:
                    self._batch(zygote, out, port)
                    self.killed += codes.count(-signal.SIGKILL)

    def _batch(self, zygote: subprocess.Popen[str], out: Path, port: int) -> None:
        prompts = tuple(f"batch {self.batches} prompt {k // 2}" for k in range(ITEMS))
        plan: dict[str, Any] = {
            "out": str(out),
            "base_url": f"http://127.0.0.1:{port}",
            "prompts": prompts,
        }
        for _ in range(RUNS):
            assert start(zygote, Plan(**plan)) in {0, STOPPED}
            states = dict(ledger(out, "SELECT state, count(*) FROM items GROUP BY state"))
            if set(states) <= {"saved", "uncertain", "failed"}:
                break
        offered = self._check(out, prompts)
        for _ in range(RUNS):
            start(zygote, Plan(**plan, resend=True, resubmit=True))
            if ledger(out, "SELECT DISTINCT state FROM items") == [("saved",)]:
                break
        self._check_the_rest(out, prompts, offered)

    def _check(self, out: Path, prompts: tuple[str, ...]) -> set[str]:
        """Each item is saved, or named with its task or key; returns these."""
        items = ledger(out, "SELECT state, code, task_id, idempotency_key FROM items")
        assert len(items) == len(prompts)
        journal = accepted(out)
        keys = Counter(record["key"] for record in journal)
        assert set(keys.values()) <= {1}, keys
        saved = {task for state, _, task, _ in items if state == "saved"}
        offered: set[str] = set()
        for state, code, task, key in items:
            if state == "failed":
                assert code in LOST, code
                offered.add(task)
                self.lost += 1
            elif state == "uncertain":
                offered.add(key)
                self.uncertain += 1
            else:
                assert state == "saved", state
        for record in journal:
            assert record["id"] in saved or {record["id"], record["key"]} & offered, record
        check_files(out)
        return offered

    def _check_the_rest(self, out: Path, prompts: tuple[str, ...], offered: set[str]) -> None:
        """All is saved, and nothing was bought again that was not offered for it."""
        items = ledger(out, "SELECT state, task_id FROM items")
        assert {state for state, _ in items} == {"saved"}, items
        final = {task for _, task in items}
        assert len(final) == len(prompts)
        for record in accepted(out):
            assert record["id"] in final or {record["id"], record["key"]} & offered, record
        check_files(out)


def accepted(out: Path) -> list[dict[str, str]]:
    """What the API has ever accepted."""
    journal = Path(f"{out}.journal")
    return [json.loads(line) for line in journal.read_text().splitlines()]


def main() -> int:
    """Kill, compare, print what was done."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=10)
    options.add_argument("--seed", type=int, default=None)
    options.add_argument("--live", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.live:
        asyncio.run(live(Life(**json.loads(given.live))))
        return 0
    seed = secrets.randbelow(10**6) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)  # noqa: T201 - to repeat it with
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        outages = Outages(given.kills, seed, Path(folder))
        outages.run()
    print(  # noqa: T201 - the result
        f"the API was killed {outages.killed} times under {outages.batches} batches of {ITEMS} "
        f"items, {time.monotonic() - started:.0f} s: {outages.lost} items lost with it, "
        f"{outages.uncertain} uncertain, each named; nothing else was bought twice"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
