"""One logical submit, from its request to the answer of its last POST."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from attrs import define, field

from evolink_async._model.requests import ImageRequest, RawRequest
from evolink_async._polling.watch import Watch
from evolink_async.errors import EvolinkError, SubmitUncertainError

__all__ = ["BeforeSend", "Submission"]

BeforeSend = Callable[[str], Awaitable[object]]


@define(eq=False)
class Submission:
    """One logical submit and how far it has come.

    Attributes:
        request: What is asked for.
        idempotency_key: The key it carries.
        answer: Where its caller waits for the task.
        before_send: Awaited with the key right before a POST may leave; if it raises, none does.
        post: What runs its POST, None before it has a seat.
        seated: True while it has a seat of the gate that its POST has not taken over.
        in_air: True while a POST of it may have been accepted.
        sending: True while a POST of it waits for its answer.
        abandoned: True once its caller was cancelled before any POST left.
        sent_at: When the last POST was sent, on the session's clock.
        replayed: True if the answer is the stored one of an earlier POST, maybe long ago.
        objection: What *before_send* raised.
        doubt: Why a POST of it may have been accepted although no usable answer came.
    """

    request: ImageRequest | RawRequest
    idempotency_key: str = field(kw_only=True)
    answer: asyncio.Future[Watch] = field(kw_only=True)
    before_send: BeforeSend | None = field(default=None, kw_only=True)
    post: asyncio.Task[Watch] | None = field(default=None, init=False)
    seated: bool = field(default=False, init=False)
    in_air: bool = field(default=False, init=False)
    sending: bool = field(default=False, init=False)
    abandoned: bool = field(default=False, init=False)
    sent_at: float = field(default=0.0, init=False)
    replayed: bool = field(default=False, init=False)
    objection: Exception | None = field(default=None, init=False)
    doubt: EvolinkError | None = field(default=None, init=False)

    def uncertain(self, why: object) -> SubmitUncertainError:
        """The error for a POST whose outcome nobody knows."""
        return SubmitUncertainError(
            f"the submit with idempotency key {self.idempotency_key} may have been accepted and "
            f"charged, but no usable answer came ({why}); nothing was resent. Submit "
            f"error.request again with idempotency_key=error.idempotency_key to ask for the "
            f"first answer, or look for the task in session.list()",
            request=self.request,
            idempotency_key=self.idempotency_key,
        )
