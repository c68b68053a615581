"""What a poll costs: shared by the tasks of a read, spared by callbacks; a schedule per kind."""

from __future__ import annotations

import math
import random

import pytest
import tenacity
from hypothesis import given, settings
from hypothesis import strategies as st

from evolink_async._polling.policy import PollPolicy
from evolink_async._polling.pricing import BEAT, MODELS_KEPT, Callbacks, Pacer, SharedReads


def test_each_kind_has_its_own_model() -> None:
    """What one kind of task teaches says nothing about another."""
    pacer = Pacer(PollPolicy())
    images, videos = pacer.model("images wan", 25), pacer.model("videos wan", 25)
    assert pacer.model("images wan", 99) is images
    for _ in range(50):
        images.saw_running(0.0, 10.0)
        images.saw_end(10.0, 10.5)
    assert videos.typical is None
    assert pacer.typical == {"images wan": pytest.approx(10, rel=0.1)}


def test_the_number_of_kinds_is_bounded() -> None:
    """The kind used longest ago is forgotten, one in use is not."""
    pacer = Pacer(PollPolicy())
    kept, lost = pacer.model("kept"), pacer.model("lost")
    for k in range(MODELS_KEPT - 1):
        pacer.model("kept")
        pacer.model(str(k))
    assert pacer.model("kept") is kept
    assert pacer.model("lost") is not lost
    assert len(pacer._models) == MODELS_KEPT


def test_a_read_is_useful_to_tasks_that_are_due_and_in_part_to_others() -> None:
    """Half of the interval gone is an eighth of a useful poll; none gone is none."""
    tasks = [(0.0, 10.0), *[(0.0, 20.0)] * 3, (10.0, 20.0), *[(10.0, 10.0)] * 2]
    shared = SharedReads(PollPolicy())
    for _ in range(1000):
        shared.saw_read(10.0, tasks)
    assert shared.usefulness == pytest.approx((1 + 3 / 8 + 0 + 2) / 7)


@given(
    now=st.floats(-1e9, 1e9),
    tasks=st.lists(st.tuples(st.floats(-1e9, 1e9), st.floats(-1e9, 1e9)), max_size=50),
)
def test_usefulness_is_from_nothing_to_one(now: float, tasks: list[tuple[float, float]]) -> None:
    """Whatever the times, the price of a poll stays between that of a read and a fiftieth of it."""
    shared = SharedReads(PollPolicy())
    for _ in range(100):
        shared.saw_read(now, tasks)
    assert 0 <= shared.usefulness <= 1
    assert 0.5 / 50 <= shared.price(1000) <= 0.5


def test_alone_a_poll_costs_the_whole_price() -> None:
    """With one running task, or without the batch endpoint, nothing is shared."""
    assert SharedReads(PollPolicy()).price(1) == 0.5
    assert SharedReads(PollPolicy()).price(0) == 0.5
    assert SharedReads(PollPolicy(), limit=1).price(1000) == 0.5


def test_useful_reads_make_polls_cheaper() -> None:
    """Reads full of due tasks lower the price of a poll, reads of others raise it."""
    shared = SharedReads(PollPolicy())
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
def test_a_beat_is_about_when_a_poll_is_due(
    polled: float, min_interval: float, wait: float, running: int
) -> None:
    """Tasks due about then share it; none is polled too soon or much too late."""
    due = polled + wait * min_interval
    shared = SharedReads(PollPolicy(min_interval=min_interval, max_interval=1e6))
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
    shared = SharedReads(PollPolicy(min_interval=min_interval, max_interval=longest))
    beat = shared.on_beat(due, polled, 1000)
    assert polled + min_interval - 1e-6 <= beat <= polled + longest + 1e-6


