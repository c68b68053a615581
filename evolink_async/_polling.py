"""When to look next: the polling policy, the learned law of durations, the price of a look.

One look costs a request; not looking costs the seconds between the end of a task and
noticing it. With *price* the seconds of delay that one look is worth, the next look pays at
the age u where the delay expected to have been wasted since the last look (at age t, task
still running) has grown to the price, weighed by the chance that the task still runs then::

    integral from t to u of (F(x) - F(t)) dx  =  price * (1 - F(u))

F, the law of durations, is learned per kind of task as a hazard over log-spaced ages: ends
over at-risk, so that tasks still running count for as much as those that ended (completions
alone would be survivorship-biased whenever tasks overlap). See `DurationModel`.

Pure arithmetic: time is passed in, nothing here reads a clock. Ages are seconds since the
submit was sent.
"""

from __future__ import annotations

import math
from itertools import accumulate, count
from math import exp, log2, sqrt
from operator import add, mul, sub, truediv
from typing import TYPE_CHECKING, Any, Final, Protocol

from attrs import Attribute, define, field, frozen

from evolink_async.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from typing_extensions import TypeIs

__all__ = [
    "Backoff",
    "CallbackTrust",
    "DurationModel",
    "Pacer",
    "PollPolicy",
    "Schedule",
    "SharedReads",
]

BINS_PER_OCTAVE: Final = 16
PRICES_PER_OCTAVE: Final = 4
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
LOOKS_PER_LEARNING: Final = 100
ROUNDS_PER_LEARNING: Final = 8
"""Or after so many looks at each running task, if that is more."""

WHISPER: Final = 1e-3
"""Tasks spread over all ages so that no age is ever certain or impossible."""

KERNEL_RANGE: Final = (1.0, 6.0)
KERNEL_SCALE: Final = 0.3

SURPRISE_LIMIT: Final = 8.0
SURPRISE_SLACK: Final = 0.25
SURPRISE_KEEPS: Final = 0.1

FIRST_USEFULNESS: Final = 0.5
USEFULNESS_RATE: Final = 0.1
BEAT: Final = 2.5
"""Shortest intervals from one burst of reads to the next."""

MODELS_KEPT: Final = 64
MAX_WEIGHT: Final = 1e6


