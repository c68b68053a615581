"""Settings of a receiver that are refused, and its secret, which never shows."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from types import TracebackType
from typing import Any

import pytest
from attrs.exceptions import FrozenInstanceError
from callback_server import KEY, PUBLIC, SECRET

from evolink_async import ConfigurationError, Session, webhook
from evolink_async.webhook import CallbackReceiver


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"public_url": "http://app.example.com/hooks"}, "its scheme is 'http'"),
        ({"public_url": "https://127.0.0.1/hooks"}, "its host is a loopback address"),
        ({"public_url": f"{PUBLIC}?a=1"}, "it has a query or a fragment"),
        ({"public_url": f"{PUBLIC}#a"}, "it has a query or a fragment"),
        ({"public_url": f"{PUBLIC}/{'a' * 1900}"}, "characters"),
        ({"public_url": None}, "public_url=None is not allowed"),
        ({"public_url": 5}, "public_url=5 is not allowed"),
        ({"public_url": PUBLIC.encode()}, "public_url=b'https"),
        ({"session": None}, "session=None is not allowed"),
        ({"on_unwatched": 5}, "on_unwatched=5 is not allowed: a function of a task's id"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    """A URL the API would refuse, and values of other types, are refused at once."""
    given: dict[str, Any] = {"session": Session("key"), "public_url": PUBLIC} | settings
    with pytest.raises(ConfigurationError, match=message):
        CallbackReceiver(given.pop("session"), **given)


@pytest.mark.parametrize(
    ("secret", "message"),
    [
        ("too short", "secret has 9 bytes; give at least 16 bytes"),
        ("", "secret has 0 bytes"),
        (20, "secret is of type int, not str or bytes"),
        (123456789.5, "secret is of type float"),
        ([77] * 16, "secret is of type list"),
        (uuid.UUID(int=77), "secret is of type UUID"),
        ("too short for it\udcff", "a lone surrogate"),
    ],
    ids=range(7),
)
def test_secrets_are_checked(secret: Any, message: str) -> None:
    """A secret is text or bytes, and long enough; the message never shows it."""
    with pytest.raises(ConfigurationError, match=message) as caught:
        CallbackReceiver(Session("key"), public_url=PUBLIC, secret=secret)
    for word in ("too short", "20", "123456789", "77", "\udcff"):
        assert word not in str(caught.value)
    assert shown_in_frames(caught.tb, repr(secret)) == []


def shown_in_frames(traceback: TracebackType | None, word: str) -> list[str]:
    """The variables of our own frames that show *word*, as reports of errors print them."""
    found = []
    while traceback is not None:
        frame = traceback.tb_frame
        if frame.f_code.co_filename == webhook.__file__:
            found += [name for name, value in frame.f_locals.items() if word in repr(value)]
        traceback = traceback.tb_next
    return found


def test_the_secret_is_in_no_frame() -> None:
    """A report of a failed setting that prints local variables does not print the secret."""
    with pytest.raises(ConfigurationError) as caught:
        CallbackReceiver(Session("key"), public_url="http://example.com", secret=SECRET)
    assert shown_in_frames(caught.tb, "example.com")
    assert shown_in_frames(caught.tb, SECRET) == []


@pytest.mark.parametrize("kind", [str, str.encode, lambda s: bytearray(s.encode())])
def test_secrets_of_all_kinds(kind: Callable[[str], Any]) -> None:
    """Text, bytes and what holds bytes are one secret; any byte may be in it."""
    urls = {
        CallbackReceiver(Session("key"), public_url=PUBLIC, secret=secret).url_for(KEY)
        for secret in (kind(f"{SECRET} \xff"), memoryview(f"{SECRET} \xff".encode()))
    }
    assert len(urls) == 1


def test_the_secret_does_not_show(session: Session) -> None:
    """Neither repr nor stats hold the secret, and stats cannot be changed."""
    receiver = CallbackReceiver(session, public_url=PUBLIC, secret=SECRET)
    assert repr(receiver) == f"<CallbackReceiver {PUBLIC}, 0 received>"
    assert SECRET not in repr(receiver.stats)
    with pytest.raises(FrozenInstanceError):
        receiver.stats.nudged = 1  # type: ignore[misc]  # what is being tested


@pytest.mark.parametrize(
    "callback",
    [
        CallbackReceiver(Session("key"), public_url=PUBLIC),
        CallbackReceiver,
        "http://127.0.0.1/hooks",
        7,
    ],
    ids=["another's", "the class", "not https", "a number"],
)
async def test_callbacks_that_cannot_work_are_refused(session: Session, callback: Any) -> None:
    """A receiver of another session, its class or no https address is refused at once."""
    with pytest.raises(ConfigurationError, match="callback="):
        Session("key", callback=callback)
    with pytest.raises(ConfigurationError, match="callback="):
        await session.submit("A lake", callback=callback)
    with pytest.raises(ConfigurationError, match="callback="):
        session.callback = callback
