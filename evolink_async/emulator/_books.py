"""The emulator's books: what it received and did, for tests that assert on the server's view."""

from __future__ import annotations

from typing import Any

from attrs import asdict, define, field, frozen

from evolink_async.emulator._rules import one_of
from evolink_async.emulator._service import Service
from evolink_async.emulator._tasks import GenerationTask

__all__ = ["ROUTES", "Books", "CallbackRecord", "RequestRecord", "TaskRecord"]

ROUTES = ("submit", "read", "batch", "list", "credits", "result")
"""The values of ``route``: the API's endpoints, and the links to the results."""


@frozen(kw_only=True)
class RequestRecord:
    """One request the emulator received.

    Attributes:
        time: When it had arrived, on the emulator's clock.
        method: ``GET``, ``POST``.
        path: As sent, with its query.
        route: One of `ROUTES`, or ``other``.
        status: Of the answer; None if none was given.
        request_id: Of the answer, as in its ``X-Request-Id``.
        task_ids: The ids asked for; for a submit the id of the accepted task.
        prompt: Of a submit.
        idempotency_key: Of a submit.
        replayed: Whether a submit was answered with an earlier answer.
        authorized: Whether an ``Authorization`` header came with it, right or wrong.
        user_agent: The header of that name.
        faults: The names of the faults that struck, in their order.
    """

    time: float
    method: str
    path: str
    route: str
    status: int | None
    request_id: str
    task_ids: tuple[str, ...] = ()
    prompt: str | None = None
    idempotency_key: str | None = None
    replayed: bool = False
    authorized: bool = False
    user_agent: str = ""
    faults: tuple[str, ...] = ()


@frozen(kw_only=True)
class TaskRecord:
    """One accepted task, as it stands now.

    Attributes:
        id: The task's id.
        prompt: As submitted.
        model: As submitted.
        type: ``image``, ``video``, ``audio``.
        status: The status now.
        n: Results ordered.
        accepted_at: When it was accepted, on the emulator's clock.
        ends_at: When it ends or ended; infinite if never.
        idempotency_key: The key it was submitted with.
        reserved: Credits set aside for it.
        charged: Credits charged; None while it runs.
        refunded: Credits given back; None while it runs.
        reads: How many times it was read, by itself or in a batch.
        delivered: How many result files were handed out, repeats included.
        result_urls: Its results, once completed.
    """

    id: str
    prompt: str
    model: str
    type: str
    status: str
    n: int
    accepted_at: float
    ends_at: float
    idempotency_key: str | None
    reserved: float
    charged: float | None
    refunded: float | None
    reads: int
    delivered: int
    result_urls: tuple[str, ...]


@frozen(kw_only=True)
class CallbackRecord:
    """One attempt to deliver a callback.

    Attributes:
        time: When it was sent, on the emulator's clock.
        task_id: Of the task it is about.
        url: Where it went.
        status: Of the receiver's answer; None if there was none within 10 s.
        attempt: Counted from 1 for each delivery; there are up to four.
        forged: Whether it came from a `CallbackForged`, not from the task.
    """

    time: float
    task_id: str
    url: str
    status: int | None
    attempt: int
    forged: bool


