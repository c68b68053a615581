"""One item of a batch on its way through its states, from the queue to its result.

Each step that costs money is recorded before it is taken, each result as soon as it is known::

    queued -> submitting -> submitted -> completed -> saved
                  |             |            |
              uncertain      failed       failed

A submit that is surely refused for now goes back to ``queued``. The last step, from
``completed`` to ``saved``, is told in ``_saving.py``.
"""

from __future__ import annotations

import asyncio
import json
import logging
from functools import partial
from typing import Any

from attrs import define, evolve, field

from evolink_async._model.requests import as_request
from evolink_async._model.snapshots import GenerationResult
from evolink_async._task import Task
from evolink_async._text import printable
from evolink_async.batch._context import RunContext
from evolink_async.batch._files import stems
from evolink_async.batch._ledger import NOT_FOUND, Item
from evolink_async.errors import (
    APIConnectionError,
    APIStatusError,
    AuthenticationError,
    EvolinkError,
    InsufficientCreditsError,
    LedgerError,
    NotFoundError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    SessionClosedError,
    SubmitUncertainError,
    TaskCancelledError,
    TaskFailedError,
    TaskTimeoutError,
)

__all__ = ["LiveItem"]

logger = logging.getLogger(__name__)


class _HaltedError(Exception):
    """Raised before a POST leaves, because nothing more is to be submitted."""


