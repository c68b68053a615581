"""What goes into a ledger, and what comes out of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import field, frozen

__all__ = ["Counts", "Entry", "File", "Invalid", "Item", "Loaded"]


@frozen(kw_only=True)
class Entry:
    """One good line of the input.

    Attributes:
        line: Its number, from 1.
        user_id: The id the user gave it, if any.
        digest: A hash of the request it makes.
        request: The request, as JSON.
        metadata: What else the line holds, as JSON; None for nothing.
        model: What the price depends on.
        pictures: How many results are ordered.
    """

    line: int
    user_id: str | None
    digest: str
    request: str
    metadata: str | None
    model: str
    pictures: int


@frozen
class Invalid:
    """One bad line of the input: its number, from 1, and what is wrong with it."""

    line: int
    reason: str


@frozen(kw_only=True)
class Loaded:
    """How many good and bad lines the input has."""

    valid: int
    invalid: int


@frozen(kw_only=True)
class File:
    """A saved result: its name in the folder, SHA-256 in hexadecimal, size in bytes."""

    name: str
    sha256: str
    bytes: int


@frozen(kw_only=True)
class Item:
    """One item as the ledger has it."""

    number: int
    identity: str
    user_id: str | None
    line: int
    wanted: bool = field(converter=bool)
    request: Mapping[str, Any] = field(hash=False)
    metadata: Mapping[str, Any] = field(hash=False)
    model: str
    pictures: int
    state: str
    idempotency_key: str | None = None
    task_id: str | None = None
    snapshot: Mapping[str, Any] | None = field(default=None, hash=False)
    code: str | None = None
    message: str | None = None
    retryable: bool = field(default=False, converter=bool)
    credits_reserved: float | None = None
    credits_used: float | None = None
    times: Mapping[str, float] = field(factory=dict, hash=False)
    files: tuple[File, ...] = ()

    @property
    def place(self) -> str:
        """Where it stands in the input, in words."""
        return f"line {self.line}" if self.wanted else "an item no longer in the input"


@frozen(kw_only=True)
class Counts:
    """The whole ledger in numbers.

    Attributes:
        states: Items by state; those that have left the input count once paid for.
        pictures: Results ordered by items not submitted yet, by model.
        spent: Credits charged, or reserved and not yet settled, over all runs, as far as the
            API has said it.
        unstated: Results that are charged, or will be, at a price the API has not said, by
            model.
        prices: Highest price of one result seen, by model.
        uncertain: Results ordered by uncertain items, by model: they may have been charged.
        retryable: Failed items that may be retried.
        expired: Failed items whose results were lost by waiting too long.
    """

    states: Mapping[str, int] = field(hash=False)
    pictures: Mapping[str, int] = field(hash=False)
    spent: float
    unstated: Mapping[str, int] = field(hash=False)
    prices: Mapping[str, float] = field(hash=False)
    uncertain: Mapping[str, int] = field(hash=False)
    retryable: int
    expired: int
