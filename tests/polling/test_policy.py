"""The polling policy: which settings are allowed, their bounds, and plain backoff."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import tenacity
from hypothesis import given
from hypothesis import strategies as st

from evolink_async._polling.policy import Backoff, PollPolicy
from evolink_async._polling.pricing import Pacer
from evolink_async.errors import ConfigurationError

ages = st.floats(min_value=0, max_value=1e12) | st.floats(min_value=1e-9, max_value=4000)
any_float = st.floats(allow_nan=True, allow_infinity=True)


@pytest.mark.parametrize("name", ["price", "min_interval", "max_interval", "deadline"])
@pytest.mark.parametrize("value", [0, -1, math.nan, math.inf, 1e10, True, "1", [1]])
def test_a_policy_refuses_values_that_are_not_allowed(name: str, value: object) -> None:
    """The message names the field, the value and what is allowed."""
    with pytest.raises(ConfigurationError) as caught:
        PollPolicy(**{name: value})  # type: ignore[arg-type]  # that is the point
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)
    assert "a number from" in str(caught.value)


@pytest.mark.parametrize("name", ["price", "min_interval", "max_interval"])
def test_only_the_deadline_may_be_none(name: str) -> None:
    """None means no deadline; it means nothing for a price or an interval."""
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
    """Later than the last poll, not past the deadline, not sooner or later than allowed."""
    policy = PollPolicy(min_interval=0.5, max_interval=20, deadline=deadline)
    when = policy.clamp(age, proposed)
    assert age < when <= age + 20
    if deadline is not None and age < deadline:
        assert when <= deadline
    assert when >= age + 0.5 or when == deadline


def test_clamp_survives_an_age_that_is_no_number() -> None:
    """A broken clock costs one ordinary interval."""
    assert PollPolicy(min_interval=0.5).clamp(math.nan, math.nan) == 0.5


def test_a_strategy_is_given_the_number_of_polls() -> None:
    """The first poll is attempt 1, and nothing is learned."""
    policy = PollPolicy(wait=tenacity.wait_incrementing(start=1, increment=2))
    schedule = Pacer(policy).model("kind", 30)
    assert isinstance(schedule, Backoff)
    assert [schedule.next_age(10, 0.5, polls) for polls in range(3)] == [11, 13, 15]
    schedule.saw_running(0.0, 10.0)
    schedule.saw_end(10.0, 20.0)
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
def test_a_strategy_that_cannot_answer_is_refused(wait: object) -> None:
    """A strategy that needs the outcome is refused when the policy is made, not later."""
    with pytest.raises(ConfigurationError, match=r"wait=.*only the attempt number"):
        PollPolicy(wait=wait)


def test_tenacity_is_loaded_only_for_a_strategy() -> None:
    """The module itself is light."""
    assert _loads_tenacity("evolink_async._polling.policy") == _loads_tenacity("evolink_async")


def _loads_tenacity(module: str) -> int:
    code = f"import sys, {module}; sys.exit('tenacity' in sys.modules)"
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=False).returncode  # noqa: S603 - our own line
