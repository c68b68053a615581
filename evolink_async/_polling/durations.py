"""How long generations take, learned from those that have ended and those that still run."""

from __future__ import annotations

import math
from itertools import accumulate, count
from math import exp, log2, sqrt
from operator import add, mul, sub, truediv
from typing import Final

from attrs import define, field, frozen

from evolink_async._checks import is_number
from evolink_async._polling.policy import (
    PollPolicy,
)

__all__ = ["AgeGrid", "DurationModel"]

BINS_PER_OCTAVE: Final = 16
PRICES_PER_OCTAVE: Final = 4
MAX_WEIGHT: Final = 1e6
HORIZON: Final = 64
"""Ages are told apart up to this many longest intervals."""


PRIOR_TASKS: Final = 4.0
PRIOR_SIGMA: Final = 0.6
BLIND_SIGMA: Final = 1.0
"""Width of the prior where the server gave no estimate."""


PRIOR_SIGMA_RANGE: Final = (0.1, 0.8)
PRIOR_HOLD: Final = 3
PRIOR_REST: Final = 0.1
"""What is left of the prior for good; the rest is forgotten with the data of its time."""


MEMORY: Final = 50
ENDS_PER_LEARNING: Final = 2
CROWD_PER_LEARNING: Final = 2
"""The hazard is computed anew after so many ends: in a crowd half of those running."""


KNOWN_PER_LEARNING: Final = 25
"""But not for less than one in so many of the ends it is known from."""


POLLS_PER_LEARNING: Final = 100
ROUNDS_PER_LEARNING: Final = 8
"""Or after so many polls at each running task, if that is more."""


WHISPER: Final = 1e-3
"""Tasks spread over all ages so that no age is ever certain or impossible."""


KERNEL_RANGE: Final = (1.0, 6.0)
KERNEL_SCALE: Final = 0.3
SURPRISE_LIMIT: Final = 8.0
SURPRISE_SLACK: Final = 0.25
SURPRISE_KEEPS: Final = 0.1


@frozen
class AgeGrid:
    """Bins of age: one below *low*, from there `BINS_PER_OCTAVE` to each doubling."""

    low: float
    count: int
    offset: float
    edges: tuple[float, ...]

    @classmethod
    def of(cls, policy: PollPolicy) -> AgeGrid:
        """Fine enough for the shortest interval, long enough for many of the longest."""
        low = policy.min_interval
        octaves = min(40, max(8, math.ceil(math.log2(policy.max_interval / low * HORIZON))))
        count = 1 + octaves * BINS_PER_OCTAVE
        edges = (low * 2 ** (k / BINS_PER_OCTAVE) for k in range(count))
        return cls(
            low=low,
            count=count,
            offset=1 - BINS_PER_OCTAVE * math.log2(low),
            edges=(0.0, *edges),
        )

    @property
    def high(self) -> float:
        """Where the last bin begins; it has no end."""
        return self.edges[-2]

    def position(self, age: float) -> float:
        """Bin of *age* plus the part of it that is over."""
        if self.low < age < self.high:
            return BINS_PER_OCTAVE * math.log2(age) + self.offset
        return max(0.0, min(age / self.low, 1.0)) if age <= self.low else self.count - 0.5

    def age(self, position: float) -> float:
        """The age at *position*."""
        return self.low * math.exp2((position - 1) / BINS_PER_OCTAVE)

    def lognormal(self, median: float, sigma: float) -> tuple[list[float], list[float]]:
        """Ends and at-risk per bin of one task drawn from that law."""
        step = math.log(2) / BINS_PER_OCTAVE / sigma / sqrt(2)
        first = math.log(median / self.low) / sigma / sqrt(2)
        cdf = [0.0, *(0.5 * math.erfc(first - k * step) for k in range(self.count - 1)), 1.0]
        ends = list(map(sub, cdf[1:], cdf))
        return ends, [1 - before - end / 2 for before, end in zip(cdf, ends, strict=False)]


def _first_guess(estimate: object, policy: PollPolicy) -> tuple[float, float]:
    """Median and sigma to start from, whatever the server's ``estimated_time`` was."""
    if not is_number(estimate) or not 0 < estimate < math.inf:
        return policy.max_interval / 2, BLIND_SIGMA
    longest = policy.max_interval * HORIZON / 4
    return float(min(max(estimate, policy.min_interval), longest)), PRIOR_SIGMA


def _bare(count: int) -> list[float]:
    return [0.0] * count


