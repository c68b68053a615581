"""What a batch may cost, and what it says it did."""

from __future__ import annotations

import asyncio
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from desk import Desk, prompts, stop_of, until

from evolink_async import PollPolicy
from evolink_async.batch import BatchProgress, Invalid, run_batch
from evolink_async.emulator import Emulator, faults
from evolink_async.emulator._exchange import Exchange
from evolink_async.errors import ConfigurationError


@pytest.mark.parametrize("limit", [0, 1, 7, 10])
async def test_max_credits_holds(desk: Desk, limit: int) -> None:
    """Not one credit more is reserved than allowed, in all runs together."""
    lines = [{"prompt": f"lake {k}", "n": 1 + k % 2} for k in range(12)]
    report = await desk.run(lines, max_credits=limit)
    books = desk.emulator.books
    assert books.charged + books.reserved <= limit
    assert limit - books.charged < 2
    assert (stop_of(report).kind, report.exit_code) == ("max_credits", 1)
    again = await desk.run(lines, max_credits=limit)
    assert books.charged <= limit
    assert again.credits == books.charged


async def test_the_first_submit_of_a_model_goes_alone(desk: Desk) -> None:
    """Until its price is known nothing else is put at risk; then the limit is used in full."""
    answered = asyncio.Event()
    seen: list[int] = []

    def follow(now: BatchProgress) -> None:
        if not answered.is_set():
            seen.append(len(desk.emulator.books.submits()))
        if now.credits:
            answered.set()

    report = await desk.run(prompts(6), max_credits=6, progress=follow)
    assert max(seen) == 1
    assert report.saved == 6


async def test_refunded_credits_are_spent_again(desk: Desk) -> None:
    """A failed generation gives back its reservation, and another may be bought for it."""
    desk.emulator.faults.add(faults.TaskFails("service_error", prompt="lake 0"))
    report = await desk.run(prompts(5), max_credits=3)
    assert (report.failed, report.saved, report.queued) == (1, 3, 1)
    assert desk.emulator.books.charged == 3


async def test_uncertain_items_count_as_spent(desk: Desk) -> None:
    """What may have been charged is not spent twice."""
    desk.emulator.faults.add(faults.Reset("after", route="submit", prompt="lake 1"))
    await desk.run(prompts(2))
    await desk.run(prompts(10), max_credits=5)
    assert desk.emulator.books.charged <= 5
    desk.emulator.faults.clear()
    report = await desk.run(prompts(10), max_credits=5, resend_uncertain=True)
    assert desk.emulator.books.charged == report.credits == 5
    assert (report.saved, report.uncertain) == (5, 0)


async def test_a_forgotten_task_stays_among_what_was_spent(desk: Desk) -> None:
    """Nobody says that its credits came back: they count, once, in the sum and for the limit."""
    desk.emulator.faults.add(faults.TaskVanishes(0.5, prompt="lake 0", times=1))
    seen: list[BatchProgress] = []
    first = await desk.run(prompts(3), max_credits=3, progress=seen.append)
    assert (first.credits, seen[-1].credits, first.failed) == (3, 3, 1)
    report = await desk.run(prompts(3), max_credits=3, resubmit_expired=True, progress=seen.append)
    assert (report.credits, seen[-1].credits, report.failed) == (3, 3, 1)
    report = await desk.run(prompts(3), max_credits=4, resubmit_expired=True, progress=seen.append)
    assert (report.credits, seen[-1].credits, report.saved) == (4, 4, 3)


async def test_what_an_earlier_run_reserved_and_is_given_back_may_be_spent(desk: Desk) -> None:
    """A task left running that fails in the next run frees its credits for another."""
    desk.emulator.faults.add(faults.TaskHangs(50, prompt="lake 0"))
    settings = {"poll": PollPolicy(deadline=60), "max_in_flight": 1}
    first = await desk.run(prompts(3), max_credits=2, settings=settings)
    assert (first.running, first.saved, first.queued) == (1, 1, 1)
    desk.emulator.fail(desk.emulator.books.tasks()[0].id, "service_error")
    report = await desk.run(prompts(3), max_credits=2)
    assert (report.failed, report.saved, report.credits) == (1, 2, 2)


class Priceless(faults.RequestFault):
    """Answers that do not say what anything costs."""

    async def after(self, _exchange: Exchange, response: web.Response) -> web.StreamResponse:
        assert isinstance(response.body, bytes)
        answer = json.loads(response.body)
        for task in answer.get("data", [answer]):
            task.pop("usage", None)
        return web.json_response(answer)


