"""The polling policy: bounds that hold whatever happens, and a model that learns."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from itertools import pairwise
from typing import Any

import pytest
import tenacity
from hypothesis import given, settings
from hypothesis import strategies as st

from evolink_async._polling import durations
from evolink_async._polling.durations import BINS_PER_OCTAVE, AgeGrid, DurationModel
from evolink_async._polling.policy import Backoff, PollPolicy, Schedule
from evolink_async._polling.pricing import BEAT, MODELS_KEPT, CallbackTrust, Pacer, SharedReads
from evolink_async.errors import ConfigurationError

JUNK_ESTIMATES: list[object] = [
    None, 0, -1, -0.0, 1e-300, 1e9, 1e308, 10**400, -(10**400), math.nan, math.inf, -math.inf,
    True, False, "30", b"30", [], {}, object(),
]  # fmt: skip

ages = st.floats(min_value=0, max_value=1e12) | st.floats(min_value=1e-9, max_value=4000)
any_float = st.floats(allow_nan=True, allow_infinity=True)
estimates = st.sampled_from(JUNK_ESTIMATES) | any_float | st.integers() | st.text(max_size=3)
prices = st.floats(min_value=1e-9, max_value=1e9)
polls = st.tuples(
    st.sampled_from(["running", "end", "started", "left", "next", "learn"]),
    ages | any_float,
    ages | any_float,
    any_float | st.none() | st.booleans() | st.text(max_size=2) | st.integers(),
)


def make(estimate: object = 25, **settings_: Any) -> DurationModel:
    schedule = Pacer(PollPolicy(**settings_)).model("kind", estimate)
    assert isinstance(schedule, DurationModel)
    return schedule


def live(schedule: Schedule, duration: float, price: float = 0.5) -> tuple[int, float]:
    """One task watched alone to its end: reads, and seconds until the end was noticed."""
    schedule.started()
    age, reads = 0.0, 0
    while True:
        look = schedule.next_age(age, price, reads)
        reads += 1
        if look >= duration:
            schedule.saw_end(age, look)
            schedule.left()
            return reads, look - duration
        schedule.saw_running(age, look)
        age = look


def seen(model: DurationModel, last_age: float, age: float, duration: Any = None) -> None:
    """One task known to run at *last_age* and to have ended at *age*."""
    model.saw_running(0.0, last_age)
    model.saw_end(last_age, age, duration)


def taught(median: float, *, tasks: int = 200, estimate: object = 25, **more: Any) -> DurationModel:
    model, rng = make(estimate, **more), random.Random(7)
    for _ in range(tasks):
        live(model, rng.lognormvariate(math.log(median), 0.3), model.policy.price)
    return model


# --- the policy ------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["price", "min_interval", "max_interval", "deadline"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 1e10, True, "1", [1]])
def test_a_policy_refuses_what_is_no_time(name: str, value: object) -> None:
    """The message names the field, the value and what is allowed."""
    with pytest.raises(ConfigurationError) as caught:
        PollPolicy(**{name: value})  # type: ignore[arg-type]  # that is the point
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)
    assert "a number from" in str(caught.value)


@pytest.mark.parametrize("name", ["price", "min_interval", "max_interval"])
def test_only_the_deadline_may_be_none(name: str) -> None:
    """None means for ever; it means nothing for a price or an interval."""
    assert PollPolicy(deadline=None).deadline is None
    with pytest.raises(ConfigurationError, match=name):
        PollPolicy(**{name: None})  # type: ignore[arg-type]  # that is the point


def test_a_policy_refuses_bounds_that_cross() -> None:
    """The longest interval is at least the shortest."""
    assert PollPolicy(min_interval=2, max_interval=2).max_interval == 2
    with pytest.raises(ConfigurationError, match="at least min_interval=2"):
        PollPolicy(min_interval=2, max_interval=1)


def test_a_policy_is_a_value() -> None:
    """Policies compare by what they say and cannot be changed."""
    policy = PollPolicy(price=1)
    assert policy == PollPolicy(price=1.0)
    with pytest.raises(AttributeError):
        policy.price = 2  # type: ignore[misc]  # that is the point


@given(age=ages, proposed=any_float, deadline=st.none() | st.floats(1e-6, 1e9))
def test_clamp_keeps_any_proposal_in_bounds(
    age: float, proposed: float, deadline: float | None
) -> None:
    """Later than the last look, not past the deadline, not sooner or later than allowed."""
    policy = PollPolicy(min_interval=0.5, max_interval=20, deadline=deadline)
    when = policy.clamp(age, proposed)
    assert age < when <= age + 20
    if deadline is not None and age < deadline:
        assert when <= deadline
    assert when >= age + 0.5 or when == deadline


def test_clamp_survives_an_age_that_is_no_number() -> None:
    """A broken clock costs one ordinary interval."""
    assert PollPolicy(min_interval=0.5).clamp(math.nan, math.nan) == 0.5


# --- plain backoff ---------------------------------------------------------------------


def test_wait_gives_the_strategy_the_number_of_looks() -> None:
    """The first look is attempt 1, and nothing is learned."""
    policy = PollPolicy(wait=tenacity.wait_incrementing(start=1, increment=2))
    schedule = Pacer(policy).model("kind", 30)
    assert isinstance(schedule, Backoff)
    assert [schedule.next_age(10, 0.5, polls) for polls in range(3)] == [11, 13, 15]
    live(schedule, 20)
    assert schedule.typical is None
    assert schedule.next_age(10, 0.5, 0) == 11


@pytest.mark.parametrize(
    ("wait", "expected"),
    [
        (tenacity.wait_none(), 0.25),
        (tenacity.wait_fixed(1e6), 60.0),
        (tenacity.wait_fixed(3) + tenacity.wait_fixed(1), 4.0),
        (lambda _: math.nan, 0.25),
        (lambda _: -5, 0.25),
    ],
)
def test_wait_is_kept_within_the_intervals(wait: Any, expected: float) -> None:
    """Whatever a strategy answers, the bounds of the policy hold."""
    assert Pacer(PollPolicy(wait=wait)).model("kind").next_age(0, 0.5, 0) == expected


@pytest.mark.parametrize(
    "wait",
    [
        tenacity.wait_exception(lambda _: 1.0),
        tenacity.wait_chain(tenacity.wait_fixed(1), tenacity.wait_exception(lambda _: 1.0)),
        tenacity.wait_fixed(1) + tenacity.wait_exception(lambda _: 1.0),
        lambda: 3,
        lambda _: "soon",
        3.0,
        "3",
    ],
)
def test_wait_refuses_what_cannot_answer(wait: object) -> None:
    """A strategy that polls at outcomes is refused when the policy is made, not later."""
    with pytest.raises(ConfigurationError, match=r"wait=.*only the attempt number"):
        PollPolicy(wait=wait)


def test_tenacity_is_loaded_only_for_a_strategy() -> None:
    """The module itself is light."""
    assert _loads_tenacity("evolink_async._polling.policy") == _loads_tenacity("evolink_async")


def _loads_tenacity(module: str) -> int:
    code = f"import sys, {module}; sys.exit('tenacity' in sys.modules)"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=False).returncode  # noqa: S603 - our own line


# --- bounds of the learned schedule ----------------------------------------------------


@pytest.mark.parametrize("estimate", JUNK_ESTIMATES)
def test_any_estimate_gives_a_schedule(estimate: object) -> None:
    """What the server calls an estimate never breaks the model."""
    reads, delay = live(make(estimate), 25.0)
    assert 1 <= reads <= 101
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
    events=st.lists(polls, max_size=40),
    age=ages,
    price=prices,
    deadline=st.none() | st.floats(min_value=1, max_value=1e9),
)
def test_bounds_hold_after_any_history(
    estimate: object, events: list[Any], age: float, price: float, deadline: float | None
) -> None:
    """Never negative, never NaN, never past the deadline, never out of the intervals."""
    model = make(estimate, deadline=deadline)
    for event in events:
        happen(model, *event)
    model.learn()
    when = model.next_age(age, price)
    assert math.isfinite(when)
    assert age < when <= age + 60
    assert when >= age + 0.25 or when == deadline
    if deadline is not None and age < deadline:
        assert when <= deadline
    assert model.typical is None or 0 <= model.typical <= model.grid.edges[-1]
    assert all(0 < hazard < math.inf for hazard in model._hazard)


@pytest.mark.parametrize("price", [0.0, -1.0, math.nan, math.inf, 1e-300, 1e300])
def test_a_price_out_of_range_is_the_policys(price: float) -> None:
    """Dividing by a share can never make a schedule that spins or stands still."""
    assert make().next_age(0.0, price) == make().next_age(0.0, 0.5)


@given(
    low=st.floats(min_value=1e-6, max_value=1e6),
    ratio=st.floats(min_value=1, max_value=1e9),
    age=ages,
)
def test_every_age_has_a_bin(low: float, ratio: float, age: float) -> None:
    """Positions are within the grid and agree with its edges."""
    grid = AgeGrid.of(PollPolicy(min_interval=low, max_interval=min(1e9, low * ratio)))
    k = int(grid.position(age))
    assert 0 <= k < grid.count <= 641
    assert grid.edges[k] <= age * (1 + 1e-9)
    assert k == grid.count - 1 or age <= grid.edges[k + 1] * (1 + 1e-9)


def test_time_that_goes_back_is_no_information() -> None:
    """Looks out of order neither count nor end anything."""
    model = make()
    before = [model.next_age(age, 0.5) for age in (0, 10, 30)]
    for _ in range(500):
        model.saw_running(10, 5)
        model.saw_running(-1, 5)
        model.saw_end(10, 5)
        model.saw_end(math.nan, 5)
    model.learn()
    assert [model.next_age(age, 0.5) for age in (0, 10, 30)] == before
    assert model.typical is None


def test_ends_without_a_look_do_not_overflow() -> None:
    """The weight of the newest data, which grows with each, is brought back to one in time."""
    model = make()
    for _ in range(5_000):
        model.saw_end(20.0, 21.0)
    assert model._weight <= 1.1 * durations.MAX_WEIGHT
    assert 18 < (model.typical or 0) < 23


def test_a_model_shows_what_it_knows() -> None:
    """The repr is one line about the present state."""
    model = make()
    model.started()
    assert repr(model) == "<DurationModel typical unknown, 1 running, 0 ended>"
    assert repr(taught(25, tasks=20)).endswith("0 running, 20 ended>")


def test_nothing_grows_with_the_number_of_tasks() -> None:
    """After hundreds of tasks the model holds what it held after ten."""
    sizes = [
        {name: len(value) for name, value in state.items() if isinstance(value, list)}
        for state in (_state(taught(25, tasks=10)), _state(taught(25, tasks=300)))
    ]
    assert sizes[0] == sizes[1]
    assert len(_state(taught(25, tasks=300))["_rows"]) < 10


def _state(model: DurationModel) -> dict[str, Any]:
    model.learn()
    model.next_age(1.0, 0.5)
    return {name: getattr(model, name) for name in DurationModel.__slots__ if name != "__weakref__"}


# --- what it learns --------------------------------------------------------------------


def test_the_first_look_follows_the_estimate() -> None:
    """Before anything was seen, a longer estimate means a later first look."""
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


def test_the_prior_moves_to_where_the_data_are() -> None:
    """Twenty tasks at a fifth of the estimate make it a prior about them."""
    ends, _ = taught(8, tasks=20, estimate=40)._prior
    assert make().grid.edges[ends.index(max(ends))] == pytest.approx(8, rel=0.35)


def test_durations_that_hardly_vary_are_met_closely() -> None:
    """The belief gets as narrow as the law, so about two polls meet the end within a second."""
    model, rng = make(), random.Random(5)
    durations = [rng.lognormvariate(math.log(25), 0.03) for _ in range(400)]
    costs = [0.5 * reads + delay for reads, delay in (live(model, d) for d in durations)]
    assert sum(costs[100:]) / 300 < 2


def test_looks_cluster_where_tasks_end() -> None:
    """Intervals are longest before anything can end and shorter where most do."""
    model = taught(25)
    assert model.next_age(0.0, 0.5) > 10
    assert model.next_age(24.0, 0.5) - 24.0 < 5


def test_a_cheaper_look_comes_sooner() -> None:
    """At any age the interval grows with the price."""
    model = taught(25, tasks=30)
    for age in range(300):
        intervals = [model.next_age(age, price) for price in (0.01, 0.1, 1.0, 10.0)]
        assert intervals == sorted(intervals)


def test_survivors_count_as_much_as_ends() -> None:
    """Of many tasks together the first ends are the shortest; the rest say so."""
    crowd, alone = make(), make()
    for model in (crowd, alone):
        for _ in range(1000):
            model.started()
        for _ in range(100):
            model.saw_end(14.0, 15.0)
            model.left()
    for _ in range(900):
        crowd.saw_running(0.0, 15.0)
    for model in (crowd, alone):
        model.learn()
    assert (alone.typical or 0) < 16
    assert (crowd.typical or 0) > 20


def test_looks_at_a_running_task_add_up() -> None:
    """Ten polls on the way are the same survival as one look at the end."""
    often, once = make(), make()
    for _ in range(20):
        for a, b in pairwise([0.0, 0.1, 0.2, 3.0, 3.1, 8.0, 9.0, 15.5, 16.0]):
            often.saw_running(a, b)
        once.saw_running(0.0, 16.0)
        for model in (often, once):
            model.saw_end(16.0, 17.0)
    for model in (often, once):
        model.learn()
    assert often._hazard == pytest.approx(once._hazard)


def test_survival_alone_is_taken_in() -> None:
    """Without a single end, many survivors past the estimate make the next look later."""
    model = make(10)
    before = model.next_age(10.0, 0.5)
    for _ in range(200):
        model.saw_running(0.0, 10.0)
    assert model.next_age(10.0, 0.5) > before


def test_a_told_duration_is_used_exactly() -> None:
    """One that lies between the two polls narrows the end down."""
    told, untold = make(), make()
    for _ in range(200):
        seen(told, 0.0, 40.0, 12.0)
        seen(untold, 0.0, 40.0)
    for model in (told, untold):
        model.learn()
    assert told.typical == pytest.approx(12, rel=0.1)
    assert (untold.typical or 0) > 15


@pytest.mark.parametrize("duration", [5.0, 10.0, 20.1, -1.0, math.nan, math.inf, "15", 10**400])
def test_a_told_duration_that_cannot_be_is_not_used(duration: Any) -> None:
    """The polls are ours, the number is not: outside of them it measures something else."""
    model, untold = make(), make()
    for _ in range(50):
        model.saw_end(10.0, 20.0, duration)
        untold.saw_end(10.0, 20.0)
    for each in (model, untold):
        each.learn()
    assert model._hazard == untold._hazard


def test_a_told_end_was_at_risk_until_it_came() -> None:
    """What is not known exactly is expected to have lived half of the bin it ended in."""
    told, untold = make(), make()
    told.saw_end(0.0, 12.0, 10.0)
    assert sum(told._new_risk) == pytest.approx(told.grid.position(10.0))
    untold.saw_end(10.0, 10.1)
    assert sum(untold._new_risk) == pytest.approx(BINS_PER_OCTAVE * math.log2(1.01) / 2)


def test_a_tenth_of_the_prior_stays() -> None:
    """However much was seen, a trace of the prior keeps unseen ages possible."""
    assert taught(25, tasks=600)._prior_weight == pytest.approx(0.1, rel=0.01)


def test_an_end_beyond_all_belief_is_still_learned() -> None:
    """Where the model saw no chance at all, an end is spread evenly."""
    model = make(1.0)
    for _ in range(300):
        live(model, 1.0)
    for _ in range(60):
        seen(model, 900.0, 2000.0)
    model.learn()
    assert (model.typical or 0) > 500


def test_ages_beyond_the_last_bin_are_the_last_bin() -> None:
    """A task that runs for days is polled at at the longest interval."""
    model = make(deadline=None)
    for _ in range(30):
        seen(model, 1e7, 1e7 + 60)
    model.learn()
    assert model.next_age(1e7, 0.5) == 1e7 + 60
    assert (model.typical or 0) > 3800


def test_a_median_beyond_the_last_bin_is_its_edge() -> None:
    """Where most tasks outlived the grid, the typical duration is the longest it can tell."""
    model = make()
    for _ in range(300):
        model.saw_running(0.0, 1e7)
    seen(model, 1e7, 1e7 + 60)
    model.learn()
    assert model.typical == model.grid.edges[-1]


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_a_change_of_all_durations_is_caught_up_with(factor: float) -> None:
    """Forty tasks after it, the median is that of the new law."""
    model, rng = taught(25, tasks=300), random.Random(3)
    for _ in range(40):
        live(model, rng.lognormvariate(math.log(25 * factor), 0.3))
    assert model.typical == pytest.approx(25 * factor, rel=0.15)


def test_more_running_tasks_mean_a_longer_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """With 1 000 running, 50 odd ends do not overturn what 500 taught."""
    monkeypatch.setattr(durations, "SURPRISE_LIMIT", math.inf)
    few, many = make(), make()
    for _ in range(1000):
        many.started()
    for model in (few, many):
        for _ in range(500):
            seen(model, 20.0, 20.5)
        model.learn()
        for _ in range(25):
            seen(model, 20.0, 20.5)
            seen(model, 80.0, 81.0)
        model.learn()
    assert _late(few) > 3 * _late(many)


def _late(model: DurationModel) -> float:
    """Chance to run for longer than 40 s."""
    return model._survival[int(model.grid.position(40.0))]


@pytest.mark.parametrize("sigma", [0.3, 0.4, 0.8])
def test_it_costs_less_than_any_fixed_interval(sigma: float) -> None:
    """Reads and delay together, at the default price, after a hundred tasks."""
    rng = random.Random(11)
    durations = [rng.lognormvariate(math.log(25), sigma) for _ in range(600)]
    model = make()
    learned = [0.5 * reads + delay for reads, delay in (live(model, d) for d in durations)]
    for interval in (0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0):
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


# --- the pacer -------------------------------------------------------------------------


def test_each_kind_has_its_own_model() -> None:
    """What one kind of task teaches says nothing about another."""
    pacer = Pacer(PollPolicy())
    images, videos = pacer.model(("images", "wan"), 25), pacer.model(("videos", "wan"), 25)
    assert pacer.model(("images", "wan"), 99) is images
    for _ in range(50):
        live(images, 10.0)
    assert videos.typical is None
    assert pacer.typical == {("images", "wan"): pytest.approx(10, rel=0.1)}


def test_the_number_of_kinds_is_bounded() -> None:
    """The kind used longest ago is forgotten, one in use is not."""
    pacer = Pacer(PollPolicy())
    kept, lost = pacer.model("kept"), pacer.model("lost")
    for k in range(MODELS_KEPT - 1):
        pacer.model("kept")
        pacer.model(k)
    assert pacer.model("kept") is kept
    assert pacer.model("lost") is not lost
    assert len(pacer._models) == MODELS_KEPT


# --- shared reads ----------------------------------------------------------------------


def test_fill_counts_due_tasks_whole_and_others_in_part() -> None:
    """Half of the interval gone is an eighth of a useful look; none gone is none."""
    tasks = [(0.0, 10.0), *[(0.0, 20.0)] * 3, (10.0, 20.0), *[(10.0, 10.0)] * 2]
    assert SharedReads.fill(10.0, tasks) == 1 + 3 / 8 + 0 + 2


@given(
    now=st.floats(-1e9, 1e9),
    tasks=st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)), max_size=50),
)
def test_fill_is_between_nothing_and_all(now: float, tasks: list[tuple[float, float]]) -> None:
    """Whatever the times, a place in a read is worth from nothing to one."""
    assert 0 <= SharedReads.fill(now, tasks) <= len(tasks)


def test_alone_a_look_costs_the_whole_price() -> None:
    """One running task, or no batch endpoint, is the single rule."""
    assert SharedReads(0.5).price(1) == 0.5
    assert SharedReads(0.5).price(0) == 0.5
    assert SharedReads(0.5, limit=1).price(1000) == 0.5


def test_useful_seats_make_looks_cheaper() -> None:
    """Reads full of due tasks lower the price of a seat, reads of others raise it."""
    shared = SharedReads(0.5)
    start = shared.price(1000)
    for _ in range(100):
        shared.saw_read(10.0, [(0.0, 10.0)] * 50)
    cheap = shared.price(1000)
    for _ in range(100):
        shared.saw_read(0.1, [(0.0, 10.0)] * 50)
    assert 0.5 / 50 <= cheap < 0.6 / 50 < start < shared.price(1000) <= 0.5


@settings(max_examples=300, deadline=None)
@given(
    polled=st.floats(0, 2e9),
    min_interval=st.floats(0.01, 60),
    wait=st.floats(1, 1000),
    running=st.integers(51, 10_000),
)
def test_a_beat_is_about_when_a_look_is_due(
    polled: float, min_interval: float, wait: float, running: int
) -> None:
    """All that is due about then shares it; nobody is polled at too soon or much too late."""
    due = polled + wait * min_interval
    shared = SharedReads(0.5, min_interval=min_interval)
    beat = shared.on_beat(due, polled, running)
    tempo = BEAT * min_interval
    slack = 1e-6 * max(1.0, polled) + 1e-6
    assert beat / tempo == pytest.approx(round(beat / tempo), abs=slack)
    assert polled + min_interval <= beat
    assert due - tempo / 2 - slack <= beat <= due + tempo + slack
    assert shared.on_beat(due, polled, 50) == due


@settings(max_examples=300, deadline=None)
@given(
    polled=st.floats(0, 1e6),
    min_interval=st.floats(0.01, 60),
    more=st.floats(1, 10),
    part=st.floats(0, 1),
)
def test_a_beat_is_within_the_two_intervals(
    polled: float, min_interval: float, more: float, part: float
) -> None:
    """However near the longest interval is to the shortest, no beat leads out of them."""
    longest = min_interval * more
    due = polled + min_interval + part * (longest - min_interval)
    shared = SharedReads(0.5, min_interval=min_interval, max_interval=longest)
    beat = shared.on_beat(due, polled, 1000)
    assert polled + min_interval - 1e-6 <= beat <= polled + longest + 1e-6


def test_who_is_read_singly_or_at_given_times_keeps_them() -> None:
    """Beats are for reads that are shared, and for times that are ours to choose."""
    assert SharedReads(0.5).on_beat(10.1, 5.0, 1000) != 10.1
    assert SharedReads(0.5, limit=1).on_beat(10.1, 5.0, 1000) == 10.1
    plain = Pacer(PollPolicy(wait=tenacity.wait_fixed(3))).shared
    assert plain.on_beat(10.1, 5.0, 1000) == 10.1


def test_those_due_about_the_same_time_share_a_beat() -> None:
    """Half of them a little early, half a little late."""
    shared = SharedReads(0.5)
    dues = [100 + k / 100 for k in range(200)]
    beats = {shared.on_beat(due, 0.0, 1000) for due in dues}
    assert 3 <= len(beats) <= 5
    off = [shared.on_beat(due, 0.0, 1000) - due for due in dues]
    assert min(off) < -0.3
    assert max(off) > 0.3


def test_a_read_of_one_teaches_nothing_about_sharing() -> None:
    """After a long time alone a crowd starts from the first guess."""
    shared = SharedReads(0.5)
    for _ in range(100):
        shared.saw_read(10.0, [(0.0, 10.0)])
    assert shared.price(2000) == SharedReads(0.5).price(2000)


# --- callbacks -------------------------------------------------------------------------


def test_while_callbacks_come_looks_are_rare() -> None:
    """A look at a task with a callback is a hundred times as dear at first."""
    trust = CallbackTrust()
    assert trust.price(0.5) == pytest.approx(50)
    model = taught(25)
    assert model.next_age(0.0, trust.price(0.5)) > model.next_age(0.0, 0.5) + 5


def test_missed_callbacks_turn_into_plain_polling() -> None:
    """The first one missed counts at once; after ten the price is nearly the plain one."""
    trust = CallbackTrust()
    trust.saw_missed()
    assert trust.price(0.5) < 2
    for _ in range(9):
        trust.saw_missed()
    assert 0.5 <= trust.price(0.5) < 0.52


def test_trust_in_callbacks_comes_back() -> None:
    """A hundred callbacks after an outage polls are rare again."""
    trust = CallbackTrust()
    for _ in range(1000):
        trust.saw_missed()
    for _ in range(100):
        trust.saw_callback()
    assert trust.price(0.5) == pytest.approx(50)
