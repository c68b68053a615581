"""The whole story of a submit, from the caller's wait for a slot to the answer of its last POST.

Once a POST may have left, it belongs to the session: it is sent by an asyncio task of the
session's own, which goes on if the caller is cancelled. So every submit runs in such a task
(`Submitter.submit`): `_run` makes attempts, `_attempt` is one of them. Whether a submit is sent
again is decided in one place, `_may_resend`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final, TypeVar

from attrs import define, field

from evolink_async._clock import Clock, hold
from evolink_async._http import protocol
from evolink_async._http.limiter import Limiter
from evolink_async._http.retry import MAX_RETRY_AFTER
from evolink_async._model.requests import ImageRequest, RawRequest
from evolink_async._model.snapshots import TaskSnapshot
from evolink_async.errors import (
    APIStatusError,
    EvolinkError,
    SessionClosedError,
    SubmitUncertainError,
)

if TYPE_CHECKING:  # it imports aiohttp
    from evolink_async._http.transport import Answer, Transport

__all__ = ["BeforeSend", "Submitter"]

logger = logging.getLogger(__name__)
T = TypeVar("T")

BeforeSend = Callable[[str], Awaitable[object]]
_Accepted = tuple[TaskSnapshot, str, "Answer"]  # the key is that of the accepted POST
Register = Callable[[TaskSnapshot, str, "Answer"], T]

NOT_SENT: Final = "the session was closed before this submit; nothing was sent"


@define(eq=False)
class _Submission:
    """How far one submit has come.

    Attributes:
        request: What is asked for.
        idempotency_key: The key its next POST carries.
        before_send: The caller's hook.
        ended: What its caller waits for: done once its asyncio task is.
        began_at: When it got its first permit, on the session's clock. The wait for that permit
            does not count towards the retry policy's time-out.
        may_have_left: True once a POST of it may have been accepted.
        awaits_answer: True while a POST of it waits for its answer.
        uncertain: Why a POST of it may have been accepted although no usable answer came.
        hook_error: What *before_send* raised.
        stopped: True once its caller was cancelled before a POST may have left.
        abandoned: True once its caller was cancelled, whenever that was.
    """

    request: ImageRequest | RawRequest
    idempotency_key: str = field(kw_only=True)
    before_send: BeforeSend | None = field(kw_only=True)
    ended: asyncio.Future[None] = field(kw_only=True)
    began_at: float = field(default=inf, init=False)
    may_have_left: bool = field(default=False, init=False)
    awaits_answer: bool = field(default=False, init=False)
    uncertain: EvolinkError | None = field(default=None, init=False)
    hook_error: Exception | None = field(default=None, init=False)
    stopped: bool = field(default=False, init=False)
    abandoned: bool = field(default=False, init=False)

    def failed(self, error: EvolinkError) -> None:
        """Note what the failure of a POST says about the submit."""
        if error.may_have_been_accepted:
            self.uncertain = self.uncertain or error
        elif error.resendable and getattr(error, "replayed", False):
            # The stored answer to the first POST under this key, which was refused. The same
            # key would always get the same answer.
            self.uncertain = None
            self.idempotency_key = protocol.new_idempotency_key()
        self.may_have_left = self.uncertain is not None

    def uncertain_error(self, why: object) -> SubmitUncertainError:
        """The error for a submit of unknown outcome."""
        return SubmitUncertainError(
            f"the submit with idempotency key {self.idempotency_key} may have been accepted and "
            f"charged, but no usable answer came ({why}); nothing was resent. Submit "
            f"error.request again with idempotency_key=error.idempotency_key to ask for the "
            f"first answer, or look for the task in session.list()",
            request=self.request,
            idempotency_key=self.idempotency_key,
        )


class Submitter:
    """Sends the submits of a session, never more than it has slots for.

    A slot belongs to the generation: `submit` takes it, and `free_slot` must be called when the
    accepted task has ended. A submit that fails gives its slot back itself.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        limiter: Limiter,
        clock: Clock,
        slots: int,
        resend_uncertain: bool,
        notice_resume: Callable[[], None],
    ) -> None:
        """A submitter with so many slots.

        Args:
            transport: Sends the POSTs.
            limiter: Gives the permits.
            clock: The session's.
            slots: Generations running at once.
            resend_uncertain: Whether a submit of unknown outcome is resent with the same key.
            notice_resume: Called before each POST: after a suspension of the machine, it must
                not go out on a connection that is dead.
        """
        self._transport = transport
        self._limiter = limiter
        self._clock = clock
        self._slots = asyncio.Semaphore(slots)
        self.free_slot = self._slots.release  # one bound method for all watches
        self._resend_uncertain = resend_uncertain
        self._notice_resume = notice_resume
        self._running: dict[asyncio.Task[Any], _Submission] = {}
        self.waiting = 0

    @property
    def unsent(self) -> frozenset[str]:
        """Idempotency keys of the submits without a POST that may have been accepted."""
        running = self._running.values()
        sent = {each.idempotency_key for each in running if each.may_have_left}
        return frozenset(each.idempotency_key for each in running) - sent

    # -- the caller's side -----------------------------------------------------------------

    async def submit(
        self,
        request: ImageRequest | RawRequest,
        *,
        idempotency_key: str,
        before_send: BeforeSend | None,
        register: Register[T],
    ) -> T:
        """Submit *request* once there is a slot; returns what *register* makes of its task.

        *register* is called even if the caller was cancelled after its POST may have left.

        Raises:
            SubmitUncertainError: It may have been accepted.
            SessionClosedError: The session was closed; nothing was sent.
            EvolinkError: It was not accepted.
        """
        self.waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self.waiting -= 1
        if self._transport.closing:
            raise SessionClosedError(NOT_SENT)
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        submission = _Submission(
            request, idempotency_key=idempotency_key, before_send=before_send, ended=ended
        )
        task = self._start(submission, register)
        try:
            await ended
        except BaseException:  # the caller was cancelled; the task was not
            if task.done():
                _log_abandoned(submission, task)
                raise
            submission.abandoned = True
            if not submission.may_have_left:
                submission.stopped = True
                task.cancel()
            raise
        if task.cancelled() and self._transport.closing:
            raise SessionClosedError(NOT_SENT)
        return task.result()

    def _start(self, submission: _Submission, register: Register[T]) -> asyncio.Task[T]:
        """Run a submit in an asyncio task of the session's own, in the context of its caller."""
        running = self._run(submission, register)
        try:
            task = asyncio.get_running_loop().create_task(running)
        except BaseException:  # of a task factory of the caller's
            running.close()
            self._slots.release()
            raise
        self._running[task] = submission
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        """Wake the caller; give the slot of a failed submit back, even if its task never began."""
        submission = self._running.pop(task)
        if task.cancelled() or task.exception() is not None:
            self._slots.release()
        if not submission.ended.done():
            submission.ended.set_result(None)
        if submission.abandoned:
            _log_abandoned(submission, task)

    # -- the session's side ----------------------------------------------------------------

    async def _run(self, submission: _Submission, register: Register[T]) -> T:
        """Make attempts until one is accepted or the last error stands; register the task."""
        try:
            accepted = await self._transport.retries.run(
                partial(self._attempt, submission),
                partial(self._may_resend, submission),
                began_at=lambda: submission.began_at,
            )
        except asyncio.CancelledError:
            if not submission.may_have_left:
                raise
            logger.warning(
                "cut off in the middle of a submit, which may have been accepted: "
                "idempotency key %s",
                submission.idempotency_key,
            )
            raise submission.uncertain_error("it was cut off") from None
        except Exception:  # also what before_send raised: an earlier POST stays uncertain
            if (why := submission.uncertain) is not None:
                raise submission.uncertain_error(why) from why
            raise
        return register(*accepted)

    def _may_resend(self, submission: _Submission, error: EvolinkError) -> bool:
        """Whether a submit is sent again after an attempt that ended with *error*.

        How soon and how often is up to the retry policy.
        """
        if self._transport.closing or error is submission.hook_error:
            return False
        if not (error.resendable or error.may_have_been_accepted):
            return False
        if isinstance(error, APIStatusError) and (error.retry_after or 0) > MAX_RETRY_AFTER:
            return False
        return submission.uncertain is None or self._resend_uncertain

    async def _attempt(self, submission: _Submission) -> _Accepted:
        """Wait for a permit, ask the hook, send one POST and read its answer."""
        with await self._limiter.acquire(submission.request.model):
            submission.began_at = min(submission.began_at, self._clock.now())
            self._check_wanted(submission)
            if submission.before_send is not None:
                try:
                    with hold(self._clock):
                        await submission.before_send(submission.idempotency_key)
                except Exception as exc:
                    submission.hook_error = exc  # whatever its type, it is no answer of the API
                    raise
                self._check_wanted(submission)
            self._notice_resume()
            return await self._post(submission)

    def _check_wanted(self, submission: _Submission) -> None:
        """Stop if the session was closed, or if the hook swallowed a cancellation."""
        if self._transport.closing:
            raise SessionClosedError(NOT_SENT)
        if submission.stopped:
            raise asyncio.CancelledError

    async def _post(self, submission: _Submission) -> _Accepted:
        key = submission.idempotency_key
        submission.may_have_left = submission.awaits_answer = True
        try:
            answer = await self._transport.post(submission.request, idempotency_key=key)
            snapshot = TaskSnapshot.from_json(answer.json(), body=answer.body, status="pending")
        except EvolinkError as exc:
            submission.failed(exc)
            raise
        finally:
            submission.awaits_answer = False
        return snapshot, key, answer

    # -- the end ---------------------------------------------------------------------------

    async def finish(self, grace: float | None) -> None:
        """Start no new POST; give POSTs in flight *grace* seconds, or their time-out if None."""
        for _ in range(self.waiting):  # each raises SessionClosedError
            self._slots.release()
        for task, submission in self._running.items():
            if not submission.awaits_answer:
                task.cancel()
        try:
            if self._running:
                await asyncio.wait(tuple(self._running), timeout=grace)
        finally:
            self.cut_off()
            await asyncio.gather(*self._running, return_exceptions=True)

    def cut_off(self) -> None:
        """Stop waiting for answers; those submits are uncertain."""
        for task in self._running:
            task.cancel()


def _log_abandoned(submission: _Submission, task: asyncio.Task[Any]) -> None:
    """Log what became of a submit after its caller was cancelled."""
    key = submission.idempotency_key
    if task.cancelled():
        return
    if (error := task.exception()) is not None:
        logger.warning("a submit whose caller was cancelled failed (key %s): %s", key, error)
    else:
        logger.warning(
            "a submit whose caller was cancelled made task %s (key %s); it is being watched",
            task.result().id,
            key,
        )
