"""The source of a submit's ``callback_url``, and how it learns the task's id."""

from __future__ import annotations

import logging
from typing import Protocol

from attrs import evolve

from evolink_async._checks import refuse
from evolink_async._hosts import check_callback_url
from evolink_async._model.requests import ImageRequest, RawRequest

__all__ = ["Callback", "CallbackSource", "check_callback", "report_registered", "with_callback"]

logger = logging.getLogger(__name__)


class CallbackSource(Protocol):
    """Makes a callback URL for each submit, such as a `webhook.CallbackReceiver`."""

    def url_for(self, idempotency_key: str) -> str:
        """The ``callback_url`` of the submit with that key."""
        ...

    def registered(self, task_id: str, callback_url: str) -> None:
        """The submit with that ``callback_url`` was answered, and its task is watched."""
        ...


Callback = str | CallbackSource | None


def check_callback(callback: Callback, session: object) -> Callback:
    """*callback* itself, if *session* can use it.

    Raises:
        ConfigurationError: It cannot.
    """
    if callback is None:
        return None
    reason = None
    if isinstance(callback, str):
        reason = check_callback_url(callback)
    elif isinstance(callback, type) or not (
        hasattr(callback, "url_for") and hasattr(callback, "registered")
    ):
        reason = "it makes no addresses"
    elif getattr(callback, "session", session) is not session:
        reason = "it belongs to another session, which does not watch its tasks"
    if reason is not None:
        allowed = "an https address, a CallbackReceiver of this session or None"
        raise refuse("callback", callback, allowed, reason)
    return callback


def with_callback(
    request: ImageRequest | RawRequest, callback: Callback, key: str
) -> ImageRequest | RawRequest:
    """*request* with a callback URL for *key*, unless it has one of its own.

    It keeps that URL where the submit goes on under a new key.
    """
    if callback is None or request.callback_url is not None:
        return request
    url = callback if isinstance(callback, str) else callback.url_for(key)
    if isinstance(request, RawRequest):
        return RawRequest(request.path, body={**request.body(), "callback_url": url})
    return evolve(request, callback_url=url)


def report_registered(callback: Callback, task_id: str, callback_url: str | None) -> None:
    """Report a watched task to the source of its callback URL."""
    if callback is None or isinstance(callback, str) or callback_url is None:
        return
    try:
        callback.registered(task_id, callback_url)
    except Exception:  # other people's code must not lose a paid task
        logger.exception("callback=%r failed to register task %s", type(callback), task_id)
