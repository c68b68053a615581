"""Kills a batch with SIGKILL at chosen events, restarts it, and compares all books in the end.

    python tests/batch_kill.py --kills 1000 --seed 7

The emulator runs here; the batch runs in a child process that kills itself, or is killed by
the emulator, at the k-th event of one kind:

* ``received``: a POST has arrived; ``answered``: it was processed, its answer is on its way;
* ``load``, ``submitting``, ``submitted``, ``completed``, ``saved``: a commit of that kind,
  right before or right after it;
* ``renamed``: a picture gets its name, right before or right after.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
import secrets
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from aiohttp import web
from attrs import define, field, frozen

from evolink_async import PollPolicy, RetryPolicy, Session
from evolink_async._ledger import LEDGER
from evolink_async.batch import run_batch
from evolink_async.emulator import Emulator, RealClock
from evolink_async.emulator._exchange import Exchange
from evolink_async.emulator.faults import Armed, RequestFault

KINDS = (
    "received",
    "answered",
    "load",
    "submitting",
    "submitted",
    "completed",
    "saved",
    "renamed",
)
ITEMS = 24
CONNECTIONS = 6
SCALE = 50.0
IN_SERVER = frozenset({"received", "answered"})


@frozen(kw_only=True)
class Plan:
    """One run of the batch: where it is killed, if it gets there."""

    out: str
    base_url: str
    prompts: tuple[str, ...]
    resend: bool = False
    kind: str = ""
    nth: int = 0
    after: bool = False


# ---------------------------------------------------------------------------------------------
# The child


@define
class Trigger:
    """Ends this process at the n-th event of one kind."""

    plan: Plan
    seen: int = 0

    def around(self, kind: str, act: Callable[[], Any]) -> Any:
        """Do *act*, an event of this kind, unless, or until, this is the end."""
        fatal = False
        if kind == self.plan.kind:
            self.seen += 1
            fatal = self.seen == self.plan.nth
        if fatal and not self.plan.after:
            os.kill(os.getpid(), signal.SIGKILL)
        result = act()
        if fatal:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def watch(trigger: Trigger) -> None:
    """Make commits and renames of this process events."""

    class Watched(sqlite3.Connection):
        kind = ""

        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            if "INSERT INTO items" in sql:
                self.kind = "load"
            elif found := re.search(r"SET state = '(\w+)'.* WHERE number = \?", sql):
                # One commit may hold several kinds: it counts as the one that is waited for.
                self.kind = found[1] if self.kind != trigger.plan.kind else self.kind
            if sql != "COMMIT":
                return super().execute(sql, *values)
            kind, self.kind = self.kind, ""
            cursor: sqlite3.Cursor = trigger.around(kind, lambda: super(Watched, self).execute(sql))
            return cursor

    connect, replace = sqlite3.connect, os.replace

    def connect_watched(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, factory=Watched, **options)
        return connection

    def replace_watched(source: Any, target: Any) -> None:
        kind = "renamed" if str(target).endswith(".png") else ""
        trigger.around(kind, lambda: replace(source, target))

    sqlite3.connect = connect_watched  # type: ignore[assignment]  # as sqlite3 has it
    os.replace = replace_watched  # type: ignore[assignment]  # as os has it


async def run(plan: Plan) -> None:
    """One run of the batch, on the emulator's time scale."""
    async with Session(
        "emulator-key",
        base_url=plan.base_url,
        max_connections=CONNECTIONS,
        clock=RealClock(SCALE),
        poll=PollPolicy(deadline=600),
        retry=RetryPolicy(attempts=5),
    ) as session:
        report = await run_batch(
            session, plan.prompts, plan.out, gallery=False, resend_uncertain=plan.resend
        )
        if report.stop is not None:
            raise RuntimeError(report.stop.message)


def serve_children() -> None:
    """Fork a child for each plan that is read: what takes long, the imports, is done once."""
    for line in sys.stdin:
        plan = Plan(**json.loads(line))
        child = os.fork()
        if not child:
            code = 1
            try:
                if plan.kind and plan.kind not in IN_SERVER:
                    watch(Trigger(plan))
                asyncio.run(run(plan))
                code = 0
            finally:
                sys.stderr.flush()
                os._exit(code)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


# ---------------------------------------------------------------------------------------------
# The harness


@frozen(eq=False)
class Kill(RequestFault):
    """Kills the child when a submit has arrived, or its answer is on its way."""

    kill: Callable[[], None] = field(kw_only=True)
    answered: bool = field(kw_only=True)

    async def before(self, _exchange: Exchange, _armed: Armed) -> web.StreamResponse | None:
        if not self.answered:
            self.kill()
        return None

    async def after(self, _exchange: Exchange, response: web.Response) -> web.StreamResponse:
        if self.answered:
            asyncio.get_running_loop().call_later(0.001, self.kill)
        return response


