"""What polling costs: the shipped policy against fixed, doubling and vendor schedules.

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
from itertools import islice, pairwise
from pathlib import Path
from time import perf_counter

import attrs
from attrs import define, frozen

from evolink_async._polling.durations import DurationModel
from evolink_async._polling.policy import PollPolicy, Schedule
from evolink_async._polling.pricing import Pacer

Cdf = Callable[[float], float]
NextAge = Callable[[float], float]
"""Age at the last poll -> age at the next."""

PHASES = ((0, 20), (20, 100), (100, 1000))
LATENCY = 0.005
POST_SECONDS = 0.0003
READ_LIMIT = 50
COLD_TASKS, COLD_SLOTS = 160, 32


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

    def expected(self, next_age: NextAge, price: float) -> float:
        """Expected J of one task polled by that schedule."""
        t, ended, area, total = 0.0, *self.at(0.0), 0.0
        while 1 - ended > 1e-5:
            u = next_age(t)
            ended_then, area_then = self.at(u)
            total += price * (1 - ended) + area_then - area - ended * (u - t)
            t, ended, area = u, ended_then, area_then
        return total

    def limit(self, price: float) -> float:
        """Least expected J. A candidate next poll is a line, so the minimum is a hull."""
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


def fixed(interval: float) -> NextAge:
    return lambda age: age + interval


def doubling(cap: float) -> NextAge:
    return lambda age: age + min(cap, age + 1)


def vendor(rng: random.Random) -> NextAge:
    return lambda age: age + (rng.uniform(3, 5) if age else 3)


def from_estimate(estimate: float) -> NextAge:
    return lambda age: age * 1.5 if age else 0.6 * estimate


def plain_schedules(estimate: float, rng: random.Random) -> list[tuple[str, NextAge]]:
    every = [(f"every {s:g} s", fixed(s)) for s in (0.1, 0.5, 1, 3, 5, 10)]
    doubled = [(f"1 s doubling to {cap} s", doubling(cap)) for cap in (10, 30, 60)]
    return [
        *every,
        *doubled,
        ("3 s, then 3-5 s", vendor(rng)),
        (".6 of estimate, then x1.5", from_estimate(estimate)),
    ]


def follow(schedule: Schedule, price: float) -> NextAge:
    return lambda age: schedule.next_age(age, price)


# --- one task at a time ----------------------------------------------------------------


def live(schedule: Schedule, duration: float, price: float) -> float:
    """One task from submit to end, alone; its J."""
    schedule.started()
    age, reads = 0.0, 0
    while True:
        due = schedule.next_age(age, price, reads)
        reads += 1
        if due >= duration:
            break
        schedule.saw_running(age, due)
        age = due
    schedule.saw_end(age, due)
    schedule.left()
    return price * reads + due - duration


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
class Task:
    """A running task as the watcher sees it, and when it will end."""

    submitted: float
    ends: float
    polled: float
    due: float = 0.0


@define
class Watcher:
    """The session's watcher in simulated time: one heap, shared reads, the shipped policy."""

    pacer: Pacer
    schedule: Schedule
    heap: list[tuple[float, int, Task]] = attrs.field(factory=list)
    running: int = 0
    reads: int = 0
    order: int = 0

    def watch(self, task: Task) -> None:
        self.running += 1
        self.schedule.started()
        price = self.pacer.shared.price(self.running)
        self.queue(task, task.submitted + self.schedule.next_age(0.0, price))

    def queue(self, task: Task, due: float) -> None:
        task.due = self.pacer.shared.on_beat(due, task.polled, self.running)
        self.order += 1
        heappush(self.heap, (task.due, self.order, task))

    def read(self, now: float) -> list[Task]:
        """One request for the tasks due first; returns those that have ended."""
        shared = self.pacer.shared
        batch = [heappop(self.heap)[2] for _ in range(min(shared.limit, len(self.heap)))]
        shared.saw_read(now, [(task.polled, task.due) for task in batch])
        self.reads += 1
        price = shared.price(self.running)
        received = now + LATENCY
        ended = []
        for task in batch:
            if task.ends <= now + LATENCY / 2:
                ended.append(task)
                self.end(task, received)
            else:
                self.go_on(task, now, received, price)
        return ended

    def end(self, task: Task, received: float) -> None:
        self.schedule.saw_end(task.polled - task.submitted, received - task.submitted)
        self.schedule.left()
        self.running -= 1

    def go_on(self, task: Task, now: float, received: float, price: float) -> None:
        age = now - task.submitted
        self.schedule.saw_running(task.polled - task.submitted, age)
        task.polled = now
        due = task.submitted + self.schedule.next_age(age, price)
        self.queue(task, max(received, due))


