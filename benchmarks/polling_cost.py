"""What looking costs: the shipped policy against fixed, doubling and vendor schedules.

Simulated, no network::

    python benchmarks/polling_cost.py [--quick] [--price 0.5]
    python benchmarks/polling_cost.py --durations FILE [--estimate SECONDS]

The cost of a task is ``J = price * reads + delay``: delay is the seconds between its end
and noticing it. The limit is the least expected J for a known law of durations (the
inspection schedule of Barlow, Hunter and Proschan, 1963), by dynamic programming.
FILE holds durations in seconds, separated by white space, in the order they happened.
Same seed, same numbers.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import statistics
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from heapq import heappop, heappush
from itertools import pairwise
from pathlib import Path
from time import perf_counter

import attrs
from attrs import define, frozen

from evolink_async._polling.durations import DurationModel
from evolink_async._polling.policy import PollPolicy, Schedule
from evolink_async._polling.pricing import Pacer

Cdf = Callable[[float], float]
Look = Callable[[float], float]
"""Age of the last look -> age of the next."""

PHASES = ((0, 20), (20, 100), (100, 1000))
LATENCY = 0.005
POST_SECONDS = 0.0003
READ_LIMIT = 50


# --- laws of durations -----------------------------------------------------------------


def lognormal(median: float, sigma: float) -> Cdf:
    return lambda t: 0.5 * math.erfc(math.log(median / t) / sigma / math.sqrt(2)) if t > 0 else 0.0


def gamma4(mean: float) -> Cdf:
    def cdf(t: float) -> float:
        x = 4 * t / mean
        return 1 - math.exp(-x) * (1 + x + x**2 / 2 + x**3 / 6)

    return cdf


def uniform(low: float, high: float) -> Cdf:
    return lambda t: min(1.0, max(0.0, (t - low) / (high - low)))


def weibull(scale: float, shape: float, shift: float = 0.0) -> Cdf:
    return lambda t: -math.expm1(-((max(0.0, t - shift) / scale) ** shape))


def mixed(weight: float, first: Cdf, second: Cdf) -> Cdf:
    return lambda t: weight * first(t) + (1 - weight) * second(t)


def stretched(cdf: Cdf, factor: float) -> Cdf:
    return lambda t: cdf(t / factor)


@define
class Law:
    """A law of durations, tabulated at every *step* seconds."""

    name: str
    step: float
    cdf: list[float]
    area: list[float]
    """Integral of cdf from 0."""
    _limits: dict[float, float] = attrs.field(init=False, factory=dict)

    @classmethod
    def of(cls, name: str, cdf: Cdf, step: float = 0.05) -> Law:
        table = [cdf(0.0)]
        while table[-1] < 1 - 1e-7:
            table.append(cdf(len(table) * step))
        area = [0.0]
        for a, b in pairwise(table):
            area.append(area[-1] + step * (a + b) / 2)
        return cls(name, step, table, area)

    @property
    def median(self) -> float:
        return self.quantile(0.5)

    def quantile(self, u: float) -> float:
        k = min(max(1, bisect_left(self.cdf, u)), len(self.cdf) - 1)
        a, b = self.cdf[k - 1], self.cdf[k]
        return (k - 1 + min(1.0, (u - a) / (b - a))) * self.step if b > a else k * self.step

    def sample(self, rng: random.Random) -> float:
        return self.quantile(rng.random())

    def at(self, t: float) -> tuple[float, float]:
        """Chance of having ended by *t*, and its integral from 0."""
        k = int(t / self.step)
        if k >= len(self.cdf) - 1:
            return 1.0, self.area[-1] + t - (len(self.cdf) - 1) * self.step
        y = t - k * self.step
        slope = (self.cdf[k + 1] - self.cdf[k]) / self.step
        return self.cdf[k] + slope * y, self.area[k] + self.cdf[k] * y + slope * y * y / 2

    def expected(self, look: Look, price: float) -> float:
        """Expected J of one task polled at by that schedule."""
        t, ended, area, total = 0.0, *self.at(0.0), 0.0
        while 1 - ended > 1e-5:
            u = look(t)
            ended_then, area_then = self.at(u)
            total += price * (1 - ended) + area_then - area - ended * (u - t)
            t, ended, area = u, ended_then, area_then
        return total

    def limit(self, price: float) -> float:
        """Least expected J. A candidate next look is a line, so the minimum is a hull."""
        if price not in self._limits:
            self._limits[price] = self._solve(price)
        return self._limits[price]

    def _solve(self, price: float) -> float:
        # W(t) = price S(t) - A(t) + F(t) t + min over s > t of (A(s) + W(s) - F(t) s)
        last = len(self.cdf) - 1
        hull = [(last * self.step, self.area[last])]
        best, value = 0, 0.0
        for k in range(last - 1, -1, -1):
            t, ended = k * self.step, self.cdf[k]
            best = min(best, len(hull) - 1)
            while best + 1 < len(hull) and _on(hull[best + 1], ended) <= _on(hull[best], ended):
                best += 1
            value = price * (1 - ended) - self.area[k] + ended * t + _on(hull[best], ended)
            _add_line(hull, (t, self.area[k] + value))
        return value


def _on(line: tuple[float, float], ended: float) -> float:
    return line[1] - line[0] * ended


def _add_line(hull: list[tuple[float, float]], line: tuple[float, float]) -> None:
    while len(hull) > 1:
        (s1, b1), (s2, b2) = hull[-1], hull[-2]
        if (line[1] - b2) * (s2 - s1) > (b1 - b2) * (s2 - line[0]):
            break
        hull.pop()
    hull.append(line)


def laws() -> list[Law]:
    return [
        Law.of("lognormal 25, .3", lognormal(25, 0.3)),
        Law.of("lognormal 25, .4", lognormal(25, 0.4)),
        Law.of("lognormal 25, .8", lognormal(25, 0.8)),
        Law.of("gamma 4, mean 27", gamma4(27)),
        Law.of("uniform 10..60", uniform(10, 60)),
        Law.of("exponential 25", weibull(25, 1)),
        Law.of("bimodal 15 / 50", mixed(0.6, lognormal(15, 0.2), lognormal(50, 0.2))),
        Law.of("Weibull 30, 2", weibull(30, 2)),
        Law.of("10 + exponential 15", weibull(15, 1, 10)),
    ]


def apart() -> Law:
    return Law.of("lognormal 25, .03", lognormal(25, 0.03), 0.01)


KNOWN_LIMITS = {
    "lognormal 25, .3": (2.58, 3.69, 5.32, 7.79),
    "lognormal 25, .4": (2.94, 4.20, 6.05, 8.82),
    "lognormal 25, .8": (4.04, 5.78, 8.33, 12.12),
    "gamma 4, mean 27": (3.27, 4.67, 6.71, 9.74),
    "uniform 10..60": (3.46, 4.97, 7.18, 10.45),
    "exponential 25": (3.70, 5.34, 7.75, 11.38),
}
"""Limits at prices 0.25, 0.5, 1 and 2, computed elsewhere: what the solver must find."""


# --- schedules -------------------------------------------------------------------------


def fixed(interval: float) -> Look:
    return lambda age: age + interval


def doubling(cap: float) -> Look:
    return lambda age: age + min(cap, age + 1)


def vendor(rng: random.Random) -> Look:
    return lambda age: age + (rng.uniform(3, 5) if age else 3)


def from_estimate(estimate: float) -> Look:
    return lambda age: age * 1.5 if age else 0.6 * estimate


def plain_schedules(estimate: float, rng: random.Random) -> list[tuple[str, Look]]:
    every = [(f"every {s:g} s", fixed(s)) for s in (0.1, 0.5, 1, 3, 5, 10)]
    doubled = [(f"1 s doubling to {cap} s", doubling(cap)) for cap in (10, 30, 60)]
    return [
        *every,
        *doubled,
        ("3 s, then 3-5 s", vendor(rng)),
        (".6 of estimate, then x1.5", from_estimate(estimate)),
    ]


def follow(schedule: Schedule, price: float) -> Look:
    return lambda age: schedule.next_age(age, price)


# --- one task at a time ----------------------------------------------------------------


def live(schedule: Schedule, duration: float, price: float) -> float:
    """One task from submit to end, alone; its J."""
    schedule.started()
    age, reads = 0.0, 0
    while True:
        look = schedule.next_age(age, price, reads)
        reads += 1
        if look >= duration:
            break
        schedule.saw_running(age, look)
        age = look
    schedule.saw_end(age, look)
    schedule.left()
    return price * reads + look - duration


def alone(
    stages: Sequence[tuple[Law, int]], estimate: float, price: float, seed: int
) -> list[float]:
    """J over the limit of each task, as expected from the schedule it meets."""
    rng = random.Random(seed)
    schedule = Pacer(PollPolicy(price=price)).model("task", estimate)
    ratios = []
    for law, tasks in stages:
        for _ in range(tasks):
            ratios.append(law.expected(follow(schedule, price), price) / law.limit(price))
            live(schedule, law.sample(rng), price)
    return ratios


def phase_means(runs: Sequence[Sequence[float]], phases: Iterable[tuple[int, int]]) -> list[float]:
    return [statistics.fmean(x for run in runs for x in run[a:b]) for a, b in phases]


# --- many tasks ------------------------------------------------------------------------


@define(eq=False)
class Seat:
    """A running task as the watcher sees it, and when it will end."""

    submitted: float
    ends: float
    last_poll: float
    due: float = 0.0


@define
class Watcher:
    """The session's watcher in simulated time: one heap, shared reads, the shipped policy."""

    pacer: Pacer
    schedule: Schedule
    heap: list[tuple[float, int, Seat]] = attrs.field(factory=list)
    running: int = 0
    reads: int = 0
    order: int = 0

    def watch(self, seat: Seat) -> None:
        self.running += 1
        self.schedule.started()
        price = self.pacer.shared.price(self.running)
        self.queue(seat, seat.submitted + self.schedule.next_age(0.0, price))

    def queue(self, seat: Seat, due: float) -> None:
        seat.due = self.pacer.shared.on_beat(due, seat.last_poll, self.running)
        self.order += 1
        heappush(self.heap, (seat.due, self.order, seat))

    def read(self, now: float) -> list[Seat]:
        """One request for the earliest-due tasks; returns those that have ended."""
        seats = min(self.pacer.shared.limit, len(self.heap))
        batch = [heappop(self.heap)[2] for _ in range(seats)]
        shared = self.pacer.shared
        shared.saw_read(now, [(seat.last_poll, seat.due) for seat in batch])
        self.reads += 1
        price = shared.price(self.running)
        received = now + LATENCY
        ended = []
        for seat in batch:
            if seat.ends <= now + LATENCY / 2:
                ended.append(seat)
                self.end(seat, received)
            else:
                self.go_on(seat, now, received, price)
        return ended

    def end(self, seat: Seat, received: float) -> None:
        self.schedule.saw_end(seat.last_poll - seat.submitted, received - seat.submitted)
        self.schedule.left()
        self.running -= 1

    def go_on(self, seat: Seat, now: float, received: float, price: float) -> None:
        age = now - seat.submitted
        self.schedule.saw_running(seat.last_poll - seat.submitted, age)
        seat.last_poll = now
        due = seat.submitted + self.schedule.next_age(age, price)
        self.queue(seat, max(received, due))


