"""What the watcher knows of the network: one poll at a time, and when to try again."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Protocol

from evolink_async._model.snapshots import TaskSnapshot
from evolink_async.errors import EvolinkError

__all__ = ["Network", "PollResult"]


class PollResult(Protocol):
    """What came of one poll: by id a task, an error, or None for an id that was left out.

    An id that is absent from the answers is to be polled again at once.
    """

    @property
    def sent_at(self) -> float: ...
    @property
    def received_at(self) -> float: ...
    @property
    def answers(self) -> Mapping[str, TaskSnapshot | EvolinkError | None]: ...


class Network(Protocol):
    """What the watcher needs of a transport."""

    @property
    def read_limit(self) -> int:
        """Tasks one poll may ask for now."""
        ...

    def fetch(self, ids: tuple[str, ...]) -> Awaitable[PollResult]:
        """Poll tasks once; never fails for an id. Changes `read_limit` at once, if at all."""
        ...

    def backoff(self, failures: int) -> float:
        """Seconds until a task whose polls failed so often in a row is polled again."""
        ...

    def renew(self) -> None:
        """Use new connections from now on."""
        ...
