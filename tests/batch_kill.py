"""Kills batches, or fills their disk, at chosen events, and compares all books in the end.

    python tests/batch_kill.py --kills 1000 --full-disks 200 --seed 7

The emulator runs here; the batch runs in a child process that kills itself, or is killed by
the emulator, at the k-th event of one kind:

* ``received``: a POST has arrived; ``answered``: it was processed, its answer is on its way;
* ``load``, ``submitting``, ``submitted``, ``completed``, ``saved``: a commit of that kind,
  right before or right after it;
* ``renamed``: a picture gets its name, right before or right after; ``written``: manifest or
  gallery do.

A disk fills up at the k-th write of one kind, and stays full until the process ends: that of a
``picture``, of the ``ledger`` (a commit), of ``manifest`` or ``gallery``. Either the ledger's
reserve is room enough for it, or there is none for it, either.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import hashlib
import io
import json
import logging
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
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from aiohttp import web
from attrs import define, field, frozen

from evolink_async import PollPolicy, RetryPolicy, Session
from evolink_async.batch import run_batch
from evolink_async.batch._ledger import LEDGER
from evolink_async.emulator import Emulator, RealClock
from evolink_async.emulator._exchange import Exchange
from evolink_async.emulator.faults import Armed, RequestFault
from evolink_async.errors import LedgerError

KINDS = (
    "received",
    "answered",
    "load",
    "submitting",
    "submitted",
    "completed",
    "saved",
    "renamed",
    "written",
)
DISK_KINDS = ("picture", "ledger", "manifest", "gallery")
MOST = {"load": 1, "written": 2, "ledger": 60, "manifest": 1, "gallery": 1}
"""The last event of a kind at which something happens; 4 if nothing is said here."""
STOPPED = 3
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
    resubmit: bool = False
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
        kind = {".png": "renamed", ".html": "written", ".jsonl": "written"}.get(
            Path(target).suffix, ""
        )
        trigger.around(kind, lambda: replace(source, target))

    sqlite3.connect = connect_watched  # type: ignore[assignment]  # as sqlite3 has it
    os.replace = replace_watched  # type: ignore[assignment]  # as os has it


@define
class Disk:
    """Is full from the n-th write of one kind on."""

    plan: Plan
    seen: int = 0
    full: bool = False

    def count(self, kind: str) -> None:
        """One more write of that kind is about to happen."""
        if kind == self.plan.kind:
            self.seen += 1
            self.full = self.full or self.seen == self.plan.nth

    def write(self, kind: str) -> None:
        """Let a write of that kind pass, or not."""
        self.count(kind)
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def commit(self) -> None:
        """Let a commit pass, or not."""
        self.count("ledger")
        reserved = Path(self.plan.out, "ledger.reserve").exists()
        if self.full and (reserved or self.plan.after):
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorname = "SQLITE_FULL"
            raise error


def fill(disk: Disk) -> None:
    """Have this process write pictures, ledger, manifest and gallery to *disk*."""

    class Filled(sqlite3.Connection):
        changed = False

        def execute(self, sql: str, *values: Any) -> sqlite3.Cursor:
            self.changed = self.changed or " WHERE number = ?" in sql
            if sql == "COMMIT" and (self.changed or disk.full):
                self.changed = False
                disk.commit()
            return super().execute(sql, *values)

    class File(io.FileIO):
        kind = ""

        def write(self, data: Any) -> int:
            disk.write(self.kind)
            return super().write(data)

    connect, open_ = sqlite3.connect, io.open

    def connect_filled(*args: Any, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(*args, factory=Filled, **options)
        return connection

    def open_filled(name: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
        if mode not in {"xb", "r+b"}:
            return open_(name, mode, *args, **options)
        file = File(name, mode)
        file.kind = "picture" if mode == "r+b" else Path(name).name.split(".")[1]
        return io.BufferedWriter(file) if mode == "xb" else io.BufferedRandom(file)

    sqlite3.connect = connect_filled  # type: ignore[assignment]  # as sqlite3 has it
    io.open = open_filled  # type: ignore[assignment]  # as io has it


async def run(plan: Plan) -> int:
    """One run of the batch, on the emulator's time scale; 3 if the API or the disk stopped it."""
    async with Session(
        "emulator-key",
        base_url=plan.base_url,
        max_connections=CONNECTIONS,
        clock=RealClock(SCALE),
        poll=PollPolicy(deadline=600),
        retry=RetryPolicy(attempts=5),
    ) as session:
        try:
            report = await run_batch(
                session,
                plan.prompts,
                plan.out,
                resend_uncertain=plan.resend,
                resubmit_expired=plan.resubmit,
                grace=1,
            )
        except LedgerError:
            return STOPPED
        return STOPPED if report.exit_code == STOPPED else 0


