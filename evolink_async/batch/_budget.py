"""What a batch has spent, may have spent, and may still spend. Pure arithmetic."""

from __future__ import annotations

from typing import Self

from attrs import define, field

from evolink_async.batch._ledger import Counts, Item

__all__ = ["Money"]


@define(eq=False, kw_only=True)
class Money:
    """What is spent, and what may be.

    Attributes:
        limit: Most credits in all; None for no limit.
        spent: Charged, or reserved, by items that are not under way in this run.
        prices: Highest price of one result seen, by model.
        unstated: Results that are or will be charged, nobody has said how much for, by model.
        uncertain: Results that may have been charged without our learning, by model.
        held: What items under way cost, where the API has said it.
        guessed: Items under way that are among the unstated.
    """

    limit: float | None
    spent: float
    prices: dict[str, float]
    unstated: dict[str, int]
    uncertain: dict[str, int]
    held: dict[int, float] = field(factory=dict)
    guessed: set[int] = field(factory=set)

    @classmethod
    def of(cls, counts: Counts, *, limit: float | None = None) -> Self:
        """As the ledger has it, nothing being under way."""
        return cls(
            limit=limit,
            spent=counts.spent,
            prices=dict(counts.prices),
            unstated=dict(counts.unstated),
            uncertain=dict(counts.uncertain),
        )

    @property
    def credits(self) -> float:
        """Charged or reserved; at the highest price seen where nobody has said how much."""
        return self.spent + sum(self.held.values()) + self._worth(self.unstated)

    @property
    def credits_uncertain(self) -> float | None:
        """What uncertain items cost if they were accepted, at the highest price seen.

        None if no price of one of them is known.
        """
        if any(n and model not in self.prices for model, n in self.uncertain.items()):
            return None
        return self._worth(self.uncertain)

    @property
    def committed(self) -> float:
        """The most that can have been spent."""
        return self.credits + self._worth(self.uncertain)

    def _worth(self, results: dict[str, int]) -> float:
        return sum(self.prices.get(model, 0.0) * n for model, n in results.items())

    def guess(self, item: Item) -> float:
        """What *item* costs at the highest price seen; 0 if none was."""
        return self.prices.get(item.model, 0.0) * item.pictures

    def allows(self, item: Item) -> bool:
        """Whether submitting *item* now keeps within the limit."""
        if self.limit is None:
            return True
        again = item.state == "uncertain"  # counted already
        if item.model in self.prices:
            more = 0.0 if again else self.guess(item)
            return self.committed + more <= self.limit + 1e-9
        return (again or self.committed < self.limit) and not self.unknown(item)

    def unknown(self, item: Item) -> int:
        """Results of whatever model that cost nobody knows what, if *item* would be one more.

        Those of *item* itself are left out.
        """
        if item.model in self.prices:
            return 0
        all_of_them = (self.unstated, self.uncertain)
        count = sum(n for each in all_of_them for m, n in each.items() if m not in self.prices)
        return count - (item.pictures if item.state == "uncertain" else 0)

    def reserve(self, item: Item) -> None:
        """*item* is about to be submitted."""
        if item.state == "uncertain":
            _add(self.uncertain, item, -1)
        _add(self.unstated, item, 1)
        self.guessed.add(item.number)

    def resume(self, item: Item) -> None:
        """*item*, of an earlier run, is under way again: what it reserved may come back."""
        if item.credits_reserved is None:
            self.guessed.add(item.number)
        else:
            self.held[item.number] = item.credits_reserved
            self.spent -= item.credits_reserved

    def learn(self, item: Item, credits_: float | None) -> None:
        """*item* costs so much, as far as the API says."""
        if credits_ is None:
            return
        self._forget(item)
        self.held[item.number] = credits_
        self.prices[item.model] = max(credits_ / item.pictures, self.prices.get(item.model, 0.0))

    def release(self, item: Item, credits_: float) -> None:
        """*item* is no longer under way; it has cost so much."""
        self._forget(item)
        self.spent += credits_

    def keep(self, item: Item) -> None:
        """*item* is no longer under way; it has cost what is known of it."""
        self.guessed.discard(item.number)
        self.spent += self.held.pop(item.number, 0.0)

    def release_uncertain(self, item: Item) -> None:
        """*item* is no longer under way; it may have been charged."""
        self.release(item, 0.0)
        _add(self.uncertain, item, 1)

    def withdraw(self, item: Item) -> None:
        """Nothing of *item* has left in this run, if it is still to be submitted."""
        if item.number in self.guessed:
            self.release(item, 0.0)
            if item.state == "uncertain":
                _add(self.uncertain, item, 1)

    def _forget(self, item: Item) -> None:
        self.held.pop(item.number, None)
        if item.number in self.guessed:
            self.guessed.remove(item.number)
            _add(self.unstated, item, -1)


def _add(results: dict[str, int], item: Item, sign: int) -> None:
    results[item.model] = results.get(item.model, 0) + sign * item.pictures
