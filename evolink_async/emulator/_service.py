"""The emulated service without HTTP: tasks, credits, idempotency keys.

Every public method first calls `Service.settle`, which charges what has ended by now. All may
be called from any thread. [O] marks what was observed and is not documented.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import json
import random
import string
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

from attrs import define, evolve, field, frozen

from evolink_async.emulator._clock import Clock
from evolink_async.emulator._contract import IDEMPOTENCY_KEY, TASK_ID, Submission, read_submission
from evolink_async.emulator._errors import ApiError
from evolink_async.emulator._rules import LONGEST, number
from evolink_async.emulator._tasks import GenerationTask, Timeline, exact

__all__ = ["Account", "Duration", "Reply", "Service", "Terms"]

Duration = float | tuple[float, float] | Callable[[str, random.Random], float]
"""Seconds a generation takes: fixed, uniform between two bounds, or drawn by a function of the
prompt and a random generator seeded for this submit."""

_BATCH_LIMIT = 50
"""Ids in one batch read."""
_PAGE_LIMIT = 50
"""Tasks on one page of a listing."""
_TYPES = ("text", "image", "audio", "video")
_LISTED = ("processing", "completed", "failed", "cancelled")


@frozen
class Reply:
    """The answer to a submit, and to each later one with the same idempotency key."""

    body: dict[str, Any] | None
    task: GenerationTask | None = None
    error: ApiError | None = None
    replayed: bool = False


@define(kw_only=True)
class Account:
    """The credits of the emulator's one account; ``remaining + reserved + used`` never changes."""

    remaining: float
    reserved: float = 0.0
    used: float = 0.0
    refunded: float = 0.0

    def reserve(self, amount: float) -> None:
        """Set *amount* aside.

        Raises:
            ApiError: 402, there is less than that.
        """
        if amount > self.remaining:
            raise ApiError(402, f"{amount} credits are needed, {exact(self.remaining)} are left")
        self.remaining = exact(self.remaining - amount)
        self.reserved = exact(self.reserved + amount)

    def settle(self, reserved: float, charged: float) -> None:
        """Charge *charged* of what was *reserved* and give back the rest."""
        self.reserved = exact(self.reserved - reserved)
        self.used = exact(self.used + charged)
        self.remaining = exact(self.remaining + reserved - charged)
        self.refunded = exact(self.refunded + reserved - charged)


@frozen(kw_only=True)
class Terms:
    """What a service offers: the settings of an `Emulator` that it follows."""

    price: float
    duration: Duration
    estimate: float | None
    seed: int
    image_models: tuple[str, ...]
    without: frozenset[str]


