"""What a batch has spent, may have spent, and may still spend. Pure arithmetic."""

from __future__ import annotations

from attrs import define, field

from evolink_async._ledger import Item

__all__ = ["Money"]


@define(eq=False, kw_only=True)
class Money:
    """What is spent, and what may be.

    Attributes:
        limit: Most credits in all; None for no limit.
        spent: Charged, or reserved, by items that are not under way in this run.
        prices: Highest price of one result seen, by model.
        doubtful: Results that may have been charged without our learning, by model.
        held: What the items under way cost, or may cost.
        asking: Models whose price somebody is about to learn.
    """

    limit: float | None
    spent: float
    prices: dict[str, float]
    doubtful: dict[str, int]
    held: dict[int, float] = field(factory=dict)
    asking: dict[str, int] = field(factory=dict)

    @property
    def committed(self) -> float:
        """The most that can have been spent."""
        doubt = sum(self.prices.get(model, 0.0) * n for model, n in self.doubtful.items())
        return self.spent + doubt + sum(self.held.values())

    def allows(self, item: Item) -> bool:
        """Whether submitting *item* now keeps within the limit."""
        if self.limit is None:
            return True
        price = self.prices.get(item.model)
        if price is None:
            return item.model not in self.asking and self.committed < self.limit
        again = item.state == "uncertain"  # counted already
        return self.committed + (0 if again else price * item.pictures) <= self.limit + 1e-9

    def reserve(self, item: Item) -> None:
        """*item* is about to be submitted."""
        if item.state == "uncertain":
            self.doubtful[item.model] -= item.pictures
        price = self.prices.get(item.model)
        if price is None and self.limit is not None:
            self.asking[item.model] = item.number
        self.held[item.number] = (price or 0.0) * item.pictures

    def resume(self, item: Item) -> None:
        """*item*, of an earlier run, is under way again: what it reserved may come back."""
        if item.credits_reserved is not None:
            self.held[item.number] = item.credits_reserved
            self.spent -= item.credits_reserved

    def learn(self, item: Item, credits_: float | None) -> None:
        """*item* costs so much, as far as the API says."""
        if credits_ is None:
            return
        self.held[item.number] = credits_
        price = credits_ / item.pictures
        self.prices[item.model] = max(price, self.prices.get(item.model, 0.0))
        self.asking.pop(item.model, None)

    def release(self, item: Item, credits_: float) -> None:
        """*item* is no longer under way; it has cost so much."""
        if self.held.pop(item.number, None) is not None:
            self.spent += credits_
        if self.asking.get(item.model) == item.number:
            del self.asking[item.model]

    def doubt(self, item: Item) -> None:
        """*item* may have been charged."""
        self.release(item, 0.0)
        self.doubtful[item.model] = self.doubtful.get(item.model, 0) + item.pictures