def _is_number(value: object) -> TypeIs[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_number(
    minimum: float, *, optional: bool = False
) -> Callable[[object, Attribute[Any], object], None]:
    allowed = f"a number from {minimum:g} to 1e9" + (" or None" if optional else "")

    def check(_: object, attribute: Attribute[Any], value: object) -> None:
        if value is None and optional:
            return
        if not _is_number(value) or not minimum <= value <= 1e9:
            raise ConfigurationError(f"{attribute.name}={value!r} is not allowed: {allowed}")

    return check


def _check_wait(_: object, attribute: Attribute[Any], value: object) -> None:
    if value is None:
        return
    allowed = "a tenacity wait strategy that needs only the attempt number, or None"
    try:
        for attempt in (1, 2, 10, 1_000):
            _ask(value, attempt)
    except Exception as error:
        raise ConfigurationError(
            f"{attribute.name}={value!r} is not allowed: {allowed} ({error})"
        ) from error


def _ask(wait: Any, attempt: int) -> float:
    """Seconds that *wait* answers; there is no outcome for it to look at."""
    from tenacity import RetryCallState  # noqa: PLC0415 - only who passes wait= pays for it

    state = RetryCallState(None, None, (), {})  # type: ignore[arg-type]  # only counts
    state.attempt_number = attempt
    return float(wait(state))


@frozen(kw_only=True)
class PollPolicy:
    """How a session decides when to look at its running tasks.

    By default it learns how long tasks take and looks where that pays. All times are
    seconds and scale together: for generations ten times as fast, divide all of them by
    ten.

    Attributes:
        price: Seconds of delay that one read is worth. More means fewer reads and later
            news; 0.5 is about five reads and two seconds for a lone 27 s generation. A
            read of many tasks is shared by them, and so is its price.
        min_interval: Least time between two looks at one task. Where more tasks run than one
            read can ask for, reads go out in bursts, 2.5 of it apart, unless *wait* is given.
        max_interval: Most time between two looks at one task.
        deadline: Age at which a task is given up, None for never.
        wait: A tenacity wait strategy, for plain backoff instead of learning. It sees the
            number of looks as ``attempt_number`` and nothing else; its answer is kept
            within the two intervals.

    Raises:
        ConfigurationError: A value is not allowed.
    """

    price: float = field(default=0.5, validator=_check_number(1e-6))
    min_interval: float = field(default=0.25, validator=_check_number(1e-6))
    max_interval: float = field(default=60.0, validator=_check_number(1e-6))
    deadline: float | None = field(default=3600.0, validator=_check_number(1e-6, optional=True))
    wait: Any = field(default=None, validator=_check_wait)

    def __attrs_post_init__(self) -> None:
        if self.max_interval < self.min_interval:
            raise ConfigurationError(
                f"max_interval={self.max_interval!r} is not allowed:"
                f" at least min_interval={self.min_interval!r}"
            )

    def clamp(self, age: float, proposed: float) -> float:
        """*proposed* brought into the bounds of a look after one at *age*; always later."""
        age = 0.0 if math.isnan(age) else age
        # In this order what is not a number loses.
        when = min(age + self.max_interval, max(age + self.min_interval, proposed))
        if self.deadline is not None and age < self.deadline < when:
            return self.deadline
        return when if when > age else math.nextafter(age, math.inf)


class Schedule(Protocol):
    """What the watcher asks and tells about one kind of task."""

    @property
    def typical(self) -> float | None:
        """Learned median duration in seconds, None while nothing was learned."""
        ...

    def next_age(self, age: float, price: float, looks: int = 0) -> float:
        """Age at which to look next, after *looks* looks, the last one sent at *age*."""
        ...

    def saw_running(self, last_age: float, age: float, tasks: int = 1) -> None:
        """A look sent at *age* found *tasks* running, the one before was at *last_age*."""
        ...

    def saw_end(self, last_age: float, age: float, duration: float | None = None) -> None:
        """The end came after *last_age* and was known at *age*; *duration* if it was told."""
        ...

    def started(self) -> None:
        """One more task of this kind is being watched."""
        ...

    def left(self) -> None:
        """One less, for whatever reason."""
        ...


@define(eq=False)
class Backoff:
    """The schedule of ``PollPolicy(wait=...)``: counts looks, learns nothing."""

    policy: PollPolicy
    typical: None = field(default=None, init=False)

    def next_age(self, age: float, price: float, looks: int = 0) -> float:
        """*price* has no say."""
        del price
        return self.policy.clamp(age, age + _ask(self.policy.wait, looks + 1))

    def saw_running(self, last_age: float, age: float, tasks: int = 1) -> None:
        """Nothing to learn."""

    def saw_end(self, last_age: float, age: float, duration: float | None = None) -> None:
        """Nothing to learn."""

    def started(self) -> None:
        """Nothing to count."""

    def left(self) -> None:
        """Nothing to count."""


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
    if not _is_number(estimate) or not 0 < estimate < math.inf:
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
    _enough_looks: float = field(default=LOOKS_PER_LEARNING, init=False)

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

    def saw_running(self, last_age: float, age: float, tasks: int = 1) -> None:
        """A look sent at *age* found *tasks* running, the one before was at *last_age*."""
        if not 0 <= last_age < age:
            return
        weight = self._weight * tasks
        self._lived_to(age, weight)
        self._looks += tasks
        if last_age:
            self._lived_to(last_age, -weight)

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
        between the two looks; elsewhere it measures something else and is not used.
        """
        if not 0 <= last_age <= age:
            return
        if _is_number(duration) and last_age < duration <= age:
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

    def next_age(self, age: float, price: float, looks: int = 0) -> float:
        """Age at which to look next, the last look was sent at *age*, 0 right after submit.

        *price* is in seconds per read; *looks* has no say.
        """
        del looks
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
        self._enough_looks = max(LOOKS_PER_LEARNING, ROUNDS_PER_LEARNING * self._running)

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


@define(eq=False)
class SharedReads:
    """What a seat in a shared read costs: the price of a read over its useful seats.

    A read takes the earliest-due tasks along, due or not. How useful that is to each is
    the part of its interval that has passed, cubed. The running mean of it over the seats
    of a read, times the seats a read can have, is the share: the price of a seat is the
    price of a read divided by it. The watcher's loop::

        batch = the earliest-due tasks, up to limit
        shared.saw_read(now, [(task.last_look, task.due, 1) for task in batch])
        price = shared.price(running)
        for each task of the answer still running:
            due = task.submitted + schedule.next_age(now - task.submitted, price)
            task.due = shared.on_beat(due, now, running)

    Attributes:
        base_price: Seconds of delay that one read is worth.
        limit: Most tasks in one read; 1 where reads cannot be shared.
        min_interval: Least seconds from one look at a task to the next.
        max_interval: Most.
        beats: False where looks are to keep their own time.
        usefulness: Mean usefulness of a seat, from 0 to 1.
    """

    base_price: float
    limit: int = 50
    min_interval: float = 0.25
    max_interval: float = math.inf
    beats: bool = True
    usefulness: float = field(default=FIRST_USEFULNESS, init=False)

    def share(self, running: int) -> float:
        """Useful seats expected in a read while *running* tasks are watched."""
        return max(1.0, self.usefulness * min(self.limit, running))

    def price(self, running: int) -> float:
        """Seconds of delay that one seat is worth while *running* tasks are watched."""
        return self.base_price / self.share(running)

    def on_beat(self, due: float, looked: float, running: int) -> float:
        """When to look at a task due at *due*: then, or together with others due about then.

        A request by itself costs the machine twice what it costs in a burst. Where one
        request is not enough for all *running* tasks, those that follow each other closely
        go out on the same beat, half of them a little early, half a little late; but not
        sooner than the shortest interval after they were last *looked* at. Who would be
        looked at too late by that, or is read singly, keeps to *due*.
        """
        if running <= self.limit or self.limit == 1 or not self.beats:
            return due
        tempo = BEAT * self.min_interval
        beat = math.floor(due / tempo + 0.5) * tempo
        if beat < looked + self.min_interval:
            beat += tempo
        return beat if beat <= looked + self.max_interval else due

    def saw_read(self, now: float, seats: Sequence[tuple[float, float, int]]) -> None:
        """A read is sent *now* with so many seats each for tasks of (last look, due, tasks)."""
        taken = sum(tasks for _, _, tasks in seats)
        if taken > 1:
            self.usefulness += USEFULNESS_RATE * (self.fill(now, seats) / taken - self.usefulness)

    @staticmethod
    def fill(now: float, seats: Iterable[tuple[float, float, int]]) -> float:
        """Useful seats of a read sent *now* for tasks of (last look, due, tasks)."""
        total = 0.0
        for last_look, due, tasks in seats:
            if now >= due:
                total += tasks
            elif now > last_look:
                total += tasks * ((now - last_look) / (due - last_look)) ** 3
        return total


@define(eq=False)
class CallbackTrust:
    """How often a completion is found by a look because its callback did not come.

    Looks at a task with a callback are priced by it: hardly any while callbacks come,
    plain polling by itself once they stop.

    Attributes:
        missed: The running share of completions without a callback, from 0.01 to 1.
        heard: Callbacks that came.
    """

    missed: float = field(default=0.01, init=False)
    heard: int = field(default=0, init=False)

    def price(self, price: float) -> float:
        """Price of a look at a task whose end should be told by a callback."""
        return price / self.missed

    def saw_callback(self) -> None:
        """A completion was told by its callback."""
        self.heard += 1
        self.missed = max(0.01, self.missed * 0.95)

    def saw_missed(self) -> None:
        """A completion was found by a look, without a callback."""
        self.missed += 0.3 * (1 - self.missed)


@define(eq=False)
class Pacer:
    """All that one session knows about when to look: a schedule per kind of task.

    Schedules are kept for the `MODELS_KEPT` kinds used last.
    """

    policy: PollPolicy
    shared: SharedReads = field(init=False)
    callbacks: CallbackTrust = field(init=False, factory=CallbackTrust)
    _grid: AgeGrid = field(init=False)
    _models: dict[Hashable, Schedule] = field(init=False, factory=dict)

    def __attrs_post_init__(self) -> None:
        policy = self.policy
        self.shared = SharedReads(
            policy.price,
            min_interval=policy.min_interval,
            max_interval=policy.max_interval,
            beats=policy.wait is None,
        )
        self._grid = AgeGrid.of(self.policy)

    def model(self, key: Hashable, estimate: object = None) -> Schedule:
        """The schedule of tasks of kind *key*, such as (endpoint, model).

        *estimate* is the server's ``estimated_time`` as it came, junk included; it only
        counts where the kind is new.
        """
        schedule = self.known(key) or self._new(estimate)
        self._models[key] = schedule
        if len(self._models) > MODELS_KEPT:
            del self._models[next(iter(self._models))]
        return schedule

    def known(self, key: Hashable) -> Schedule | None:
        """The schedule of tasks of kind *key* if there is one, which thereby is used last."""
        schedule = self._models.pop(key, None)
        if schedule is not None:
            self._models[key] = schedule
        return schedule

    def _new(self, estimate: object) -> Schedule:
        if self.policy.wait is not None:
            return Backoff(self.policy)
        return DurationModel(self.policy, self._grid, estimate)

    @property
    def typical(self) -> dict[Hashable, float]:
        """Learned median seconds of each kind that has shown one."""
        learned = ((key, model.typical) for key, model in self._models.items())
        return {key: seconds for key, seconds in learned if seconds is not None}