@frozen
class Crowd:
    """What a crowd of tasks cost, per task."""

    requests: float
    delay: float

    def cost(self, price: float) -> float:
        """J per task; the submit is not a read."""
        return price * (self.requests - 1) + self.delay

    @classmethod
    def mean(cls, crowds: Sequence[Crowd]) -> Crowd:
        return cls(
            statistics.fmean(crowd.requests for crowd in crowds),
            statistics.fmean(crowd.delay for crowd in crowds),
        )


def crowd(law: Law, policy: PollPolicy, *, n: int, tasks: int, seed: int) -> Crowd:
    """*n* tasks submitted at once and, while there are more, one new one at each end seen.

    Where there are more, the first third is not counted.
    """
    rng = random.Random(seed)
    pacer = Pacer(policy)
    pacer.shared.limit = READ_LIMIT
    watcher = Watcher(pacer, pacer.model("task", law.median))
    left = tasks

    def submit(now: float) -> None:
        nonlocal left
        left -= 1
        watcher.watch(Seat(submitted=now, ends=now + law.sample(rng), last_poll=now))

    for k in range(n):
        submit(k * POST_SECONDS)
    warm = tasks // 3 if tasks > n else 0
    now, done, delay, reads_before = 0.0, 0, 0.0, 0
    while watcher.heap:
        now = max(now + 0.001, watcher.heap[0][0])
        for seat in watcher.read(now):
            done += 1
            delay += now + LATENCY - seat.ends if done > warm else 0.0
            if done == warm:
                reads_before = watcher.reads
            if left:
                submit(now + LATENCY)
    counted = tasks - warm
    return Crowd(1 + (watcher.reads - reads_before) / counted, delay / counted)


