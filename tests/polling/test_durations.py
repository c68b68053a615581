"""What is learned about durations, the schedule it gives, and bounds that hold whatever happens."""

from __future__ import annotations

import math
import random
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolink_async._polling.durations import DurationModel
from evolink_async._polling.policy import PollPolicy

JUNK_ESTIMATES: list[object] = [
    None, 0, -1, -0.0, 1e-300, 1e9, 1e308, 10**400, -(10**400), math.nan, math.inf, -math.inf,
    True, False, "30", b"30", [], {}, object(),
]  # fmt: skip

ages = st.floats(min_value=0, max_value=1e12) | st.floats(min_value=1e-9, max_value=4000)
any_float = st.floats(allow_nan=True, allow_infinity=True)
estimates = st.sampled_from(JUNK_ESTIMATES) | any_float | st.integers() | st.text(max_size=3)
prices = st.floats(min_value=1e-9, max_value=1e9)
events = st.tuples(
    st.sampled_from(["running", "end", "started", "left", "next", "learn"]),
    ages | any_float,
    ages | any_float,
    any_float | st.none() | st.booleans() | st.text(max_size=2) | st.integers(),
)


def make(estimate: object = 25, **settings_: Any) -> DurationModel:
    return DurationModel(PollPolicy(**settings_), estimate)


def live(model: DurationModel, duration: float, price: float = 0.5) -> tuple[int, float]:
    """One task watched alone to its end: polls, and seconds until the end was noticed."""
    model.started()
    age, polls = 0.0, 0
    while True:
        due = model.next_age(age, price)
        polls += 1
        if due >= duration:
            model.saw_end(age, due)
            model.left()
            return polls, due - duration
        model.saw_running(age, due)
        age = due


def seen(model: DurationModel, last_age: float, age: float, duration: Any = None) -> None:
    """One task known to run at *last_age* and to have ended at *age*."""
    model.saw_running(0.0, last_age)
    model.saw_end(last_age, age, duration)


def taught(median: float, *, tasks: int = 200, estimate: object = 25, **more: Any) -> DurationModel:
    model, rng = make(estimate, **more), random.Random(7)
    for _ in range(tasks):
        live(model, rng.lognormvariate(math.log(median), 0.3), model.policy.price)
    return model


def schedule(model: DurationModel) -> list[float]:
    """The next polls after several ages: what has been learned, as far as it can be seen."""
    return [model.next_age(age, 0.5) for age in (0.0, 2.0, 8.0, 15.0, 20.0, 40.0, 100.0)]


# --- bounds ----------------------------------------------------------------------------


@pytest.mark.parametrize("estimate", JUNK_ESTIMATES)
def test_any_estimate_gives_a_schedule(estimate: object) -> None:
    """Whatever the server calls an estimate never breaks the model."""
    polls, delay = live(make(estimate), 25.0)
    assert 1 <= polls <= 101
    assert 0 <= delay <= 60


def happen(model: DurationModel, kind: str, a: float, b: float, told: Any) -> None:
    """One event in the life of a model."""
    if kind == "running":
        model.saw_running(a, b)
    elif kind == "end":
        model.saw_end(a, b, told)
    elif kind == "next":
        model.next_age(a, b)
    else:
        {"started": model.started, "left": model.left, "learn": model.learn}[kind]()


@settings(max_examples=200)
@given(
    estimate=estimates,
    history=st.lists(events, max_size=40),
    age=ages,
    price=prices,
    deadline=st.none() | st.floats(min_value=1, max_value=1e9),
)
def test_bounds_hold_after_any_history(
    estimate: object, history: list[Any], age: float, price: float, deadline: float | None
) -> None:
    """Never negative, never NaN, never past the deadline, never out of the intervals."""
    model = make(estimate, deadline=deadline)
    for event in history:
        happen(model, *event)
    model.learn()
    when = model.next_age(age, price)
    assert math.isfinite(when)
    assert age < when <= age + 60
    assert when >= age + 0.25 or when == deadline
    if deadline is not None and age < deadline:
        assert when <= deadline
    assert model.typical is None or 0 <= model.typical <= 2 * 60 * 64
    assert all(0 < hazard < math.inf for hazard in model._hazard)