async def test_an_api_that_names_no_price_cannot_be_limited(desk: Desk) -> None:
    """After one generation of unknown price no more is put at risk; without a limit all go on."""
    desk.emulator.faults.add(Priceless(route=("submit", "read", "batch")))
    report = await desk.run(prompts(5), max_credits=3)
    assert stop_of(report).kind == "max_credits"
    assert "does not say what" in stop_of(report).message
    assert (report.saved, report.queued, report.still_to_pay) == (1, 4, None)
    assert (await desk.run(prompts(5))).saved == 5


@pytest.mark.parametrize("known", [False, True])
async def test_max_credits_holds_over_runs_that_are_left_and_know_no_reservation(
    desk: Desk, *, known: bool
) -> None:
    """What runs on from an earlier run counts at the highest price seen, or is waited for."""
    if known:
        await desk.run(["first"])
    lines = ["first", *prompts(12)] if known else prompts(12)
    desk.emulator.faults.add(Priceless(route="submit"))
    books = desk.emulator.books
    accepted = "SELECT task_id FROM items WHERE task_id IS NOT NULL"
    for _ in range(6):
        stop, before = asyncio.Event(), desk.rows(accepted) if desk.out.exists() else []

        def follow(
            _: BatchProgress, stop: asyncio.Event = stop, before: list[Any] = before
        ) -> None:
            if len(desk.rows(accepted)) > len(before):
                stop.set()

        await desk.run(lines, max_credits=4, stop=stop, grace=0, progress=follow)
        assert books.charged + books.reserved <= 4
    report = await desk.run(lines, max_credits=4)
    assert stop_of(report).kind == "max_credits"
    assert (books.charged, report.saved + report.uncertain) == (4, 4)


@pytest.mark.parametrize("said", ["-5", "1e308", "NaN", "true", '"1"'])
async def test_what_is_no_number_of_credits_counts_as_not_said(desk: Desk, said: str) -> None:
    """It neither lifts the limit nor uses it up: the end of the first task says the price."""

    class Absurd(faults.RequestFault):
        async def after(self, _exchange: Exchange, response: web.Response) -> web.StreamResponse:
            assert isinstance(response.body, bytes)
            body = re.sub(
                rb'("credits_reserved": ?)[\d.]+', rb"\g<1>" + said.encode(), response.body
            )
            assert body != response.body
            return web.Response(body=body, content_type="application/json")

    desk.emulator.faults.add(Absurd(route="submit"))
    report = await desk.run(prompts(6), max_credits=3)
    assert (desk.emulator.books.charged, report.credits, report.saved) == (3, 3, 3)


@pytest.mark.parametrize("stated", [False, True])
async def test_progress_and_report_agree_on_credits(desk: Desk, *, stated: bool) -> None:
    """Spent and uncertain credits are separate, and the same at the end as on the way."""
    if not stated:
        desk.emulator.faults.add(Priceless(route="submit"))
    await desk.run(["first"])
    desk.emulator.faults.add(
        faults.Reset("after", route="submit", prompt="lake 1"),
        faults.TaskFails("service_error", prompt="lake 2"),
        faults.TaskVanishes(0.5, prompt="lake 3"),
    )
    seen: list[BatchProgress] = []
    report = await desk.run(["first", *prompts(6)], max_credits=6, progress=seen.append)
    assert (report.saved, report.failed, report.uncertain) == (4, 2, 1)
    assert (report.credits, report.credits_uncertain) == (5, 1)
    assert (seen[-1].credits, seen[-1].credits_uncertain) == (5, 1)


async def test_what_has_not_left_when_it_is_stopped_is_not_held(tmp_path: Path) -> None:
    """Submits that wait for their turn give back their reservations."""
    seen: list[BatchProgress] = []
    async with Emulator(pictures="tiny", time_scale=100, estimate=1) as emulator:
        desk = Desk(emulator, tmp_path / "out")
        await desk.run(["first"])
        emulator.faults.add(faults.Status(429, retry_after=200, route="submit", nth=1))
        stop = asyncio.Event()
        async with desk.session(max_requests_per_second=2, clock=None) as session:
            job = asyncio.create_task(
                run_batch(
                    session,
                    ["first", *prompts(6)],
                    desk.out,
                    stop=stop,
                    grace=0.05,
                    progress=seen.append,
                )
            )
            await until(lambda: session.stats.cool_downs > 0)
            stop.set()
            report = await job
    assert (report.queued, report.credits, seen[-1].credits) == (6, 1, 1)