def bare_loop(law: Law, n: int, seed: int, interval: float = 1.0) -> Crowd:
    """All running tasks are read every *interval* seconds, 50 ids a request; all at once."""
    rng = random.Random(seed)
    ends = sorted(law.sample(rng) for _ in range(n))
    polls = [math.ceil(end / interval) for end in ends]
    reads = sum(
        math.ceil((n - bisect_left(polls, look)) / READ_LIMIT) for look in range(1, polls[-1] + 1)
    )
    delay = sum(look * interval - end for look, end in zip(polls, ends, strict=True))
    return Crowd(1 + reads / n, delay / n)


# --- tables ----------------------------------------------------------------------------


def table(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    lines = [head, *rows]
    widths = [max(len(line[k]) for line in lines) for k in range(len(head))]
    print(f"\n{title}")
    for line in lines:
        cells = (cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True))
        print("  " + "  ".join([line[0].ljust(widths[0]), *cells]))


def show_limits(all_laws: Sequence[Law]) -> None:
    prices = (0.25, 0.5, 1.0, 2.0)
    rows, worst = [], 0.0
    for law in all_laws:
        found = [law.limit(price) for price in prices]
        rows.append([law.name, *(f"{value:.2f}" for value in found)])
        known = KNOWN_LIMITS.get(law.name, tuple(found))
        worst = max(worst, *(abs(a - b) for a, b in zip(found, known, strict=True)))
    table("Limit: least expected J", ["law", *(f"price {p:g}" for p in prices)], rows)
    print(f"  against known values: off by at most {worst:.3f}")