@given(
    low=st.floats(min_value=1e-6, max_value=1e6),
    ratio=st.floats(min_value=1, max_value=1e9),
    history=st.lists(st.tuples(ages, ages), max_size=10),
    age=ages,
)
def test_bounds_hold_for_any_policy(
    low: float, ratio: float, history: list[tuple[float, float]], age: float
) -> None:
    """However far apart the two intervals are, or how close, polls keep to them."""
    longest = min(1e9, low * ratio)
    model = make(30, min_interval=low, max_interval=longest, deadline=None)
    for a, b in history:
        seen(model, min(a, b), max(a, b))
    when = model.next_age(age, 0.5)
    assert age < when <= (age + longest) * (1 + 1e-9)
    assert when >= age + low


@pytest.mark.parametrize("price", [0.0, -1.0, math.nan, math.inf, 1e-300, 1e300])
def test_a_price_out_of_range_is_the_policys(price: float) -> None:
    """Dividing by a share can never make a schedule that spins or stands still."""
    assert make().next_age(0.0, price) == make().next_age(0.0, 0.5)


@pytest.mark.parametrize("age", [math.nan, -5.0])
def test_an_age_that_cannot_be_costs_one_interval(age: float) -> None:
    """A broken clock neither raises nor puts a poll off for good."""
    assert -5 < make().next_age(age, 0.5) < 60


def test_time_that_goes_back_is_no_information() -> None:
    """Polls out of order neither count nor end anything."""
    model = make()
    before = schedule(model)
    for _ in range(500):
        model.saw_running(10, 5)
        model.saw_running(-1, 5)
        model.saw_end(10, 5)
        model.saw_end(math.nan, 5)
    model.learn()
    assert schedule(model) == before
    assert model.typical is None


def test_many_ends_without_a_poll_in_between_are_learned() -> None:
    """Forgetting goes by the number of ends, and yet thousands in a row are not forgotten."""
    model = make()
    for _ in range(2_000):
        model.started()
    for _ in range(2_000):
        seen(model, 20.0, 21.0)
        model.left()
    assert 19 < (model.typical or 0) < 22


def test_a_model_shows_what_it_knows() -> None:
    """The repr is one line about the present state."""
    model = make()
    model.started()
    assert repr(model) == "<DurationModel typical unknown, 1 running, 0 ended>"
    assert repr(taught(25, tasks=20)).endswith("0 running, 20 ended>")


def test_nothing_grows_with_the_number_of_tasks() -> None:
    """After hundreds of tasks the model holds what it held after ten."""
    few, many = _sizes(taught(25, tasks=10)), _sizes(taught(25, tasks=300))
    assert few == many
    assert few["_intervals"] == 1


def _sizes(model: DurationModel) -> dict[str, int]:
    model.learn()
    model.next_age(1.0, 0.5)
    state = {name: getattr(model, name, None) for name in DurationModel.__slots__}
    return {name: len(value) for name, value in state.items() if isinstance(value, list | dict)}


# --- what it learns --------------------------------------------------------------------


def test_the_first_poll_follows_the_estimate() -> None:
    """Before anything was seen, a longer estimate means a later first poll."""
    first = [make(estimate).next_age(0.0, 0.5) for estimate in (5, 10, 20, 40)]
    assert first == sorted(first)
    assert first[-1] > 3 * first[0]


@pytest.mark.parametrize("median", [3.0, 12.0, 60.0, 300.0])
def test_the_typical_duration_is_learned(median: float) -> None:
    """From an estimate far off, 200 tasks suffice to know the median within a tenth."""
    assert taught(median).typical == pytest.approx(median, rel=0.1)


def test_without_an_estimate_the_first_guess_is_wide() -> None:
    """A task of a tenth of the longest interval is caught sooner than from a wrong estimate."""
    assert make(None).next_age(0.0, 0.5) < make(30).next_age(0.0, 0.5)


def test_an_end_far_from_the_estimate_discredits_it() -> None:
    """After one end at a tenth of the estimate, the next task is polled about then."""
    model = make(40)
    assert model.next_age(0.0, 0.5) > 10
    live(model, 4.0)
    assert model.next_age(0.0, 0.5) < 5