async def test_what_failed_without_a_reservation_is_no_price(desk: Desk) -> None:
    """A free failure of an earlier run does not lift the limit of the next."""
    desk.emulator.faults.add(Priceless(route="submit"), faults.TaskFails("service_error", times=1))
    assert (await desk.run(["lake 0"])).failed == 1
    await desk.run(prompts(6), max_credits=2)
    assert desk.emulator.books.charged == 2


async def test_an_uncertain_first_submit_is_the_only_one_of_unknown_price(desk: Desk) -> None:
    """However often it is run again, no other is risked before the price of that one is known."""
    desk.emulator.faults.add(faults.Reset("after", route="submit"))
    for _ in range(3):
        report = await desk.run(prompts(9), max_credits=3)
        assert (report.uncertain, len(desk.emulator.books.submits())) == (1, 1)
        assert "uncertain items resent first" in stop_of(report).message
    desk.emulator.faults.clear()
    report = await desk.run(prompts(9), max_credits=3, resend_uncertain=True)
    assert (report.saved, desk.emulator.books.charged) == (3, 3)


async def test_a_vanished_task_of_unstated_cost_stays_among_what_was_spent(desk: Desk) -> None:
    """It counts at the highest price seen, also when it has been bought anew."""
    await desk.run(["first"])
    lines = ["first", *prompts(5)]
    desk.emulator.faults.add(
        Priceless(route="submit"), faults.TaskVanishes(0.5, prompt="lake 0", times=1)
    )
    first = await desk.run(lines, max_credits=3)
    assert (first.failed, first.saved, first.queued) == (1, 2, 3)
    report = await desk.run(lines, max_credits=4, resubmit_expired=True)
    assert (report.saved, report.failed, report.queued) == (3, 1, 2)


async def test_a_refused_first_submit_leaves_the_price_to_the_next(desk: Desk) -> None:
    """Another item of the model asks for it then."""
    desk.emulator.faults.add(faults.Status(400, route="submit", nth=1))
    report = await desk.run(prompts(4), max_credits=2)
    assert (report.failed, report.saved, report.queued) == (1, 2, 1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stop", True),
        ("grace", "x"),
        ("grace", float("nan")),
        ("grace", -1),
        ("outage_timeout", -1),
        ("outage_timeout", None),
        ("progress", 5),
        ("on_invalid", "yes"),
        ("out", None),
        ("out", ""),
        ("source", ""),
    ],
)
async def test_arguments_that_are_none_are_refused(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: Any
) -> None:
    """By name, before anything is made or sent."""
    monkeypatch.chdir(tmp_path)
    given: dict[str, Any] = {"source": ["a"], "out": tmp_path / "out", name: value}
    async with desk.session() as session:
        with pytest.raises(ConfigurationError, match=name):
            await run_batch(session, given.pop("source"), given.pop("out"), **given)
    assert os.listdir(tmp_path) == []  # noqa: PTH208 - not in an async function


async def test_standard_input_that_is_closed(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is nothing to read then, and nothing is left behind."""
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(ConfigurationError, match="standard input is closed"):
        await desk.run("-")
    assert not desk.out.exists()


async def test_prompts_of_a_script_hold_no_control_characters(desk: Desk) -> None:
    """As those of a file; lines and tabs are part of a prompt."""
    bad: list[Invalid] = []
    prompts = ["a\x00b", "a\x1b[31mb", {"prompt": "a\x7f"}, "one\ntwo\tthree"]
    report = await desk.run(prompts, skip_invalid=True, on_invalid=bad.append)
    assert [(line.line, line.reason[:26]) for line in bad] == [
        (1, "character 2 of the prompt "),
        (2, "character 2 of the prompt "),
        (3, "character 2 of the prompt "),
    ]
    assert (report.saved, desk.bought) == (1, {"one\ntwo\tthree": 1})


async def test_uncertain_credits_of_unknown_price_are_unknown(desk: Desk) -> None:
    """Nobody has said yet what the one that may have been accepted costs: not 0."""
    desk.emulator.faults.add(faults.Reset("after", route="submit", nth=1))
    seen: list[BatchProgress] = []
    report = await desk.run(["a"], progress=seen.append)
    assert (report.uncertain, report.credits, report.credits_uncertain) == (1, 0, None)
    assert seen[-1].credits_uncertain is None


@pytest.mark.parametrize("limit", [-1, True, "5", float("nan")])
async def test_a_limit_that_is_none_is_refused(desk: Desk, limit: Any) -> None:
    """It must be a number of credits."""
    with pytest.raises(ConfigurationError, match="max_credits"):
        await desk.run(["a"], max_credits=limit)