def test_single_reads_and_plain_backoff_have_no_beats() -> None:
    """Beats are for reads that are shared and for times that were learned."""
    assert SharedReads(PollPolicy()).on_beat(10.1, 5.0, 1000) != 10.1
    assert SharedReads(PollPolicy(), limit=1).on_beat(10.1, 5.0, 1000) == 10.1
    plain = Pacer(PollPolicy(wait=tenacity.wait_fixed(3))).shared
    assert plain.on_beat(10.1, 5.0, 1000) == 10.1


def test_tasks_due_about_the_same_time_share_a_beat() -> None:
    """Half of them a little early, half a little late."""
    shared = SharedReads(PollPolicy())
    dues = [100 + k / 100 for k in range(200)]
    beats = {shared.on_beat(due, 90.0, 1000) for due in dues}
    assert 3 <= len(beats) <= 5
    off = [shared.on_beat(due, 90.0, 1000) - due for due in dues]
    assert min(off) < -0.3
    assert max(off) > 0.3


def test_a_read_of_one_teaches_nothing_about_sharing() -> None:
    """After a long time alone, many tasks start from the first guess."""
    shared = SharedReads(PollPolicy())
    for _ in range(100):
        shared.saw_read(10.0, [(0.0, 10.0)])
    assert shared.price(2000) == SharedReads(PollPolicy()).price(2000)


def test_while_callbacks_come_polls_are_rare() -> None:
    """A poll of a task with a callback is a hundred times as dear at first."""
    callbacks = Callbacks()
    assert callbacks.price(0.5, 0.5) == pytest.approx(50)
    model = Pacer(PollPolicy()).model("kind", 25)
    assert model.next_age(0.0, callbacks.price(0.5, 0.5)) > model.next_age(0.0, 0.5) + 5


def test_missed_callbacks_turn_into_plain_polling() -> None:
    """The first one missed counts at once; after ten the price is nearly the plain one."""
    callbacks = Callbacks()
    callbacks.saw_missed(0.0, pause=15.0)
    assert callbacks.price(0.5, 0.5) < 2
    for _ in range(9):
        callbacks.saw_missed(0.0, pause=15.0)
    assert 0.5 <= callbacks.price(0.5, 0.5) < 0.52


def test_trust_in_callbacks_comes_back() -> None:
    """A hundred callbacks after an outage, polls are rare again."""
    callbacks = Callbacks()
    for _ in range(1000):
        callbacks.saw_missed(0.0, pause=15.0)
    for _ in range(100):
        callbacks.saw_callback()
    assert callbacks.price(0.5, 0.5) == pytest.approx(50)


def first_batch(truth: float, estimate: float) -> tuple[float, float]:
    """Wall time and J per task of 160 tasks, 32 at a time, each wave polled by shared reads."""
    pacer, rng = Pacer(PollPolicy()), random.Random(1)
    model = pacer.model("kind", estimate)
    wall, cost = 0.0, 0.0
    for _ in range(5):
        running = [truth * math.exp(rng.gauss(0, 0.05)) for _ in range(32)]
        polled = 0.0
        for _ in running:
            model.started()
        while running:
            price = pacer.shared.price(len(running))
            due = model.next_age(polled, price)
            pacer.shared.saw_read(due, [(polled, due)] * len(running))
            for duration in running:
                if duration <= due:
                    model.saw_end(polled, due)
                    model.left()
                    cost += due - duration
                else:
                    model.saw_running(polled, due)
            running = [duration for duration in running if duration > due]
            polled, cost = due, cost + 0.5
        wall += polled
    return wall, cost / 160


@pytest.mark.parametrize("estimate", [3.0, 30.0, 300.0])
def test_a_first_batch_is_no_slower_than_a_naive_loop(estimate: float) -> None:
    """However wrong the estimate, as fast and cheap as polling all tasks each second."""
    saved = 0.0
    for truth in (2.0, 5.0, 25.0):
        wall, cost = first_batch(truth, estimate)
        naive_wall = 5 * (truth * 1.1 + 0.5)
        assert wall <= 1.1 * naive_wall
        saved += 0.5 + 0.5 * naive_wall / 160 - cost
    assert saved > 0