@define(eq=False, repr=False)
class DurationModel:
    """The law of durations of one kind of task, as far as it has shown itself.

    Per bin of age it holds the tasks that ended there and the tasks that were at risk of
    it; their ratio is the hazard, pooled over neighbouring bins: the fewer, the narrower
    the law (its shortest half) and the more ends there are.

    A prior of `PRIOR_TASKS` tasks drawn from a lognormal law around the server's estimate
    stands in for data at first, and moves to where the data are. The past fades with a
    memory of `MEMORY` tasks, or twice those running if that is more; it fades at once when
    the ends are far more or fewer than expected (a running sum of the difference, CUSUM).

    Looking up the next age costs about a microsecond: answers are kept per bin of age and
    per class of price until the hazard is computed anew.
    """

    policy: PollPolicy
    grid: AgeGrid
    estimate: object = None
    _running: int = field(default=0, init=False)
    _ends: list[float] = field(init=False)
    _risk: list[float] = field(init=False)
    _new_ends: list[float] = field(init=False)
    _new_risk: list[float] = field(init=False)
    # Looks that found a task running, as bins lived through from age 0: whole ones, by the
    # first bin not finished, and the part of that one. A later look takes back the earlier.
    _whole: list[float] = field(init=False)
    _part: list[float] = field(init=False)
    _weight: float = field(default=1.0, init=False)
    _guess: tuple[float, float] = field(init=False)
    _prior: tuple[list[float], list[float]] = field(init=False)
    _prior_weight: float = field(default=1.0, init=False)
    _seen: int = field(default=0, init=False)
    _fresh: int = field(default=0, init=False)
    _looks: int = field(default=0, init=False)
    _too_late: float = field(default=0.0, init=False)
    _too_early: float = field(default=0.0, init=False)
    _hazard: list[float] = field(init=False)
    _survival: list[float] = field(init=False)
    # Intervals by bin of age, by class of price; the row of the price asked for last.
    _rows: dict[int, list[float | None]] = field(init=False, factory=dict)
    _row: list[float | None] = field(init=False)
    _row_price: float = field(default=math.nan, init=False)
    _row_class: int = field(default=0, init=False)
    _low: float = field(init=False)
    _high: float = field(init=False)
    _offset: float = field(init=False)
    _last_look: float = field(init=False)
    _enough_ends: float = field(default=1, init=False)
    _enough_looks: float = field(default=POLLS_PER_LEARNING, init=False)

    def __attrs_post_init__(self) -> None:
        count, deadline = self.grid.count, self.policy.deadline
        self._low, self._high, self._offset = self.grid.low, self.grid.high, self.grid.offset
        self._last_look = math.inf if deadline is None else deadline
        self._ends, self._risk, self._row = _bare(count), _bare(count), []
        self._guess = _first_guess(self.estimate, self.policy)
        self._prior = self.grid.lognormal(*self._guess)
        self._forget_news()
        self._believe(width=int(KERNEL_RANGE[1]))

    def __repr__(self) -> str:
        typical = "unknown" if self.typical is None else f"{self.typical:.1f} s"
        return f"<DurationModel typical {typical}, {self._running} running, {self._seen} ended>"

    @property
    def typical(self) -> float | None:
        """Learned median duration in seconds, None before the first end."""
        if not self._seen:
            return None
        if self._fresh:
            self.learn()
        below = next(k for k, s in enumerate([*self._survival, 0.0]) if s < 0.5)
        edges = self.grid.edges
        if below >= len(edges):
            return edges[-1]
        upper, lower = self._survival[below - 1], self._survival[below]
        part = (upper - 0.5) / (upper - lower)
        return edges[below - 1] + part * (edges[below] - edges[below - 1])

    def started(self) -> None:
        """One more task of this kind is being watched."""
        self._running += 1

    def left(self) -> None:
        """One less, for whatever reason."""
        self._running = max(0, self._running - 1)

    def saw_running(self, last_age: float, age: float) -> None:
        """A poll sent at *age* found the task running, the one before was at *last_age*."""
        if not 0 <= last_age < age:
            return
        self._lived_to(age, self._weight)
        self._looks += 1
        if last_age:
            self._lived_to(last_age, -self._weight)

    def _lived_to(self, age: float, weight: float) -> None:
        # Called for every read, as is next_age: position() stands in line.
        inside = self._low < age < self._high
        x = BINS_PER_OCTAVE * log2(age) + self._offset if inside else self.grid.position(age)
        k = int(x)
        self._whole[k] += weight
        self._part[k] += weight * (x - k)

    def saw_end(self, last_age: float, age: float, duration: float | None = None) -> None:
        """One end, spread over (*last_age*, *age*] as is believed now.

        *duration*, where the server told one, is taken for the age of the end if it lies
        between the two polls; elsewhere it measures something else and is not used.
        """
        if not 0 <= last_age <= age:
            return
        if is_number(duration) and last_age < duration <= age:
            self._add_end(last_age, duration, exactly=True)
        else:
            self._add_end(last_age, age, exactly=False)
        self._seen += 1
        self._fresh += 1
        keep = 1 - 1 / self._memory
        self._weight /= keep
        self._prior_weight = self._prior_weight * keep + PRIOR_REST * (1 - keep)
        if self._weight > MAX_WEIGHT:
            self.learn()

    @property
    def _memory(self) -> int:
        return max(MEMORY, 2 * self._running)

    def _add_end(self, last_age: float, age: float, *, exactly: bool) -> None:
        lo, hi = self.grid.position(last_age), self.grid.position(age)
        first, last = int(lo), int(hi)
        spans = [1.0] * (last - first + 1)
        spans[0] -= lo - first
        spans[-1] -= last + 1 - hi
        certain = exactly or first == last
        chances = [0.0] * (last - first) + [1.0] if certain else self._chances(first, spans)
        left = 1.0
        for k, span, chance in zip(range(first, last + 1), spans, chances, strict=True):
            left -= chance
            self._new_ends[k] += self._weight * chance
            # In an exact end's own bin the whole span was lived through, else half of it.
            lived = left + (chance if exactly else chance / 2)
            self._new_risk[k] += self._weight * span * lived

    def _chances(self, first: int, spans: list[float]) -> list[float]:
        """Where an end within these parts of bins is believed to have been."""
        survival = self._survival[first : first + len(spans) + 1]
        likely = [span * (a - b) for span, a, b in zip(spans, survival, survival[1:], strict=False)]
        total = sum(likely)
        if total < 1e-200:  # Beyond all belief: anywhere.
            likely = [span + 1e-9 for span in spans]
            total = sum(likely)
        return [part / total for part in likely]

    def next_age(self, age: float, price: float, polls: int = 0) -> float:
        """Age at which to look next, the last look was sent at *age*, 0 right after submit.

        *price* is in seconds per read; *polls* has no say.
        """
        del polls
        if self._fresh >= self._enough_ends or self._looks >= self._enough_looks:
            self.learn()
        if price != self._row_price:
            self._choose_row(price)
        inside = self._low < age < self._high
        k = int(BINS_PER_OCTAVE * log2(age) + self._offset if inside else self.grid.position(age))
        interval = self._row[k]
        if interval is None:
            interval = self._row[k] = self._interval(k)
        when = age + interval
        return when if age < when <= self._last_look else self.policy.clamp(age, when)

    def _choose_row(self, price: float) -> None:
        usable = price if 1e-9 < price < 1e12 else self.policy.price
        self._row_price = price
        self._row_class = math.floor(PRICES_PER_OCTAVE * log2(usable))
        row = self._rows.get(self._row_class)
        if row is None:
            row = self._rows[self._row_class] = [None] * self.grid.count
        self._row = row

    def learn(self) -> None:
        """Take in what was seen since the last time and compute the hazard anew."""
        lived = list(accumulate(reversed(self._whole)))[-2::-1]
        risk = list(map(add, map(add, self._new_risk, self._part), [*lived, 0.0]))
        if self._surprised(sum(map(mul, risk, self._hazard)) / self._weight):
            self._ends = [SURPRISE_KEEPS * end for end in self._ends]
            self._risk = [SURPRISE_KEEPS * part for part in self._risk]
        self._ends = list(map(add, self._ends, self._new_ends))
        self._risk = list(map(add, self._risk, risk))
        self._rescale()
        self._forget_news()
        known = sum(self._ends)
        if self._prior_weight * PRIOR_TASKS > known / 20 and self._seen:
            self._move_prior()
        self._believe(self._kernel_width(known))

    def _surprised(self, expected: float) -> bool:
        """True if the sum of surprises says that durations are not what they were."""
        slack = SURPRISE_SLACK * max(expected, self._fresh)
        self._too_late = max(0.0, self._too_late + expected - self._fresh - slack)
        self._too_early = max(0.0, self._too_early + self._fresh - expected - slack)
        if max(self._too_late, self._too_early) < SURPRISE_LIMIT:
            return False
        self._too_late = self._too_early = 0.0
        return True

    def _rescale(self) -> None:
        self._ends = [end / self._weight for end in self._ends]
        self._risk = [part / self._weight for part in self._risk]
        self._weight = 1.0

    def _forget_news(self) -> None:
        count = self.grid.count
        self._new_ends, self._new_risk = _bare(count), _bare(count)
        self._whole, self._part = _bare(count), _bare(count)
        self._fresh = self._looks = 0
        crowd = self._running // CROWD_PER_LEARNING
        # After each of the first ends, but not in a crowd.
        enough = max(ENDS_PER_LEARNING, crowd) if self._seen > 20 else max(1, crowd // 4)
        self._enough_ends = max(enough, sum(self._ends) / KNOWN_PER_LEARNING)
        self._enough_looks = max(POLLS_PER_LEARNING, ROUNDS_PER_LEARNING * self._running)

    def _move_prior(self) -> None:
        """Move the prior to where the present belief is, as wide as it is.

        The first estimate goes on counting as `PRIOR_HOLD` tasks: a few lucky ones in a
        row must not make it certain.
        """
        mass = list(map(sub, self._survival, self._survival[1:]))
        total = sum(mass)
        mean = sum(map(mul, mass, count())) / total
        variance = sum(map(mul, mass, [(k - mean) ** 2 for k in range(len(mass))])) / total
        octave = math.log(2) / BINS_PER_OCTAVE
        trust = self._seen / (PRIOR_HOLD + self._seen)
        guess, sigma = self._guess
        start = self.grid.position(guess)
        median = self.grid.age(start + trust * (mean + 0.5 - start))
        spread = sqrt(trust * variance * octave**2 + (1 - trust) * sigma**2)
        narrow, wide = PRIOR_SIGMA_RANGE
        self._prior = self.grid.lognormal(median, min(max(spread, narrow), wide))

    def _kernel_width(self, known: float) -> int:
        """Bins to pool on each side: by the shortest range of ages that holds half of all."""
        narrow, wide = KERNEL_RANGE
        spread = _shortest_half(self._survival) * KERNEL_SCALE
        return round(min(max(spread * math.pow(MEMORY / max(1.0, known), 0.2), narrow), wide))

    def _believe(self, width: int) -> None:
        """Hazard and survival per bin, from data, prior and whisper."""
        prior = self._prior_weight * PRIOR_TASKS
        thin = WHISPER / self.grid.count
        pairs = zip(self._ends, self._prior[0], strict=True)
        ends = _pooled([end + guess * prior + thin for end, guess in pairs], width)
        pairs = zip(self._risk, self._prior[1], strict=True)
        risk = _pooled([part + guess * prior + WHISPER for part, guess in pairs], width)
        self._hazard = list(map(truediv, ends, risk))
        alive = [exp(-hazard) for hazard in self._hazard]
        self._survival = list(accumulate(alive, mul, initial=1.0))
        self._rows.clear()
        self._row_price = math.nan

    def _interval(self, k: int) -> float:
        """What the rent rule says in the middle of bin *k* and of the class of price."""
        edges, last = self.grid.edges, self.grid.count - 1
        age = (edges[k] + edges[k + 1]) / 2 if 0 < k < last else edges[k]
        price = 2 ** ((self._row_class + 0.5) / PRICES_PER_OCTAVE)
        interval = self._rent(age, price) - age
        return min(max(interval, self.policy.min_interval), self.policy.max_interval)

    def _rent(self, age: float, price: float) -> float:
        """Solve the rent rule bin by bin, given that the task runs at *age*."""
        edges, last = self.grid.edges, self.grid.count - 1
        limit = age + self.policy.max_interval
        k = int(self.grid.position(age))
        alive, waste, start = 1.0, 0.0, age
        while k < last and start < limit:
            width = edges[k + 1] - start
            part = width / (edges[k + 1] - edges[k])
            after = alive * exp(-self._hazard[k] * part)
            wasted = waste + width * (1 - (alive + after) / 2)
            if wasted >= price * after:
                density = (alive - after) / width
                slope = 1 - alive + price * density
                short = price * alive - waste
                return start + 2 * short / (slope + sqrt(slope**2 + 2 * density * short))
            alive, waste, start, k = after, wasted, edges[k + 1], k + 1
        return limit


def _shortest_half(survival: list[float]) -> int:
    """Bins in the shortest run that holds half of the mass."""
    half, last = (survival[0] - survival[-1]) / 2, len(survival) - 1
    best, end = last, 0
    for start, height in enumerate(survival):
        while end < last and height - survival[end] < half:
            end += 1
        if height - survival[end] < half:
            break  # nor is there that much further on
        best = min(best, end - start)
    return best


def _pooled(values: list[float], width: int) -> list[float]:
    """Sums over each bin and *width* neighbours on both sides."""
    sums = [0.0, *accumulate(values)]
    padded = [0.0] * width + sums + [sums[-1]] * width
    return list(map(sub, padded[2 * width + 1 :], padded))
