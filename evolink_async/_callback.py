"""Where a submit's ``callback_url`` comes from, and how its source learns the task's id."""

from __future__ import annotations

import logging
from typing import Any, Protocol

from attrs import evolve

from evolink_async._checks import refuse
from evolink_async._hosts import check_callback_url
from evolink_async._model.requests import ImageRequest, RawRequest

__all__ = ["Callback", "CallbackSource", "check_callback", "tell_registered", "with_callback"]

logger = logging.getLogger(__name__)


class CallbackSource(Protocol):
    """What makes a callback URL for each submit, such as a `webhook.CallbackReceiver`."""

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


def tell_registered(callback: Callback, task_id: str, callback_url: str | None) -> None:
    """Tell what made the callback URL which task it is about."""
    if callback is None or isinstance(callback, str) or callback_url is None:
        return
    try:
        callback.registered(task_id, callback_url)
    except Exception:  # other people's code must not lose a paid task
        made_by: Any = type(callback)
        logger.exception("callback=%r failed to register task %s", made_by, task_id)