def show_schedules(all_laws: Sequence[Law], price: float) -> None:
    ratios: dict[str, list[float]] = {}
    for law in all_laws:
        for name, look in plain_schedules(law.median, random.Random(1)):
            ratios.setdefault(name, []).append(law.expected(look, price) / law.limit(price))
    rows = [
        [name, f"{statistics.fmean(values):.2f}", f"{min(values):.2f}", f"{max(values):.2f}"]
        for name, values in ratios.items()
    ]
    title = (
        f"One task at a time, price {price:g}: J / limit of plain schedules, {len(all_laws)} laws"
    )
    table(title, ["schedule", "mean", "best law", "worst law"], rows)


def show_shipped(all_laws: Sequence[Law], price: float, seeds: range, tasks: int) -> None:
    phases = [(a, min(b, tasks)) for a, b in PHASES]
    head = ["law", *(f"x{f:g}: {a + 1}-{b}" for f in (1, 0.5, 2) for a, b in phases)]
    rows, means = [], []
    for law in [*all_laws, apart()]:
        cells = []
        for factor in (1, 0.5, 2):
            runs = [alone([(law, tasks)], law.median * factor, price, seed) for seed in seeds]
            cells += phase_means(runs, phases)
        means.append(cells)
        rows.append([law.name, *(f"{cell:.2f}" for cell in cells)])
    mean = [statistics.fmean(column) for column in zip(*means[:-1], strict=True)]
    rows.insert(-1, [f"mean of {len(all_laws)}", *(f"{cell:.3f}" for cell in mean)])
    rows[-1][0] += " (apart)"
    title = f"Shipped policy alone, price {price:g}: J / limit by task number"
    table(f"{title}, estimate x1 (right), x0.5, x2", head, rows)


