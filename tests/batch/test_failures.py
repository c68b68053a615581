"""Batches whose generations fail, expire, or may have been paid for."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from desk import RETRY, Desk, prompts, stop_of

from evolink_async import PollPolicy, RetryPolicy, Session
from evolink_async.batch import BatchProgress, run_batch
from evolink_async.emulator import Emulator, ManualClock, RealClock, faults
from evolink_async.errors import LedgerError


async def test_failures_do_not_stop_the_others(desk: Desk) -> None:
    """A prompt refused for its content fails alone, and is named with its reason."""
    desk.emulator.faults.add(faults.TaskFails("content_policy_violation", "no!", prompt="lake 3"))
    report = await desk.run(prompts(10))
    assert (report.saved, report.failed, report.exit_code) == (9, 1, 1)
    (problem,) = report.problems
    assert (problem.line, problem.code, problem.message) == (4, "content_policy_violation", "no!")
    assert not problem.retryable
    assert report.credits == desk.emulator.books.charged == 9


async def test_only_what_may_help_is_retried(desk: Desk) -> None:
    """Retrying failed items leaves those alone that would fail again."""
    desk.emulator.faults.add(
        faults.TaskFails("content_policy_violation", prompt="lake 1"),
        faults.TaskFails("service_error", prompt="lake 2", times=1),
        faults.Status(400, "too many tokens", route="submit", prompt="lake 3"),
        faults.Status(403, "not this model", route="submit", prompt="lake 4", times=1),
        faults.TaskCancelled(prompt="lake 5"),
    )
    first = await desk.run(prompts(6))
    assert (first.saved, first.failed, first.retryable) == (1, 5, 2)
    again = await desk.run(prompts(6))
    assert (again.saved, again.failed) == (1, 5)
    second = await desk.run(prompts(6), retry_failed=True)
    assert (second.saved, second.failed, second.retryable) == (3, 3, 0)
    assert desk.bought == {"lake 0": 1, "lake 1": 1, "lake 2": 2, "lake 4": 1, "lake 5": 1}
    codes = {p.line: p.code for p in second.problems}
    assert codes == {2: "content_policy_violation", 4: "http_400", 6: "request_cancelled"}


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        (faults.Status(401, route="submit", nth=4), "authentication"),
        (faults.Status(402, route="submit", nth=4), "credits"),
        (faults.Status(429, code="insufficient_quota", route="submit", nth=4), "credits"),
    ],
)
async def test_what_concerns_all_submits_stops_them(
    desk: Desk, fault: faults.Fault, kind: str
) -> None:
    """After a 401 or 402 no more is submitted; what runs is saved; what is left is named."""
    desk.emulator.faults.add(fault)
    settings = {"max_connections": 1}
    report = await desk.run(prompts(10), settings=settings)
    assert (stop_of(report).kind, report.exit_code) == (kind, 3)
    assert (report.saved, report.queued, report.still_to_pay) == (3, 7, 7.0)
    assert len(desk.emulator.books.submits()) == 4
    desk.emulator.faults.clear()
    assert (await desk.run(prompts(10))).saved == 10
    assert set(desk.bought.values()) == {1}


@pytest.mark.parametrize("status", [403, 404])
async def test_a_refusal_of_the_very_first_submits_stops_them(desk: Desk, status: int) -> None:
    """A wrong address or a model that is not allowed fails no item: all stay queued."""
    desk.emulator.faults.add(faults.Status(status, route="submit"))
    report = await desk.run(prompts(50))
    assert (stop_of(report).kind, report.exit_code) == ("refused", 3)
    assert (report.failed, report.queued) == (0, 50)
    assert len(desk.emulator.books.submits()) <= 16
    desk.emulator.faults.clear()
    assert (await desk.run(prompts(50))).saved == 50


async def test_an_empty_account_pays_for_what_it_can(tmp_path: Path, clock: ManualClock) -> None:
    """Credits that run out in the middle leave the others queued, to be bought after topping up."""
    async with Emulator(clock=clock, pictures="tiny", credits=7) as emulator:
        desk = Desk(emulator, tmp_path)
        report = await desk.run(prompts(20))
    assert (report.saved, report.queued, report.still_to_pay) == (7, 13, 13.0)
    assert stop_of(report).kind == "credits"


async def test_an_outage_is_waited_out(desk: Desk) -> None:
    """Submits that are surely refused for a while are put off, not lost and not doubled."""
    desk.emulator.faults.add(faults.Status(503, route="submit", between=(0, 120)))
    report = await desk.run(prompts(20))
    assert (report.saved, report.exit_code) == (20, 0)
    assert set(desk.bought.values()) == {1}


async def test_what_waited_while_another_was_put_off_is_not_bought_twice(tmp_path: Path) -> None:
    """The queue is read before the pause; an item submitted during it is not in it any more."""
    fast = RealClock(50.0)
    async with Emulator(clock=fast, pictures="tiny", duration=0.2, estimate=0) as emulator:
        desk = Desk(emulator, tmp_path / "out")
        emulator.faults.add(
            faults.Status(503, route="submit", prompt="lake 0", times=1, retry_after=1)
        )
        settings = {"max_connections": 4, "retry": RetryPolicy(attempts=1)}
        report = await desk.run(prompts(4), settings=settings)
    assert report.saved == 4
    assert desk.bought == {f"lake {k}": 1 for k in range(4)}


async def test_an_api_that_is_not_there_is_asked_at_intervals(desk: Desk) -> None:
    """Every 15 seconds at most, until the batch has had enough; all stays queued."""
    seen: list[BatchProgress] = []
    nowhere = "http://127.0.0.1:9"
    async with Session("key", base_url=nowhere, retry=RETRY, clock=desk.emulator.clock) as session:
        report = await run_batch(
            session, prompts(5), desk.out, outage_timeout=60, progress=seen.append
        )
    assert (stop_of(report).kind, report.queued) == ("network", 5)
    tries = sum(now.running > before.running for before, now in pairwise(seen))
    assert 5 < tries <= 5 * (1 + 60 / 15)


async def test_an_outage_without_end_stops_the_batch(desk: Desk) -> None:
    """After so long without one accepted submit the batch says why and ends, all still queued."""
    desk.emulator.faults.add(faults.Status(503, route="submit"))
    report = await desk.run(prompts(5), outage_timeout=300)
    assert (stop_of(report).kind, report.exit_code, report.queued) == ("network", 3, 5)


async def test_a_server_that_never_says_what_became_of_submits_is_left(desk: Desk) -> None:
    """Money is put at risk a few times, not a thousand."""
    desk.emulator.faults.add(faults.Status(500, route="submit", processed=True))
    report = await desk.run(prompts(200))
    assert stop_of(report).kind == "network"
    assert 8 <= report.uncertain <= 8 + 16
    assert report.uncertain == len(desk.emulator.books.submits())


async def test_uncertain_items_are_named_and_resent_only_when_asked(desk: Desk) -> None:
    """A lost answer is reported with its key; resent with it, the generation is paid once."""
    desk.emulator.faults.add(
        faults.Reset("after", route="submit", prompt="lake 1"),
        faults.Reset("before", route="submit", prompt="lake 2"),
    )
    first = await desk.run(prompts(4))
    assert (first.saved, first.uncertain, first.exit_code) == (2, 2, 1)
    assert {p.line: p.code for p in first.problems} == {
        2: "submit_uncertain",
        3: "submit_uncertain",
    }
    keys = {p.idempotency_key for p in first.problems}
    desk.emulator.faults.clear()
    submits = len(desk.emulator.books.submits())
    assert (await desk.run(prompts(4))).uncertain == 2
    assert len(desk.emulator.books.submits()) == submits
    last = await desk.run(prompts(4), resend_uncertain=True)
    assert (last.saved, last.uncertain) == (4, 0)
    assert {r.idempotency_key for r in desk.emulator.books.submits()[submits:]} == keys
    assert set(desk.bought.values()) == {1}
    assert desk.emulator.books.charged == last.credits == 4


async def test_an_uncertain_item_whose_repeat_is_put_off_is_resent_by_the_same_run(
    desk: Desk,
) -> None:
    """With its key, once the API takes submits again; until then it stays uncertain."""
    desk.emulator.faults.add(faults.Reset("after", route="submit", times=1))
    (problem,) = (await desk.run(["a"])).problems
    desk.emulator.faults.add(faults.Status(503, route="submit", times=3))
    report = await desk.run(["a"], resend_uncertain=True)
    assert (report.saved, report.uncertain, report.credits) == (1, 0, 1)
    keys = {record.idempotency_key for record in desk.emulator.books.submits()}
    assert keys == {problem.idempotency_key}
    assert desk.bought == {"a": 1}


async def test_uncertain_items_that_left_the_input_are_named_and_resent_like_others(
    desk: Desk,
) -> None:
    """They may be paid for: until they are resent they are named, without the line they had."""
    desk.emulator.faults.add(faults.Reset("after", route="submit", prompt="a"))
    assert (await desk.run([{"id": "x", "prompt": "a"}, "b"])).uncertain == 1
    desk.emulator.faults.clear()
    (problem,) = (await desk.run(["b"])).problems
    assert (problem.line, problem.id, problem.state) == (None, "x", "uncertain")
    report = await desk.run(["b"], resend_uncertain=True)
    assert desk.bought == {"a": 1, "b": 1}
    assert (report.saved, report.uncertain, report.exit_code) == (2, 0, 0)


async def test_every_uncertain_item_is_named_before_a_thousand_others(desk: Desk) -> None:
    """Failures do not hide what may have been paid for, and what is left out is counted."""
    desk.emulator.faults.add(faults.Status(400, route="submit", prompt="lake"))
    lines = [*prompts(1004), "uncertain 1", "uncertain 2"]
    desk.emulator.faults.add(faults.Reset("after", route="submit", prompt="uncertain"))
    report = await desk.run(lines, settings={"max_in_flight": 200})
    assert (report.failed, report.uncertain) == (1004, 2)
    assert [problem.line for problem in report.problems[:3]] == [1005, 1006, 1]
    assert (len(report.problems), report.problems_left_out) == (1002, 4)


async def test_as_much_nesting_as_is_kept_reaches_the_manifest(desk: Desk) -> None:
    """The deepest metadata that is taken is written and read again."""
    deep: list[Any] = []
    for _ in range(98):
        deep = [deep]
    await desk.run([{"prompt": "a", "deep": deep}])
    assert desk.manifest()[0]["metadata"] == {"deep": deep}


async def test_a_refused_repeat_says_nothing_about_the_first(desk: Desk) -> None:
    """An uncertain item whose repeat is refused stays uncertain, with its key."""
    desk.emulator.faults.add(faults.Reset("after", route="submit", times=1))
    (before,) = (await desk.run(["a"])).problems
    desk.emulator.faults.add(faults.Status(400, route="submit"))
    (after,) = (await desk.run(["a"], resend_uncertain=True)).problems
    assert (after.state, after.idempotency_key) == ("uncertain", before.idempotency_key)
    desk.emulator.faults.clear()
    desk.emulator.faults.add(faults.Status(402, route="submit"))
    report = await desk.run(["a"], resend_uncertain=True)
    assert report.uncertain == 1


async def test_a_task_past_its_deadline_stays_submitted(desk: Desk) -> None:
    """It is picked up again by the next run, not bought again."""
    desk.emulator.faults.add(faults.TaskHangs(50))
    first = await desk.run(["a"], settings={"poll": PollPolicy(deadline=60)})
    assert (first.running, first.exit_code) == (1, 1)
    assert first.problems[0].state == "submitted"
    desk.emulator.complete(desk.emulator.books.tasks()[0].id)
    assert (await desk.run(["a"])).saved == 1
    assert desk.bought == {"a": 1}


async def test_a_task_the_api_has_forgotten_is_offered_for_resubmission(desk: Desk) -> None:
    """It fails, and is paid for again only when that is asked for."""
    desk.emulator.faults.add(faults.TaskVanishes(0.5, prompt="a", times=1))
    first = await desk.run(["a"])
    assert (first.failed, first.expired, first.problems[0].code) == (1, 1, "task_not_found")
    assert "resubmit_expired" not in (first.problems[0].message or "")  # the command shows it, too
    assert (await desk.run(["a"], retry_failed=True)).failed == 1
    assert (await desk.run(["a"], resubmit_expired=True)).saved == 1
    assert desk.bought == {"a": 2}


async def test_a_task_that_is_known_again_is_not_bought_again(desk: Desk) -> None:
    """Before a forgotten task is paid for again, or retried, it is asked for once more."""
    fault = faults.Status(404, route=("read", "batch"))
    options: tuple[dict[str, Any], ...] = ({"resubmit_expired": True}, {"retry_failed": True})
    for asked in options:
        prompt = f"lake {asked}"
        desk.emulator.faults.add(fault)
        assert (await desk.run([prompt])).failed == 1
        desk.emulator.faults.clear()
        report = await desk.run([prompt], **asked)
        assert report.failed == 0
        assert desk.bought[prompt] == 1
        assert desk.manifest()[-1]["error"] is None


async def test_another_api_or_key_is_refused_before_anything_is_asked_of_it(
    desk: Desk, clock: ManualClock
) -> None:
    """The tasks of a folder are known to one account of one API only."""
    await desk.run(["a"])
    async with Emulator(clock=clock, pictures="tiny") as other:
        elsewhere = Desk(other, desk.out)
        with pytest.raises(LedgerError, match="set EVOLINK_BASE_URL back") as caught:
            await elsewhere.run(["a", "b"])
        assert desk.emulator.base_url in str(caught.value)
        assert other.base_url in str(caught.value)
        assert other.books.requests() == ()
    async with Session("sk-another-key", base_url=desk.emulator.base_url) as session:
        with pytest.raises(LedgerError, match="another account's key"):
            await run_batch(session, ["a"], desk.out)
        assert (await run_batch(session, ["a"], desk.out, new_key=True)).saved == 1


async def test_an_api_that_accepted_nothing_does_not_hold_the_folder(
    desk: Desk, clock: ManualClock
) -> None:
    """After a run against a wrong one, the right one can take over."""
    desk.emulator.faults.add(faults.Status(400, route="submit"))
    await desk.run(["a"])
    async with Emulator(clock=clock, pictures="tiny") as other:
        assert (await Desk(other, desk.out).run(["b"])).saved == 1


async def test_a_completed_task_without_results_has_failed(desk: Desk) -> None:
    """There is nothing to save, and that is said."""
    desk.emulator.faults.add(faults.FewerResults(0))
    report = await desk.run(["a"])
    assert (report.failed, report.problems[0].code) == (1, "no_results")