@define(eq=False)
class Books:
    """What an emulator received and did. Can be used from any thread, also while it serves."""

    _service: Service
    _requests: list[RequestRecord] = field(factory=list, init=False)
    _callbacks: list[CallbackRecord] = field(factory=list, init=False)

    def __repr__(self) -> str:
        return f"Books({len(self._requests)} requests, {len(self._service.tasks)} tasks)"

    def record(self, entry: RequestRecord) -> None:
        """Write down one request (the server does)."""
        self._requests.append(entry)

    def record_callback(self, entry: CallbackRecord) -> None:
        """Write down one attempt to deliver a callback (the sender does)."""
        self._callbacks.append(entry)

    def callbacks(self, task: str | None = None) -> tuple[CallbackRecord, ...]:
        """The callbacks sent, repeats and forgeries included; with *task*, only those about it."""
        return tuple(entry for entry in self._callbacks if task in {None, entry.task_id})

    def requests(
        self,
        route: str | None = None,
        *,
        status: int | None = None,
        task: str | None = None,
        prompt: str | None = None,
    ) -> tuple[RequestRecord, ...]:
        """The requests received, in the order in which they were answered.

        Args:
            route: Only those to this route: one of ``faults.ROUTES``, or ``other``.
            status: Only those answered with this status.
            task: Only those about this task id.
            prompt: Only submits with exactly this prompt (a fault's ``prompt`` is a part of
                one).

        Raises:
            ValueError: There is no such route.
        """
        if route is not None:
            one_of(*ROUTES, "other").check("route", route)
        return tuple(
            entry
            for entry in self._requests
            if route in {None, entry.route}
            and status in {None, entry.status}
            and (task is None or task in entry.task_ids)
            and prompt in {None, entry.prompt}
        )

    def submits(self, prompt: str | None = None) -> tuple[RequestRecord, ...]:
        """The POSTs to generation endpoints, accepted or not; with *prompt*, as in `requests`."""
        return self.requests("submit", prompt=prompt)

    def reads(self, task: str | None = None) -> tuple[RequestRecord, ...]:
        """The reads, single and batch; with *task*, only those that asked for it."""
        return tuple(
            entry for entry in self.requests(task=task) if entry.route in {"read", "batch"}
        )

    def tasks(
        self, prompt: str | None = None, *, status: str | None = None
    ) -> tuple[TaskRecord, ...]:
        """The accepted tasks, oldest first, with what was charged and delivered.

        Args:
            prompt: Only those with exactly this prompt (a fault's ``prompt`` is a part of one).
            status: Only those with this status now.
        """
        now = self._service.settle()
        return tuple(
            self._task(task, now)
            for task in list(self._service.tasks.values())
            if prompt in {None, task.submission.prompt}
            and status in {None, task.timeline.status_at(now)}
        )

    def task(self, task_id: str) -> TaskRecord:
        """The task with this id.

        Raises:
            KeyError: No such task was accepted.
        """
        now = self._service.settle()
        return self._task(self._service.tasks[task_id], now)

    def _task(self, task: GenerationTask, now: float) -> TaskRecord:
        status = task.timeline.status_at(now)
        urls = task.result_paths() if status == "completed" else ()
        return TaskRecord(
            id=task.id,
            prompt=task.submission.prompt,
            model=task.submission.model,
            type=task.submission.type,
            status=status,
            n=task.submission.n,
            accepted_at=task.accepted_at,
            ends_at=task.timeline.ends_at,
            idempotency_key=task.idempotency_key,
            reserved=task.reserved,
            charged=task.charged,
            refunded=None if task.charged is None else round(task.reserved - task.charged, 6),
            reads=task.reads,
            delivered=task.delivered,
            result_urls=tuple(self._service.base_url + url for url in urls),
        )

    @property
    def accepted(self) -> int:
        """How many submits were accepted."""
        return len(self._service.tasks)

    @property
    def running(self) -> int:
        """How many tasks run now."""
        return self._service.running

    @property
    def peak_running(self) -> int:
        """The most tasks that ever ran at once; a task runs from its acceptance to its end."""
        return self._service.peak_running

    @property
    def remaining(self) -> float:
        """Credits left to spend."""
        self._service.settle()
        return self._service.account.remaining

    @property
    def reserved(self) -> float:
        """Credits set aside for running tasks."""
        self._service.settle()
        return self._service.account.reserved

    @property
    def charged(self) -> float:
        """Credits charged for ended tasks."""
        self._service.settle()
        return self._service.account.used

    @property
    def refunded(self) -> float:
        """Credits given back by ended tasks."""
        self._service.settle()
        return self._service.account.refunded

    @property
    def delivered(self) -> int:
        """How many result files were handed out."""
        return sum(task.delivered for task in list(self._service.tasks.values()))

    def summary(self) -> dict[str, Any]:
        """The totals, ready for JSON."""
        return {
            "requests": len(self._requests),
            "submits": len(self.submits()),
            "accepted": self.accepted,
            "running": self.running,
            "peak_running": self.peak_running,
            "remaining": self.remaining,
            "reserved": self.reserved,
            "charged": self.charged,
            "refunded": self.refunded,
            "reads": sum(task.reads for task in list(self._service.tasks.values())),
            "delivered": self.delivered,
            "callbacks": len(self._callbacks),
        }


def as_json(record: RequestRecord | TaskRecord | CallbackRecord) -> dict[str, Any]:
    """A record as a JSON object; infinity, which JSON does not have, becomes null."""
    values = asdict(record)
    return {name: None if value == float("inf") else value for name, value in values.items()}