@frozen
class Cost:
    """What many tasks cost, per task, and when the last was noticed to have ended."""

    requests: float
    delay: float
    wall: float

    def total(self, price: float) -> float:
        """J per task; the submit is not a read."""
        return price * (self.requests - 1) + self.delay

    @classmethod
    def mean(cls, costs: Sequence[Cost]) -> Cost:
        means = zip(*map(attrs.astuple, costs), strict=True)
        return cls(*map(statistics.fmean, means))


def many(
    durations: Sequence[float], policy: PollPolicy, *, n: int, estimate: float, warm: int = 0
) -> Cost:
    """*n* tasks submitted at once and, while there are more, a new one at each end noticed.

    The first *warm* tasks to end are not counted.
    """
    pacer = Pacer(policy)
    pacer.shared.limit = READ_LIMIT
    watcher = Watcher(pacer, pacer.model("task", estimate))
    left = iter(durations)

    def submit(count: int, now: float) -> None:
        for k, duration in enumerate(islice(left, count)):
            at = now + k * POST_SECONDS
            watcher.watch(Task(submitted=at, ends=at + duration, polled=at))

    submit(n, 0.0)
    now, done, delay, reads_before = 0.0, 0, 0.0, 0
    while watcher.heap:
        now = max(now + 0.001, watcher.heap[0][0])
        ended = watcher.read(now)
        for task in ended:
            done += 1
            delay += now + LATENCY - task.ends if done > warm else 0.0
            if done == warm:
                reads_before = watcher.reads
        submit(len(ended), now + LATENCY)
    counted = len(durations) - warm
    return Cost(1 + (watcher.reads - reads_before) / counted, delay / counted, now + LATENCY)


def bare_loop(durations: Sequence[float], *, n: int, first: float = 1.0) -> Cost:
    """The same, where all running tasks are read each second from *first* on."""
    left = iter(durations)
    running = [k * POST_SECONDS + duration for k, duration in enumerate(islice(left, n))]
    now, reads, delay = first, 0, 0.0
    while True:
        reads += math.ceil(len(running) / READ_LIMIT)
        received = now + LATENCY
        ended = [end for end in running if end <= now + LATENCY / 2]
        delay += sum(received - end for end in ended)
        running = [end for end in running if end > now + LATENCY / 2]
        for k, duration in enumerate(islice(left, len(ended))):
            running.append(received + k * POST_SECONDS + duration)
        if not running:
            return Cost(1 + reads / len(durations), delay / len(durations), received)
        now += 1.0


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
        for name, next_age in plain_schedules(law.median, random.Random(1)):
            ratios.setdefault(name, []).append(law.expected(next_age, price) / law.limit(price))
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