def serve_children() -> None:
    """Fork a child for each plan that is read: what takes long, the imports, is done once."""
    logging.getLogger("evolink_async").addHandler(logging.NullHandler())
    for line in sys.stdin:
        plan = Plan(**json.loads(line))
        child = os.fork()
        if not child:
            code = 1
            try:
                if plan.kind in DISK_KINDS:
                    fill(Disk(plan))
                elif plan.kind and plan.kind not in IN_SERVER:
                    watch(Trigger(plan))
                code = asyncio.run(run(plan))
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
    """Kills batches, or fills their disk, and checks what is left."""

    kills: int
    seed: int
    folder: Path
    kinds: tuple[str, ...] = KINDS
    draw: random.Random = field(init=False)
    zygote: subprocess.Popen[str] = field(init=False)
    hits: Counter[str] = field(factory=Counter, init=False)
    uncertain: int = field(default=0, init=False)
    batches: int = field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self.draw = random.Random(self.seed)

    def run(self) -> None:
        """Kill, or fill the disk, as often as asked, each kind in turn.

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
        with children() as self.zygote:
            yield

    def _batch(self, emulator: Emulator, out: Path) -> None:
        prompts = tuple(f"batch {self.batches} prompt {k // 2}" for k in range(ITEMS))
        plan: dict[str, Any] = {
            "out": str(out),
            "base_url": emulator.base_url,
            "prompts": prompts,
        }
        while sum(self.hits.values()) < self.kills:
            least = min(self.hits[kind] for kind in self.kinds)
            kind = self.draw.choice([each for each in self.kinds if self.hits[each] == least])
            nth = self.draw.randint(1, MOST.get(kind, 4))
            code = self._child(
                emulator,
                Plan(**plan, kind=kind, nth=nth, after=self.draw.random() < 0.5),
            )
            if code == 0:
                break  # all is done: it never got there
            assert code == (STOPPED if kind in DISK_KINDS else -signal.SIGKILL), code
            self.hits[kind] += 1
            self._check_after_a_kill(out)
        assert self._child(emulator, Plan(**plan)) == 0
        self._check(emulator, out, prompts)
        assert self._child(emulator, Plan(**plan, resend=True)) == 0
        self._check_all_paid_once(emulator, out, prompts)

    def _child(self, emulator: Emulator, plan: Plan) -> int:
        child: Future[int] = Future()  # a submit may be here before its number is
        emulator.faults.clear()
        if plan.kind in IN_SERVER:
            emulator.faults.add(
                Kill(
                    route="submit",
                    nth=plan.nth,
                    answered=plan.kind == "answered",
                    kill=lambda: os.kill(child.result(), signal.SIGKILL),
                )
            )
        return start(self.zygote, plan, child.set_result)

    def _check_after_a_kill(self, out: Path) -> None:
        """No more is uncertain than may have been in the air, and each of it has its key."""
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
        uncertain = {key for state, _, key in items if state == "uncertain"}
        for task in emulator.books.tasks():
            assert task.id in known or task.idempotency_key in uncertain, task
        check_files(out)

    def _check_all_paid_once(self, emulator: Emulator, out: Path, prompts: tuple[str, ...]) -> None:
        assert ledger(out, "SELECT DISTINCT state FROM items") == [("saved",)]
        bought = Counter(task.prompt for task in emulator.books.tasks())
        assert bought == Counter(prompts)
        assert emulator.books.charged == len(prompts)
        check_files(out)


FIELDS = ("out", "base_url", "prompts", "resend", "resubmit", "kind", "nth", "after")


@contextlib.contextmanager
def children() -> Iterator[subprocess.Popen[str]]:
    """A process that forks children."""
    zygote = subprocess.Popen(  # noqa: S603 - this very file
        [sys.executable, __file__, "--children"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        yield zygote
    finally:
        zygote.communicate()


def start(
    zygote: subprocess.Popen[str], plan: Plan, started: Callable[[int], None] = lambda _: None
) -> int:
    """Run *plan* in a child to its exit code; its process id is told once it runs."""
    assert zygote.stdin is not None
    assert zygote.stdout is not None
    zygote.stdin.write(json.dumps({f: getattr(plan, f) for f in FIELDS}) + "\n")
    zygote.stdin.flush()
    started(int(zygote.stdout.readline()))
    return int(zygote.stdout.readline())


def check_files(out: Path) -> None:
    """What is on disk is what the ledger says, and nothing else is; manifest and gallery agree."""
    files = dict(ledger(out, "SELECT name, sha256 FROM files"))
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in out.glob("*.png")}
    assert found == files
    assert not list(out.glob(".*.part"))
    manifest = (out / "manifest.jsonl").read_text("utf-8").splitlines()
    told = {file["name"]: file["sha256"] for line in manifest for file in json.loads(line)["files"]}
    assert told == files
    page = (out / "gallery.html").read_text("utf-8")
    assert page.endswith("</html>\n")
    assert all(name in page for name in files)


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
    options.add_argument("--full-disks", type=int, default=0)
    options.add_argument("--seed", type=int, default=None)
    options.add_argument("--children", action="store_true", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.children:
        serve_children()
        return 0
    seed = secrets.randbelow(10**6) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)  # noqa: T201 - to repeat it with
    for what, times, kinds in (
        ("kills", given.kills, KINDS),
        ("full disks", given.full_disks, DISK_KINDS),
    ):
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            harness = Harness(times, seed, Path(folder), kinds)
            harness.run()
        print(  # noqa: T201 - the result
            f"{sum(harness.hits.values())} {what} in {harness.batches} batches of {ITEMS} items, "
            f"{time.monotonic() - started:.0f} s: {dict(harness.hits)}; at most {CONNECTIONS} "
            f"items were uncertain after each, {harness.uncertain} in all; no item lost, none "
            "paid twice"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