@define
class Harness:
    """Kills batches and looks at what is left."""

    kills: int
    seed: int
    folder: Path
    draw: random.Random = field(init=False)
    zygote: subprocess.Popen[str] = field(init=False)
    hits: Counter[str] = field(factory=Counter, init=False)
    uncertain: int = field(default=0, init=False)
    batches: int = field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def run(self) -> None:
        """Kill as often as asked, each kind in turn.

        Raises:
            AssertionError: Something was lost, or paid twice.
        """
        with self._children():
            while sum(self.hits.values()) < self.kills:
                self.batches += 1
                with Emulator(
                    pictures="tiny",
                    time_scale=SCALE,
                    duration=(1, 3),
                    estimate=1,
                    seed=self.seed + self.batches,
                ) as emulator:
                    self._batch(emulator, self.folder / f"batch{self.batches}")

    @contextlib.contextmanager
    def _children(self) -> Iterator[None]:
        self.zygote = subprocess.Popen(  # noqa: S603 - this very file
            [sys.executable, __file__, "--children"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        try:
            yield
        finally:
            self.zygote.communicate()

    def _batch(self, emulator: Emulator, out: Path) -> None:
        prompts = tuple(f"batch {self.batches} prompt {k // 2}" for k in range(ITEMS))
        plan: dict[str, Any] = {
            "out": str(out),
            "base_url": emulator.base_url,
            "prompts": prompts,
        }
        while sum(self.hits.values()) < self.kills:
            least = min(self.hits[kind] for kind in KINDS)
            kind = self.draw.choice([each for each in KINDS if self.hits[each] == least])
            nth = 1 if kind == "load" else self.draw.randint(1, 4)
            code = self._child(
                emulator,
                Plan(**plan, kind=kind, nth=nth, after=self.draw.random() < 0.5),
            )
            if code == 0:
                break  # all is done: it never got there
            assert code == -signal.SIGKILL, code
            self.hits[kind] += 1
            self._look_at_the_wreck(out)
        assert self._child(emulator, Plan(**plan)) == 0
        self._check(emulator, out, prompts)
        assert self._child(emulator, Plan(**plan, resend=True)) == 0
        self._check_all_paid_once(emulator, out, prompts)

    def _child(self, emulator: Emulator, plan: Plan) -> int:
        assert self.zygote.stdin is not None
        assert self.zygote.stdout is not None
        child: list[int] = []
        emulator.faults.clear()
        if plan.kind in IN_SERVER:
            emulator.faults.add(
                Kill(
                    route="submit",
                    nth=plan.nth,
                    answered=plan.kind == "answered",
                    kill=lambda: os.kill(child[0], signal.SIGKILL),
                )
            )
        self.zygote.stdin.write(json.dumps({f: getattr(plan, f) for f in FIELDS}) + "\n")
        self.zygote.stdin.flush()
        child.append(int(self.zygote.stdout.readline()))
        return int(self.zygote.stdout.readline())

    def _look_at_the_wreck(self, out: Path) -> None:
        """No more is in doubt than may have been in the air, and each of it has its key."""
        rows = ledger(out, "SELECT idempotency_key FROM items WHERE state = 'submitting'")
        assert len(rows) <= CONNECTIONS
        assert all(key for (key,) in rows)
        self.uncertain += len(rows)

    def _check(self, emulator: Emulator, out: Path, prompts: tuple[str, ...]) -> None:
        """Every item is saved or uncertain, and every accepted task belongs to one."""
        items = ledger(out, "SELECT state, task_id, idempotency_key FROM items")
        assert len(items) == len(prompts)
        left = ledger(out, "SELECT * FROM items WHERE state NOT IN ('saved', 'uncertain')")
        assert not left, left
        keys = [record.idempotency_key for record in emulator.books.submits()]
        assert len(keys) == len(set(keys)) <= len(prompts)
        known = {task_id for state, task_id, _ in items if state == "saved"}
        doubtful = {key for state, _, key in items if state == "uncertain"}
        for task in emulator.books.tasks():
            assert task.id in known or task.idempotency_key in doubtful, task
        self._check_files(out)

    def _check_files(self, out: Path) -> None:
        """What is on disk is what the ledger says, and nothing else is."""
        files = dict(ledger(out, "SELECT name, sha256 FROM files"))
        found = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.png")
        }
        assert found == files
        assert not list(out.glob(".*.part"))

    def _check_all_paid_once(self, emulator: Emulator, out: Path, prompts: tuple[str, ...]) -> None:
        assert ledger(out, "SELECT DISTINCT state FROM items") == [("saved",)]
        bought = Counter(task.prompt for task in emulator.books.tasks())
        assert bought == Counter(prompts)
        assert emulator.books.charged == len(prompts)
        self._check_files(out)


FIELDS = ("out", "base_url", "prompts", "resend", "kind", "nth", "after")


def ledger(out: Path, sql: str) -> list[tuple[Any, ...]]:
    """What a batch's ledger says; nothing if there is none yet."""
    if not (out / LEDGER).exists():
        return []
    with contextlib.closing(sqlite3.connect(out / LEDGER)) as connection:
        try:
            return connection.execute(sql).fetchall()
        except sqlite3.OperationalError:  # killed before its tables were made
            return []


def main() -> int:
    """Kill, compare, print what was done."""
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--kills", type=int, default=50)
    options.add_argument("--seed", type=int, default=None)
    options.add_argument("--children", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.children:
        serve_children()
        return 0
    seed = secrets.randbelow(10**6) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)  # noqa: T201 - to repeat it with
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        harness = Harness(given.kills, seed, Path(folder))
        harness.run()
    print(  # noqa: T201 - the result
        f"{sum(harness.hits.values())} kills in {harness.batches} batches of {ITEMS} items, "
        f"{time.monotonic() - started:.0f} s: {dict(harness.hits)}; at most {CONNECTIONS} items "
        f"were uncertain after a kill, {harness.uncertain} in all; no item lost, none paid twice"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