def show_many(price: float, seeds: range, sizes: Sequence[int]) -> None:
    law = Law.of("lognormal 25, .4", lognormal(25, 0.4))
    policy = PollPolicy(price=price)

    def samples(count: int, seed: int) -> list[float]:
        rng = random.Random(seed)
        return [law.sample(rng) for _ in range(count)]

    rows = []
    for n in sizes:
        runs = [
            samples(n, seed) for seed in (seeds if n < 1000 else seeds[: (len(seeds) + 1) // 2])
        ]
        at_once = Cost.mean([many(run, policy, n=n, estimate=law.median) for run in runs])
        tasks = max(300, 3 * n)
        run = samples(tasks, seeds[0])
        steady = many(run, policy, n=n, estimate=law.median, warm=tasks // 3)
        naive = Cost.mean([bare_loop(run, n=n) for run in runs])
        rows.append(
            [str(n), *(cell for cost in (at_once, steady, naive) for cell in _cells(cost, price))]
        )
    head = ["N", "at once", "delay", "J", "closed loop", "delay", "J", "loop 1 s", "delay", "J"]
    title = f"N tasks of lognormal(25, .4), price {price:g}, {READ_LIMIT} a read"
    table(f"{title}: requests per task (POST included), mean delay in s, J", head, rows)


def _cells(cost: Cost, price: float) -> Iterator[str]:
    yield f"{cost.requests:.2f}"
    yield f"{cost.delay:.3f}"
    yield f"{cost.total(price):.3f}"


def show_cold(price: float, seeds: range) -> None:
    """The first tasks of a session, with estimates that are far off."""
    policy, estimate, rows = PollPolicy(price=price), 30.0, []
    for truth in (2.0, 5.0, 25.0):
        for sigma in (0.0, 0.1, 0.3):
            ours, naive = [], []
            for seed in seeds:
                rng = random.Random(seed)
                run = [truth * math.exp(rng.gauss(0, sigma)) for _ in range(COLD_TASKS)]
                ours.append(many(run, policy, n=COLD_SLOTS, estimate=estimate))
                naive.append(bare_loop(run, n=COLD_SLOTS, first=1 - rng.random()))
            one, other = Cost.mean(ours), Cost.mean(naive)
            j, naive_j = (COLD_TASKS * cost.total(price) for cost in (one, other))
            walls = [f"{one.wall:.1f}", f"{other.wall:.1f}", f"{one.wall / other.wall:.2f}"]
            costs = [f"{j:.0f}", f"{naive_j:.0f}", f"{j / naive_j:.2f}"]
            rows.append([f"{truth:g} s, sigma {sigma:g}", *walls, *costs])
    head = ["truth", "wall s", "loop 1 s", "ratio", "J of all", "loop 1 s", "ratio"]
    title = f"Cold, in company: first {COLD_TASKS} tasks, {COLD_SLOTS} in flight"
    table(f"{title}, estimate {estimate:g} s, lognormal truth (sigma 0: constant)", head, rows)


def show_far_off(all_laws: Sequence[Law], price: float, seeds: range) -> None:
    rows = []
    for factor in (0.1, 10.0):
        runs = [
            alone([(law, 20)], law.median * factor, price, seed)
            for law in all_laws
            for seed in seeds
        ]
        short = Law.of("lognormal 2.5, .3", lognormal(2.5, 0.3), 0.005)
        others = [alone([(short, 20)], short.median * factor, price, seed) for seed in seeds]
        cells = (phase_means(each, [(0, 20)])[0] for each in (runs, others))
        rows.append([f"x{factor:g}", *(f"{cell:.2f}" for cell in cells)])
    title = f"Alone, estimate far off, price {price:g}: J / limit of the first 20 tasks"
    table(title, ["estimate", f"mean of {len(all_laws)} laws", "lognormal 2.5, .3"], rows)


def show_callbacks(price: float) -> None:
    """Polls of tasks that send a callback at their end, by the share of callbacks missed."""
    law = Law.of("lognormal 25, .4", lognormal(25, 0.4))
    pacer = Pacer(PollPolicy(price=price))
    model, rng, callbacks = pacer.model("task", 25), random.Random(1), pacer.callbacks
    for _ in range(200):
        live(model, law.sample(rng), price)
    rows = []
    for missed in range(6):
        reads, age = 0.0, 0.0
        while 1 - law.at(age)[0] > 1e-4:
            age = model.next_age(age, callbacks.price(price, price))
            reads += 1 - law.at(age)[0]
        rows.append([str(missed), f"{callbacks.missed:.2f}", f"{reads:.3f}"])
        callbacks.saw_missed(0.0, pause=15.0)
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


def replay(durations: Sequence[float], next_age: NextAge, price: float) -> float:
    """Mean J of a plain schedule over the list."""
    total = 0.0
    for duration in durations:
        age = 0.0
        while age < duration:
            age = next_age(age)
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
    for name, next_age in plain_schedules(estimate or law.median, random.Random(1)):
        cost = replay(durations, next_age, price)
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
    show_far_off(all_laws, price, seeds)
    show_drift(all_laws, price, seeds)
    sizes = (10, 200, 2000) if arguments.quick else (10, 100, 200, 1000, 2000, 10_000)
    for each in (price, 2 * price):
        show_many(each, seeds, sizes)
    show_cold(price, range(1, 7 if arguments.quick else 25))
    show_callbacks(price)
    show_decision_cost()


if __name__ == "__main__":
    main()
