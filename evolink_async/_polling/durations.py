"""How long tasks of one kind take, learned from their polls, and when to poll them next.

A poll costs a request; not polling costs the seconds between the end of a task and noticing
it. With *price* the seconds of delay that one poll is worth, the inspection rule polls next at
the age u where the delay expected to have been wasted since the last poll (at age t, task
still running) has grown to the price, weighed by the chance that the task still runs then::

    integral from t to u of (F(x) - F(t)) dx  =  price * (1 - F(u))

F, the law of durations, is learned as a hazard: the chance that a task which has reached an
age ends at it. Ends alone would not do: of tasks that run side by side the shortest end first.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable, Iterable
from itertools import accumulate, pairwise
from operator import add
from typing import Final

from attrs import define, field

from evolink_async._checks import is_number
from evolink_async._polling.policy import PollPolicy, Schedule

__all__ = ["DurationModel"]

BINS_PER_OCTAVE: Final = 16
"""Bins of age to each doubling."""

HORIZON: Final = 64
"""The last bin begins at this many longest intervals."""

FIRST_ENDS: Final = 20
"""Ends that are learned from at once, one by one, and pooled with more of their neighbours."""

NEIGHBOURS: Final = (6, 3)
"""Bins pooled with each bin on either side, during and after the first ends."""

PRICES_PER_OCTAVE: Final = 4
"""Classes of prices to each doubling, in the table of intervals."""

MEMORY: Final = 50
"""Tasks after which what was seen counts for a third; at least twice as many as run."""

PRIOR_TASKS: Final = 4.0
"""Tasks that the prior counts for at first; a tenth of it stays for good."""

PRIOR_SIGMA: Final = (0.6, 1.0)
"""Width of the prior around the server's estimate, and where the server gave none."""

UNUSABLE: Final = 0.1
"""Chance, before any end was seen, that the estimate is of no use."""

REACH: Final = 3.0
"""Durations are expected up to this many estimates if the estimate is of no use."""

SMOOTHING: Final = 1e-3
"""Tasks spread over all ages, so that no age is ever certain or impossible."""

LEARN_EVERY: Final = 8
"""Polls of each running task after which the hazard is computed anew."""


class Prior:
    """Where tasks are expected to end before any was seen, as chances per bin of age.

    A mixture of two laws: lognormal around the server's estimate; and, for an estimate that is
    of no use, uniform on a logarithmic scale up to a few estimates. Each end that is seen
    shifts the weights of the two.

    Attributes:
        tasks: How many tasks it counts for.
        trust: Weight of the first.
    """

    def __init__(self, estimate: object, policy: PollPolicy, edges: list[float]) -> None:
        """A prior from the server's ``estimated_time`` as it came, junk included."""
        shortest, longest = policy.min_interval, policy.max_interval * HORIZON / 4
        median, sigma = policy.max_interval / 2, PRIOR_SIGMA[1]
        if is_number(estimate) and 0 < estimate < math.inf:
            median, sigma = min(max(estimate, shortest), longest), PRIOR_SIGMA[0]
        scale, octaves = sigma * math.sqrt(2), math.log2(REACH * median / shortest)
        self._right = _chances(edges, lambda t: math.erfc(math.log(median / t) / scale) / 2)
        self._wrong = _chances(edges, lambda t: min(1.0, math.log2(t / shortest) / octaves))
        self.tasks, self.trust = PRIOR_TASKS, 1 - UNUSABLE

    def saw_end(self, first: int, last: int) -> None:
        """Shift the weights after an end somewhere in these bins."""
        thin = SMOOTHING / len(self._right)
        right = self.trust * (thin + sum(self._right[first : last + 1]))
        wrong = (1 - self.trust) * (thin + sum(self._wrong[first : last + 1]))
        self.trust = min(max(right / (right + wrong), SMOOTHING), 1 - SMOOTHING)

    def fade(self, keep: float) -> None:
        """Forget all but the part *keep*, and never the last tenth."""
        self.tasks = max(keep * self.tasks, PRIOR_TASKS / 10)

    def counts(self) -> tuple[list[float], list[float]]:
        """Ends and tasks at risk per bin."""
        right, wrong = self.tasks * self.trust, self.tasks * (1 - self.trust)
        ends = [right * a + wrong * b for a, b in zip(self._right, self._wrong, strict=True)]
        ended = zip(accumulate(ends), ends, strict=True)
        return ends, [self.tasks - after + end / 2 for after, end in ended]