def show_drift(all_laws: Sequence[Law], price: float, seeds: range) -> None:
    phases = ((180, 200), (200, 220), (220, 260), (260, 300))
    rows = []
    for factor in (2.0, 0.5):
        runs = []
        for law in all_laws[:6]:
            table_ = law.cdf

            def cdf(t: float, table_: list[float] = table_, step: float = law.step) -> float:
                return table_[min(len(table_) - 1, round(t / step))]

            other = Law.of(f"{law.name} x{factor:g}", stretched(cdf, factor))
            stages = [(law, 200), (other, 100)]
            runs += [alone(stages, law.median, price, seed) for seed in seeds]
        rows.append([f"x{factor:g}", *(f"{cell:.2f}" for cell in phase_means(runs, phases))])
    title = f"Drift, price {price:g}: all durations change at task 200; J / limit, mean of six laws"
    table(title, ["change", "20 before", "first 20", "next 40", "next 40"], rows)


def show_crowds(price: float, seeds: range, sizes: Sequence[int]) -> None:
    law = Law.of("lognormal 25, .4", lognormal(25, 0.4))
    policy = PollPolicy(price=price)
    rows = []
    for n in sizes:
        few = seeds if n < 1000 else seeds[: max(1, len(seeds) // 2)]
        at_once = Crowd.mean([crowd(law, policy, n=n, tasks=n, seed=seed) for seed in few])
        steady = Crowd.mean([crowd(law, policy, n=n, tasks=max(300, 3 * n), seed=few[0])])
        naive = Crowd.mean([bare_loop(law, n, seed) for seed in few])
        rows.append(
            [str(n), *(cell for c in (at_once, steady, naive) for cell in _cells(c, price))]
        )
    head = ["N", "at once", "delay", "J", "closed loop", "delay", "J", "loop 1 s", "delay", "J"]
    title = f"N tasks of lognormal(25, .4), price {price:g}, {READ_LIMIT} a read"
    table(f"{title}: requests per task (POST included), mean delay in s, J", head, rows)


def _cells(crowd_: Crowd, price: float) -> Iterator[str]:
    yield f"{crowd_.requests:.2f}"
    yield f"{crowd_.delay:.3f}"
    yield f"{crowd_.cost(price):.3f}"


def show_callbacks(price: float) -> None:
    """Looks at tasks whose end is told by a callback, by the share of callbacks missed."""
    law = Law.of("lognormal 25, .4", lognormal(25, 0.4))
    pacer = Pacer(PollPolicy(price=price))
    model, rng, trust = pacer.model("task", 25), random.Random(1), pacer.callbacks
    for _ in range(200):
        live(model, law.sample(rng), price)
    rows = []
    for missed in range(6):
        reads, age = 0.0, 0.0
        while 1 - law.at(age)[0] > 1e-4:
            age = model.next_age(age, trust.price(price))
            reads += 1 - law.at(age)[0]
        rows.append([str(missed), f"{trust.missed:.2f}", f"{reads:.3f}"])
        trust.saw_missed()
    title = f"With callbacks, lognormal(25, .4), price {price:g}: polls that find the task running"
    table(title, ["missed in a row", "share", "polls per task"], rows)


def show_decision_cost() -> None:
    """Microseconds per call on this machine; the one table that is measured."""
    pacer = Pacer(PollPolicy())
    model = pacer.model("task", 25)
    rng = random.Random(1)
    for _ in range(200):
        live(model, rng.lognormvariate(math.log(25), 0.4), 0.5)
    rounds = 100_000
    for _ in range(1_000):
        model.started()
    start = perf_counter()
    for _ in range(rounds):
        model.next_age(21.3, 0.02)
    lookup = perf_counter() - start
    start = perf_counter()
    for _ in range(rounds):
        model.saw_running(20.9, 21.3)
    seen = perf_counter() - start
    rows = [
        ["next_age", f"{lookup / rounds * 1e6:.2f}"],
        ["saw_running", f"{seen / rounds * 1e6:.2f}"],
    ]
    if isinstance(model, DurationModel):
        start = perf_counter()
        for _ in range(200):
            model.learn()
        rows.append(["learn (the hazard anew)", f"{(perf_counter() - start) / 200 * 1e6:.0f}"])
    table("Cost of a decision, measured here", ["call", "us"], rows)


# --- a list of durations ---------------------------------------------------------------


def law_of(durations: Sequence[float]) -> Law:
    """The list's own quantiles, at most 50 of them, joined by straight lines."""
    ordered = sorted(durations)
    pieces = max(1, min(50, len(ordered) - 1))
    knots = [ordered[k * (len(ordered) - 1) // pieces] for k in range(pieces + 1)]
    knots[0] *= 0.999

    def cdf(t: float) -> float:
        k = bisect_left(knots, t)
        if k == 0 or k > pieces:
            return float(k > 0)
        width = knots[k] - knots[k - 1]
        return (k - 1 + (t - knots[k - 1]) / width) / pieces

    return Law.of("list", cdf, max(1e-9, ordered[-1] / 5_000))


def replay(durations: Sequence[float], look: Look, price: float) -> float:
    """Mean J of a plain schedule over the list."""
    total = 0.0
    for duration in durations:
        age = 0.0
        while age < duration:
            age = look(age)
            total += price
        total += age - duration
    return total / len(durations)


def show_list(durations: Sequence[float], estimate: float | None, price: float) -> None:
    law = law_of(durations)
    limit = law.limit(price)
    schedule = Pacer(PollPolicy(price=price)).model("task", estimate)
    costs = [live(schedule, duration, price) for duration in durations]
    rows = [
        [
            "shipped policy",
            f"{statistics.fmean(costs):.2f}",
            f"{statistics.fmean(costs) / limit:.2f}",
        ]
    ]
    if len(costs) > 100:
        late = statistics.fmean(costs[100:])
        rows.append(["  from task 101 on", f"{late:.2f}", f"{late / limit:.2f}"])
    for name, look in plain_schedules(estimate or law.median, random.Random(1)):
        cost = replay(durations, look, price)
        rows.append([name, f"{cost:.2f}", f"{cost / limit:.2f}"])
    print(
        f"{len(durations)} durations, median {law.median:.1f} s, limit {limit:.2f} (in hindsight)"
    )
    table(f"One task at a time, in order, price {price:g}", ["schedule", "J", "J / limit"], rows)


# --- command line ----------------------------------------------------------------------


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer seeds and tasks")
    parser.add_argument("--price", type=float, default=0.5, help="seconds of delay a read is worth")
    parser.add_argument("--durations", type=Path, help="file of durations in seconds")
    parser.add_argument(
        "--estimate", type=float, help="the estimate to start from, with --durations"
    )
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    price = arguments.price
    print(f"{platform.platform()}, Python {platform.python_version()}, attrs {attrs.__version__}")
    if arguments.durations:
        try:
            durations = [float(word) for word in arguments.durations.read_text().split()]
        except (OSError, ValueError) as exc:
            raise SystemExit(f"{arguments.durations}: {exc}") from None
        if not durations or not all(0 < duration < math.inf for duration in durations):
            raise SystemExit(f"{arguments.durations}: durations must be positive seconds")
        show_list(durations, arguments.estimate, price)
        return
    seeds = range(1, 3) if arguments.quick else range(1, 6)
    all_laws = laws()
    show_limits(all_laws)
    show_schedules(all_laws, price)
    show_shipped(all_laws, price, seeds, 300 if arguments.quick else 1000)
    show_drift(all_laws, price, seeds)
    sizes = (10, 200, 2000) if arguments.quick else (10, 100, 200, 1000, 2000, 10_000)
    for each in (price, 2 * price):
        show_crowds(each, seeds, sizes)
    show_callbacks(price)
    show_decision_cost()


if __name__ == "__main__":
    main()