@define(kw_only=True, eq=False)
class Service:
    """Submit, read, read many, list, credits.

    Attributes:
        adjust: Changes the timeline of a task that is being accepted (the faults do).
        tasks: All tasks by id, in the order of their acceptance.
        peak_running: The most tasks that ever ran at the same time, from acceptance to end.
    """

    clock: Clock
    account: Account
    terms: Terms
    adjust: Callable[[Submission, Timeline, float], Timeline]
    base_url: str = ""
    tasks: dict[str, GenerationTask] = field(factory=dict)
    peak_running: int = 0
    _running: list[tuple[float, int, GenerationTask]] = field(factory=list)
    _alive: int = 0
    _order: itertools.count[int] = field(factory=itertools.count)
    _occurrences: Counter[bytes] = field(factory=Counter)
    _replies: dict[str, tuple[bytes, Reply]] = field(factory=dict)
    _lock: threading.RLock = field(factory=threading.RLock)

    @property
    def running(self) -> int:
        """How many tasks run now."""
        with self._lock:
            self.settle()
            return self._alive

    def settle(self) -> float:
        """Charge and refund the tasks that have ended by now; returns the time."""
        with self._lock:
            now = self.clock.now()
            while self._running and self._running[0][0] <= now:
                at, _, task = heapq.heappop(self._running)
                if at == task.timeline.ends_at and task.charged is None:
                    task.charged = task.credits_used()
                    self.account.settle(task.reserved, task.charged)
                    self._alive -= 1
            return now

    # Submit

    def submit(self, kind: str, body: dict[str, Any], key: str | None) -> Reply:
        """Accept or refuse one submit to the generation endpoint of type *kind*.

        The first reply to an idempotency *key* is the reply to all its repeats [O].

        Raises:
            ApiError: 400 for a malformed key, 409 for one that came with another body.
        """
        if key is None or "idempotency" in self.terms.without:
            return self._submit(kind, body, None)
        if not IDEMPOTENCY_KEY.fullmatch(key):
            raise ApiError(400, "Idempotency-Key must be 16-96 of A-Za-z0-9._-")
        digest = _digest(kind, body)
        with self._lock:
            first = self._replies.get(key)
            if first is None:
                reply = self._submit(kind, body, key)
                self._replies[key] = (digest, reply)
                return reply
        if first[0] != digest:
            words = "this Idempotency-Key was used with a different body"
            raise ApiError(409, words, code="idempotency_conflict")
        return evolve(first[1], replayed=True)

    def _submit(self, kind: str, body: dict[str, Any], key: str | None) -> Reply:
        try:
            submission = read_submission(kind, body, self.terms.image_models)
            with self._lock:
                task = self._accept(submission, _digest(kind, body), key)
        except ApiError as error:
            return Reply(None, error=error)
        return Reply(self.body_of(task, task.accepted_at), task)

    def _accept(self, submission: Submission, digest: bytes, key: str | None) -> GenerationTask:
        now = self.settle()
        reserved = exact(self.terms.price * submission.n)
        self.account.reserve(reserved)
        draw = self._draw(digest)
        timeline, estimate = self._timeline(submission, now, draw)
        task = GenerationTask(
            id=self._new_id(now, draw),
            submission=submission,
            accepted_at=now,
            estimate=estimate,
            timeline=self.adjust(submission, timeline, now),
            reserved=reserved,
            secret=f"{draw.getrandbits(64):016x}",
            price=self.terms.price,
            idempotency_key=key,
        )
        self.tasks[task.id] = task
        self._alive += 1
        self.peak_running = max(self.peak_running, self._alive)
        self._expect(task)
        return task

    def _draw(self, digest: bytes) -> random.Random:
        """The random generator of one submit: its seed is the body and how often it came before."""
        seed = f"{self.terms.seed}:{digest.hex()}:{self._occurrences[digest]}"
        self._occurrences[digest] += 1
        return random.Random(seed)  # noqa: S311 - not secret

    def _new_id(self, now: float, draw: random.Random) -> str:
        while True:
            tail = "".join(draw.choices(string.digits + string.ascii_lowercase, k=8))
            name = f"task-unified-{int(now)}-{tail}"
            if name not in self.tasks:
                return name

    def _timeline(
        self, submission: Submission, now: float, draw: random.Random
    ) -> tuple[Timeline, float]:
        law = self.terms.duration
        if callable(law):
            seconds = law(submission.prompt, draw)
            number(0, LONGEST).check("what duration(prompt, random) returns", seconds)
            typical = seconds
        elif isinstance(law, tuple):
            seconds = draw.uniform(*law)
            typical = sum(law) / 2
        else:
            seconds = typical = law
        timeline = Timeline(
            starts_at=now + min(2.0, 0.1 * seconds), ends_at=now + seconds, made=submission.n
        )
        return timeline, typical if self.terms.estimate is None else self.terms.estimate

    def _expect(self, task: GenerationTask) -> None:
        """Settle *task* when it ends."""
        heapq.heappush(self._running, (task.timeline.ends_at, next(self._order), task))

    def change_timeline(self, task_id: str, change: Callable[[Timeline, float], Timeline]) -> bool:
        """Have *change* make a running task's new timeline from the one it has and the time.

        Returns:
            Whether it was running; a task that has ended stays as it is.

        Raises:
            KeyError: There is no such task.
        """
        with self._lock:
            now = self.settle()
            task = self.tasks[task_id]
            running = not task.ended(now)
            if running:
                # Its entry at the old end stays in the heap, and settle ignores it.
                task.timeline = change(task.timeline, now)
                self._expect(task)
                self.settle()
            return running

    # Read

    def read(self, task_id: str) -> dict[str, Any]:
        """The body of a read.

        Raises:
            ApiError: 400 for a malformed id, 404 for an unknown one.
        """
        if not TASK_ID.fullmatch(task_id):
            raise ApiError(400, "the task id is malformed", param="task_id")
        found = self._answer(task_id, self.settle())
        if found is None:
            raise ApiError(404, f"task {task_id!r} not found", param="task_id")
        return found

    def _answer(self, task_id: str, now: float) -> dict[str, Any] | None:
        task = self.tasks.get(task_id)
        if task is None or not task.known_at(now):
            return None
        task.reads += 1
        return self.body_of(task, now)

    def body_of(self, task: GenerationTask, now: float) -> dict[str, Any]:
        """What a read of *task* at *now* is answered with; this one is not counted."""
        return task.answer(now, self.base_url, self.terms.without)

    def read_many(self, body: dict[str, Any]) -> dict[str, Any]:
        """The body of a batch read [O]; unknown ids are absent from it.

        Raises:
            ApiError: 400 unless *body* has 1 to 50 ids.
        """
        ids = body.get("task_ids")
        if not isinstance(ids, list) or not all(isinstance(each, str) for each in ids):
            raise ApiError(400, "task_ids must be a list of strings", param="task_ids")
        if not 1 <= len(ids) <= _BATCH_LIMIT:
            raise ApiError(400, f"task_ids must have 1 to {_BATCH_LIMIT} ids", param="task_ids")
        now = self.settle()
        answers = (self._answer(each, now) for each in dict.fromkeys(ids))
        return {"data": [each for each in answers if each is not None]}

    def list(self, query: dict[str, str]) -> dict[str, Any]:
        """The body of a listing [O]: newest first, filtered, in pages.

        Raises:
            ApiError: 400 for a filter or page that is not allowed.
        """
        status, kind, model = query.get("status"), query.get("type"), query.get("model")
        for name, allowed in (("status", _LISTED), ("type", _TYPES)):
            if query.get(name) not in {None, *allowed}:
                raise ApiError(400, f"{name} must be one of {', '.join(allowed)}", param=name)
        page = _integer(query, "page", default=1, most=10**9)
        page_size = _integer(query, "page_size", default=20, most=_PAGE_LIMIT)
        now = self.settle()
        with self._lock:
            tasks = list(reversed(self.tasks.values()))
        found = [
            task
            for task in tasks
            if task.known_at(now)
            # Queued tasks count as processing [O].
            and status in {None, task.timeline.status if task.ended(now) else "processing"}
            and kind in {None, task.submission.type}
            and model in {None, task.submission.model}
        ]
        first = (page - 1) * page_size
        return {
            "data": [task.summary(now) for task in found[first : first + page_size]],
            "total": len(found),
            "page": page,
            "page_size": page_size,
        }

    def credits(self) -> dict[str, Any]:
        """The body of the answer about credits; what is reserved is not remaining."""
        self.settle()
        account = self.account
        amounts = {"remaining_credits": account.remaining, "used_credits": account.used}
        return {
            "success": True,
            "message": "",
            "data": {"user": amounts, "token": {**amounts, "unlimited_credits": False}},
        }


def _digest(kind: str, body: Any) -> bytes:
    text = json.dumps([kind, body], sort_keys=True)
    return hashlib.sha256(text.encode()).digest()


def _integer(query: dict[str, str], name: str, *, default: int, most: int) -> int:
    text = query.get(name)
    if text is None:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 12 and 1 <= int(text) <= most):
        raise ApiError(400, f"{name} must be a whole number from 1 to {most}", param=name)
    return int(text)