@define(eq=False, repr=False)
class DurationModel(Schedule):
    """The law of durations of one kind of task, as learned so far.

    Ages are sorted into bins, 16 to each doubling from the shortest interval on. Per bin the
    model counts the tasks that ended in it and the tasks that were at risk to, for as much
    of the bin as they ran; the ratio of the two is the hazard. Tasks that still run thus
    count for as much as those that ended. What was seen fades with a memory of `MEMORY`
    tasks, and a `Prior` stands in for data at first.
    """

    policy: PollPolicy
    estimate: object = None
    _edges: list[float] = field(init=False)
    _prior: Prior = field(init=False)
    _ends: list[float] = field(init=False)
    _risk: list[float] = field(init=False)
    # Tasks last seen running in each bin: they ran through all bins before it.
    _reached: list[int] = field(init=False)
    _hazard: list[float] = field(init=False)
    # Seconds from one poll to the next, by bin of age and class of price.
    _intervals: dict[tuple[int, int], float] = field(init=False, factory=dict)
    _running: int = field(default=0, init=False)
    _ended: int = field(default=0, init=False)
    # Since the hazard was computed: ends; and polls, each end counted as several.
    _new_ends: int = field(default=0, init=False)
    _news: int = field(default=0, init=False)

    def __attrs_post_init__(self) -> None:
        self._edges = _edges(self.policy)
        self._prior = Prior(self.estimate, self.policy, self._edges)
        self._ends, self._risk = [0.0] * len(self._edges), [0.0] * len(self._edges)
        self._reached = [0] * len(self._edges)
        self.learn()

    def __repr__(self) -> str:
        typical = "unknown" if self.typical is None else f"{self.typical:.1f} s"
        return f"<DurationModel typical {typical}, {self._running} running, {self._ended} ended>"

    @property
    def typical(self) -> float | None:
        if not self._ended:
            return None
        if self._news:
            self.learn()
        left = math.log(2)
        for hazard, (start, end) in zip(self._hazard, pairwise(self._edges), strict=False):
            if hazard >= left:
                return start + left / hazard * (end - start)
            left -= hazard
        return self._edges[-1]

    def started(self) -> None:
        self._running += 1

    def left(self) -> None:
        self._running = max(0, self._running - 1)

    def saw_running(self, last_age: float, age: float) -> None:
        if 0 <= last_age < age:
            self._count_running(last_age, age)
            self._note(1)

    def saw_end(self, last_age: float, age: float, duration: float | None = None) -> None:
        # A duration that does not lie between the two polls measures something else.
        if not 0 <= last_age <= age:
            return
        if is_number(duration) and last_age < duration <= age:
            self._count_running(last_age, duration)
            last_age = age = duration
        self._spread_end(self._position(last_age), self._position(age))
        self._ended += 1
        self._new_ends += 1
        # The first ends are learned from at once, later ones a few at a time.
        self._note(LEARN_EVERY * (2 if self._ended > FIRST_ENDS else self._running + 1))

    def next_age(self, age: float, price: float, polls: int = 0) -> float:
        del polls
        if not 1e-9 < price < 1e12:
            price = self.policy.price
        k = bisect_right(self._edges, age, 1) - 1
        key = k, math.floor(PRICES_PER_OCTAVE * math.log2(price))
        interval = self._intervals.get(key)
        if interval is None:
            interval = self._intervals[key] = self._interval(*key)
        return self.policy.clamp(age, age + interval)

    def _note(self, news: int) -> None:
        self._news += news
        if self._news > LEARN_EVERY * self._running:
            self.learn()

    def learn(self) -> None:
        """Forget a little, and compute the hazard anew from all that is known."""
        keep = (1 - 1 / max(MEMORY, 2 * self._running)) ** self._new_ends
        tasks, reached = sum(self._reached), accumulate(self._reached)
        risk = [part + tasks - done for part, done in zip(self._risk, reached, strict=True)]
        self._reached = [0] * len(self._edges)
        self._ends = [keep * ends for ends in self._ends]
        self._risk = [keep * tasks for tasks in risk]
        self._prior.fade(keep)
        prior_ends, prior_risk = self._prior.counts()
        width = NEIGHBOURS[self._ended > FIRST_ENDS]
        ends = _pooled(map(add, self._ends, prior_ends), width)
        risk = _pooled(map(add, self._risk, prior_risk), width)
        thin = SMOOTHING / len(ends)
        self._hazard = [(a + thin) / (b + SMOOTHING) for a, b in zip(ends, risk, strict=True)]
        self._intervals.clear()
        self._new_ends = self._news = 0

    def _position(self, age: float) -> float:
        """Bin of *age*, plus the part of that bin which is over; the last bin has no end."""
        edges = self._edges
        k = bisect_right(edges, age, 1) - 1
        if k == len(edges) - 1:
            return k + 0.5
        return k + (age - edges[k]) / (edges[k + 1] - edges[k])

    def _count_running(self, last_age: float, age: float) -> None:
        """Count one task as having run from *last_age* to *age*."""
        for end, tasks in ((age, 1), (last_age, -1)):
            position = self._position(end)
            k = int(position)
            self._reached[k] += tasks
            self._risk[k] += tasks * (position - k)

    def _spread_end(self, first: float, last: float) -> None:
        """Count one end between two positions, spread over them by the present hazard."""
        self._prior.saw_end(int(first), int(last))
        parts = [(k, min(k + 1, last) - max(k, first)) for k in range(int(first), int(last) + 1)]
        alive, chances = 1.0, []
        for k, part in parts:
            chances.append(-alive * math.expm1(-self._hazard[k] * part))
            alive -= chances[-1]
        total = sum(chances)
        alive = 1.0
        for (k, part), chance in zip(parts, chances, strict=True):
            end = chance / total if total else 1 / len(parts)
            self._ends[k] += end
            self._risk[k] += part * (alive - end / 2)
            alive -= end

    def _interval(self, k: int, price_class: int) -> float:
        """Solve the inspection rule bin by bin, for the middles of a bin and a class of prices."""
        edges = self._edges
        age = (edges[k] + edges[k + 1]) / 2 if 0 < k < len(edges) - 1 else edges[k]
        price = 2 ** ((price_class + 0.5) / PRICES_PER_OCTAVE)
        alive, waste, start, limit = 1.0, 0.0, age, age + self.policy.max_interval
        while k < len(edges) - 1 and start < limit:
            width = edges[k + 1] - start
            part = width / (edges[k + 1] - edges[k])
            after = alive * math.exp(-self._hazard[k] * part)
            wasted = waste + width * (1 - (alive + after) / 2)
            if wasted >= price * after:
                density = (alive - after) / width
                slope, short = 1 - alive + price * density, price * alive - waste
                rest = 2 * short / (slope + math.sqrt(slope**2 + 2 * density * short))
                return start - age + rest
            alive, waste, start, k = after, wasted, edges[k + 1], k + 1
        return self.policy.max_interval


def _edges(policy: PollPolicy) -> list[float]:
    """Where the bins of age begin: at 0, at the shortest interval, and so on."""
    octaves = math.ceil(math.log2(policy.max_interval / policy.min_interval * HORIZON))
    steps = range(octaves * BINS_PER_OCTAVE + 1)
    return [0.0, *(policy.min_interval * 2 ** (k / BINS_PER_OCTAVE) for k in steps)]


def _chances(edges: list[float], cdf: Callable[[float], float]) -> list[float]:
    """Chance to end in each bin."""
    ended = [0.0, *map(cdf, edges[1:]), 1.0]
    return [after - before for before, after in pairwise(ended)]


def _pooled(values: Iterable[float], width: int) -> list[float]:
    """Sums over each bin and *width* neighbours on either side."""
    sums = [0.0, *accumulate(values)]
    padded = [0.0] * width + sums + [sums[-1]] * width
    return [after - before for before, after in zip(padded, padded[2 * width + 1 :], strict=False)]