@define(eq=False)
class LiveItem:
    """One item in one run.

    Attributes:
        item: What the ledger said when this run took it up.
            state: The state it is in now, by the ledger.
        recorded: Whether its submit is recorded, or about to be: its POST may have left.
        key: The idempotency key of its submit.
        put_off: Whether its last submit was refused for now, and is to be tried again.
    """

    run: RunContext
    item: Item
    state: str = field(init=False)
    recorded: bool = field(default=False, init=False)
    key: str | None = field(init=False)
    put_off: bool = field(default=False, init=False)

    def __attrs_post_init__(self) -> None:
        self.state = self.item.state
        self.key = self.item.idempotency_key
        if self.state in {
            "queued",
            "failed",
        }:  # the times of an earlier purchase say nothing about this one
            self.item = evolve(self.item, times={})

    def moved(self, state: str) -> None:
        """The ledger says from now on that it is in that state."""
        before, self.state = self.state, state
        self.run.moved(before, state)

    # -- submitting ------------------------------------------------------------------------

    async def submit(self) -> Task | None:
        """Submit it and record what became of that; None if no task did."""
        self.put_off = self.recorded = False
        try:
            task = await self._post()
        except asyncio.CancelledError:
            await self._take_back()
            raise
        except SubmitUncertainError as exc:
            why = str(exc.__cause__ or "no usable answer came")
            await self._uncertain(exc.idempotency_key, why)
            self.run.count_uncertain(exc)
        except _HaltedError:
            await self._return()
        except LedgerError as exc:
            # Before a POST left; an earlier one was refused, or this would be an uncertain submit.
            self.run.halt("disk", str(exc))
            await self._return()
        except EvolinkError as exc:
            await self._refused(exc)
        else:
            await self._accepted(task)
            return task
        return None

    async def _post(self) -> Task:
        """Submit it; as long as that waits for its turn, a stop of the run cancels it."""
        item, worker = self.item, asyncio.current_task()
        self.run.waiting.add(worker)
        try:
            return await self.run.session.submit(
                as_request(item.request),
                idempotency_key=item.idempotency_key if item.state == "uncertain" else None,
                before_send=partial(self._before_send, worker),
            )
        finally:
            self.run.waiting.discard(worker)

    async def _before_send(self, worker: asyncio.Task[Any] | None, key: str) -> None:
        """The write-ahead: from here on a crash means that the submit may have been accepted."""
        if not self.run.going:
            raise _HaltedError
        self.run.waiting.discard(worker)
        self.recorded, self.key = True, key
        await self.run.ledger.submitting(self.item.number, key)
        self.moved("submitting")

    async def _take_back(self) -> None:
        """Cancelled: say what is sure about its submit."""
        if not self.recorded:
            return
        if self.key in self.run.session.unsent:
            await self._return()
        else:  # a POST of it may have been accepted
            await self._uncertain(self.key, "the batch was left while this was being submitted")

    async def _return(self) -> None:
        """Nothing of it was accepted now: as it was before."""
        if self.item.state == "uncertain":
            await self._uncertain(self.key, self.item.message or "")
            return
        self.run.money.release(self.item, 0.0)
        if self.recorded:
            await self.run.ledger.queued(self.item.number)
            self.moved(self.item.state)

    async def _uncertain(self, key: str | None, why: str) -> None:
        self.run.money.release_uncertain(self.item)
        await self.run.ledger.uncertain(self.item.number, key=key, message=printable(why))
        self.moved("uncertain")

    async def _accepted(self, task: Task) -> None:
        usage = task.snapshot.usage if task.snapshot is not None else None
        reserved = usage.credits_reserved if usage is not None else None
        self.run.accepted()
        self.run.money.learn(self.item, reserved)
        try:
            await self.run.ledger.submitted(
                self.item.number, key=task.idempotency_key, task_id=task.id, reserved=reserved
            )
        except LedgerError as exc:
            exc.add_note(
                f"{self.item.place} was accepted as task {task.id} (idempotency key "
                f"{task.idempotency_key}), which could not be recorded"
            )
            raise
        self.moved("submitted")

    async def _refused(self, exc: EvolinkError) -> None:
        """Surely not accepted: it goes back, or it has failed for good."""
        run, place = self.run, self.item.place
        if isinstance(exc, AuthenticationError | InsufficientCreditsError | SessionClosedError):
            await self._return()
            run.halt_for(exc)
        elif isinstance(exc, RateLimitError | ServerError | APIConnectionError):
            await self._return()
            self.put_off = True
            run.put_off(self.item, exc)
        elif isinstance(exc, PermissionDeniedError | NotFoundError) and not run.health.accepted_any:
            await self._return()
            run.halt(
                "refused",
                f"the API has accepted nothing yet, and refuses {place}: {exc}; see that "
                "the base URL is right and the key may use this model, or change that line",
            )
        elif self.item.state == "uncertain":
            # A repeat that is refused says nothing about the first.
            await self._uncertain(self.key, f"submitting it again was refused: {exc}")
        else:
            status = f"http_{exc.status}" if isinstance(exc, APIStatusError) else "refused"
            code = exc.code if isinstance(exc, APIStatusError) and exc.code else status
            await self.fail(
                code=status if code.isdigit() else code,
                message=str(exc),
                # About the account or the model, not about this request.
                retryable=isinstance(exc, PermissionDeniedError | NotFoundError),
            )

    # -- its task --------------------------------------------------------------------------

    def attach(self) -> Task:
        """The task it has had since an earlier run."""
        if self.item.task_id is None:  # pragma: no cover - committed together with the state
            raise AssertionError(self.item.number)
        self.run.money.resume(self.item)
        return self.run.session.task(self.item.task_id)

    async def result(self, task: Task) -> GenerationResult | None:
        """What its task came to; None if there is nothing to save, or not yet."""
        run, place = self.run, self.item.place
        try:
            result = await task
        except TaskFailedError as exc:
            used = exc.snapshot.usage.credits_used if exc.snapshot is not None else None
            await self.fail(code=exc.code, message=exc.reason, retryable=exc.retryable, used=used)
        except TaskCancelledError as exc:
            await self.fail(code="request_cancelled", message=str(exc))
        except NotFoundError:
            await self.give_up(
                NOT_FOUND,
                f"the API does not know task {task.id} any more; its results can no longer be "
                "had; submitting it again pays again",
            )
        except (AuthenticationError, SessionClosedError) as exc:
            run.halt_for(exc)
        except TaskTimeoutError:
            logger.warning("%s is left running: task %s has not ended in time", place, task.id)
        except EvolinkError as exc:
            logger.warning("%s is left as it is: %s", place, exc)
        else:
            if result.urls:
                self._charge(result.usage.credits_used)
                return result
            await self.fail(
                code="no_results",
                message=f"task {task.id} completed without results",
                charged=True,
                used=result.usage.credits_used,
            )
        return None

    def _charge(self, used: float | None) -> None:
        """It is paid for; without a known price a limit could not be kept."""
        money = self.run.money
        money.learn(self.item, used)
        money.keep(self.item)
        if money.limit is not None and self.item.model not in money.prices:
            self.run.halt(
                "max_credits",
                f"the API does not say what {printable(self.item.model, 80)} costs, so no limit "
                "can be kept; go on without a limit if you want to",
            )

    async def completed(self, result: GenerationResult) -> str:
        """Record its result; returns the beginning of its files' names."""
        stem = await self.run.ledger.completed(
            self.item.number,
            snapshot=json.dumps(result.to_json()),
            used=result.usage.credits_used,
            stems=stems(self.item, self.run.folder, len(result.urls)),
        )
        self.moved("completed")
        return stem

    # -- failing ---------------------------------------------------------------------------

    async def fail(
        self,
        *,
        code: str,
        message: str,
        retryable: bool = False,
        used: float | None = None,
        charged: bool = False,
    ) -> None:
        """Nothing will come of it by itself; *charged* if its credits were not returned."""
        money = self.run.money
        if charged and used is None:
            money.keep(self.item)
        else:
            money.release(self.item, used or 0.0)
        await self.run.ledger.failed(
            self.item.number,
            code=printable(code, 80),
            message=printable(message, 500),
            retryable=retryable,
            used=used,
            guess=money.guess(self.item) if charged else None,
        )
        self.moved("failed")

    async def give_up(self, code: str, message: str) -> None:
        """What was paid for is lost; if that is wanted, it is bought again in the end."""
        await self.fail(code=code, message=message, charged=True)
        if self.run.may_replace(self.item):
            self.run.replaced.add(self.item.number)