def test_ends_near_the_estimate_confirm_it() -> None:
    """After a few ends about when they were expected, hardly any time is spent on doubt."""
    model = make(40)
    before = model.next_age(0.0, 0.5)
    for duration in (35.0, 45.0, 40.0):
        live(model, duration)
    assert model._prior.trust > 0.97
    assert model.next_age(0.0, 0.5) > 1.2 * before


@pytest.mark.parametrize("wrong", [0.1, 10.0])
def test_a_wrong_estimate_costs_little(wrong: float) -> None:
    """Ten times the truth or a tenth of it: the first 20 tasks pay less than twice the least."""
    cost = 0.0
    for seed in range(10):
        model, rng = make(25 * wrong), random.Random(seed)
        for _ in range(20):
            polls, delay = live(model, rng.lognormvariate(math.log(25), 0.4))
            cost += (0.5 * polls + delay) / 200
    assert cost < 2 * 4.20  # the least that any schedule can cost, of this law known beforehand


def test_durations_that_hardly_vary_are_met_closely() -> None:
    """About two polls meet the end within a second."""
    model, rng = make(), random.Random(5)
    durations = [rng.lognormvariate(math.log(25), 0.03) for _ in range(400)]
    costs = [0.5 * polls + delay for polls, delay in (live(model, d) for d in durations)]
    assert sum(costs[100:]) / 300 < 2


def test_polls_cluster_where_tasks_end() -> None:
    """Intervals are longest before anything can end and shorter where most do."""
    model = taught(25)
    assert model.next_age(0.0, 0.5) > 10
    assert model.next_age(24.0, 0.5) - 24.0 < 5


def test_a_cheaper_poll_comes_sooner() -> None:
    """At any age the interval grows with the price."""
    model = taught(25, tasks=30)
    for age in range(300):
        intervals = [model.next_age(age, price) for price in (0.01, 0.1, 1.0, 10.0)]
        assert intervals == sorted(intervals)


def test_survivors_count_as_much_as_ends() -> None:
    """Of many tasks together the first ends are the shortest; the rest say so."""
    many, alone = make(), make()
    for model in (many, alone):
        for _ in range(1000):
            model.started()
        for _ in range(100):
            model.saw_end(14.0, 15.0)
            model.left()
    for _ in range(900):
        many.saw_running(0.0, 15.0)
    assert (alone.typical or 0) < 16
    assert (many.typical or 0) > 20


def test_polls_of_a_running_task_add_up() -> None:
    """Ten polls on the way are the same survival as one poll at the end."""
    often, once = make(), make()
    for _ in range(20):
        for a, b in pairwise([0.0, 0.1, 0.2, 3.0, 3.1, 8.0, 9.0, 15.5, 16.0]):
            often.saw_running(a, b)
        once.saw_running(0.0, 16.0)
        for model in (often, once):
            model.saw_end(16.0, 17.0)
    assert schedule(often) == pytest.approx(schedule(once))
    assert often.typical == pytest.approx(once.typical)


def test_survival_alone_is_taken_in() -> None:
    """Without a single end, many survivors past the estimate make the next poll later."""
    model = make(10)
    before = model.next_age(10.0, 0.5)
    for _ in range(200):
        model.saw_running(0.0, 10.0)
    assert model.next_age(10.0, 0.5) > before


def test_a_told_duration_is_used_exactly() -> None:
    """One that lies between the two polls says as much as two polls right beside it."""
    told, close, untold = make(), make(), make()
    for _ in range(200):
        seen(told, 0.0, 40.0, 12.0)
        seen(close, 12.0 - 1e-9, 12.0)
        seen(untold, 0.0, 40.0)
    assert told.typical == pytest.approx(12, rel=0.1)
    assert told.typical == pytest.approx(close.typical)
    assert schedule(told) == pytest.approx(schedule(close))
    assert (untold.typical or 0) > 15


@pytest.mark.parametrize("duration", [5.0, 10.0, 20.1, -1.0, math.nan, math.inf, "15", 10**400])
def test_a_told_duration_that_cannot_be_is_not_used(duration: Any) -> None:
    """Outside of the two polls it measures something else."""
    model, untold = make(), make()
    for _ in range(50):
        model.saw_end(10.0, 20.0, duration)
        untold.saw_end(10.0, 20.0)
    assert schedule(model) == schedule(untold)


def test_a_trace_of_the_prior_stays() -> None:
    """However much was seen, a task that runs far longer than any before is still polled."""
    model = taught(25, tasks=600)
    assert model.next_age(100.0, 0.5) < 115


def test_an_end_beyond_all_belief_is_still_learned() -> None:
    """Ends at ages where none was thought possible become what is expected."""
    model = make(1.0)
    for _ in range(300):
        live(model, 1.0)
    for _ in range(60):
        seen(model, 900.0, 2000.0)
    assert (model.typical or 0) > 500


def test_ages_beyond_the_last_bin_are_the_last_bin() -> None:
    """A task that runs for days is polled at the longest interval."""
    model = make(deadline=None)
    for _ in range(30):
        seen(model, 1e7, 1e7 + 60)
    assert model.next_age(1e7, 0.5) == 1e7 + 60
    assert (model.typical or 0) > 3800


def test_a_median_beyond_the_last_bin_is_where_that_begins() -> None:
    """Where most tasks took longer than is told apart, that is the typical duration."""
    model = make()
    for _ in range(300):
        model.saw_running(0.0, 1e7)
    seen(model, 1e7, 1e7 + 60)
    assert 3800 < (model.typical or 0) <= 2 * 60 * 64


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_change_of_all_durations_is_caught_up_with(factor: float) -> None:
    """A hundred tasks after it, the median is that of the new law."""
    model, rng = taught(25, tasks=300), random.Random(3)
    for _ in range(100):
        live(model, rng.lognormvariate(math.log(25 * factor), 0.3))
    assert model.typical == pytest.approx(25 * factor, rel=0.15)


def test_more_running_tasks_mean_a_longer_memory() -> None:
    """With 1 000 running, 60 ends do not overturn what 500 taught."""
    few, many = make(), make()
    for _ in range(1000):
        many.started()
    for model in (few, many):
        for _ in range(500):
            seen(model, 20.0, 20.5)
        for _ in range(60):
            seen(model, 80.0, 81.0)
    assert (few.typical or 0) > 70
    assert (many.typical or 0) < 25


@pytest.mark.parametrize("sigma", [0.3, 0.4, 0.8])
def test_it_costs_less_than_any_fixed_interval(sigma: float) -> None:
    """Polls and delay together, at the default price, after a hundred tasks."""
    rng = random.Random(11)
    durations = [rng.lognormvariate(math.log(25), sigma) for _ in range(600)]
    model = make()
    learned = [0.5 * polls + delay for polls, delay in (live(model, d) for d in durations)]
    for interval in (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0):
        fixed = [0.5 * (n := math.ceil(d / interval)) + n * interval - d for d in durations]
        assert sum(learned[100:]) < sum(fixed[100:])


def test_durations_with_a_heavy_tail_cost_little_more() -> None:
    """One task in ten takes ten times as long: still cheaper than any fixed interval."""
    rng = random.Random(13)
    durations = [20 * (10 if rng.random() < 0.1 else 1) * rng.uniform(0.8, 1.2) for _ in range(600)]
    model = make()
    learned = [0.5 * polls + delay for polls, delay in (live(model, d) for d in durations)]
    for interval in (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0):
        fixed = [0.5 * (n := math.ceil(d / interval)) + n * interval - d for d in durations]
        assert sum(learned[100:]) < sum(fixed[100:])


def test_everything_scales_with_the_policy() -> None:
    """All times an eighth: the same decisions at an eighth of the ages."""
    model = taught(24, estimate=24)
    small = taught(3, estimate=3, price=1 / 16, min_interval=1 / 32, max_interval=7.5, deadline=450)
    assert small.typical == pytest.approx((model.typical or 0) / 8)
    for age in (0.0, 10.0, 20.0, 30.0, 100.0):
        expected = model.next_age(age, 0.5) / 8
        assert small.next_age(age / 8, 1 / 16) == pytest.approx(expected)
