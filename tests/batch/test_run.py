"""Batches in which nothing fails: run, run again, and what they leave behind."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from desk import Desk, prompts, stop_of

from evolink_async import ImageRequest, RawRequest
from evolink_async.batch import BatchProgress, _context
from evolink_async.emulator import Emulator, ManualClock, faults


async def test_a_thousand_prompts_become_a_thousand_files_for_one_submit_each(desk: Desk) -> None:
    """Each prompt is submitted once by the emulator's count, saved, and as the manifest says."""
    report = await desk.run(prompts(1000), settings={"max_in_flight": 200})
    assert (report.total, report.saved, report.pictures, report.exit_code) == (1000, 1000, 1000, 0)
    assert report.credits == desk.emulator.books.charged == 1000
    assert len(desk.emulator.books.submits()) == 1000
    assert set(desk.bought.values()) == {1}
    files = [file for item in desk.manifest() for file in item["files"]]
    assert len({file["name"] for file in files}) == 1000
    for file in files:
        content = (desk.out / file["name"]).read_bytes()
        assert (len(content), hashlib.sha256(content).hexdigest()) == (
            file["bytes"],
            file["sha256"],
        )
    assert report.gallery == desk.out / "gallery.html"
    assert desk.emulator.books.peak_running <= 200


async def test_running_it_again_submits_and_downloads_nothing(desk: Desk) -> None:
    """What is saved and still matches its check sum is left alone."""
    await desk.run(prompts(5))
    requests = len(desk.emulator.books.requests())
    report = await desk.run(prompts(5))
    assert (report.saved, report.pictures, report.exit_code) == (5, 0, 0)
    assert len(desk.emulator.books.requests()) == requests


@pytest.mark.parametrize(
    ("before", "after", "difference"),
    [
        (["a", "b"], ["new", "a", "b"], {"new": 1}),
        (["a", "b", "c"], ["c"], {}),
        (["a", "b", "c"], ["c", "a", "b"], {}),
        (["a", "b"], ["a", "b", "a", "a"], {"a": 2}),
        (["a", "a", "a"], ["a", "b", "a"], {"b": 1}),
    ],
)
async def test_editing_the_input_costs_exactly_the_difference(
    desk: Desk, before: list[str], after: list[str], difference: dict[str, int]
) -> None:
    """Inserted, deleted, moved and duplicated lines buy what was not bought before."""
    await desk.run(before)
    paid = desk.bought
    report = await desk.run(after)
    assert desk.bought - paid == Counter(difference)
    assert (
        report.saved
        == report.total
        == len(set(before + after))
        + sum(max(before.count(x), after.count(x)) - 1 for x in {*before, *after})
    )


async def test_lines_that_are_given_ids_are_not_bought_again(desk: Desk) -> None:
    """An id that is new takes over an equal item whose line is gone, and only such a one."""
    await desk.run(["a", "b", "a"])
    report = await desk.run([{"id": "x", "prompt": "a"}, "b", {"id": "y", "prompt": "a"}])
    assert (report.total, report.saved, desk.bought) == (3, 3, {"a": 2, "b": 1})
    assert [item["id"] for item in desk.manifest()] == ["x", None, "y"]
    await desk.run([{"id": "x", "prompt": "a"}, "b", {"id": "z", "prompt": "b"}])
    assert desk.bought == {"a": 2, "b": 2}


async def test_ids_that_come_and_go_cost_nothing(desk: Desk) -> None:
    """A line that loses its id keeps what was bought for it; another id is another picture."""
    unnamed = ["a", "b", "a"]
    named = [{"id": k, "prompt": prompt} for k, prompt in zip("xyz", unnamed, strict=True)]
    for lines in (unnamed, named, unnamed, named, unnamed):
        report = await desk.run(lines)
        assert (report.total, report.saved, desk.bought) == (3, 3, {"a": 2, "b": 1})
    await desk.run(named)
    await desk.run([*named[:2], {"id": "new", "prompt": "a"}])
    assert desk.bought == {"a": 3, "b": 1}


async def test_of_equal_lines_the_one_that_is_left_keeps_what_there_is(desk: Desk) -> None:
    """Deleting one of two does not make the failed one count, nor cost anything."""
    desk.emulator.faults.add(faults.TaskFails("service_error", nth=1))
    report = await desk.run(["q", "q"])
    assert (report.saved, report.failed) == (1, 1)
    report = await desk.run(["q"], retry_failed=True)
    assert (report.total, report.saved, desk.bought) == (1, 1, {"q": 2})
    report = await desk.run(["q", "q"])
    assert (report.saved, report.failed, desk.bought) == (1, 1, {"q": 2})


async def test_a_queued_line_that_is_gone_is_not_submitted(desk: Desk) -> None:
    """Of a batch that was stopped early, only what the new input still holds is bought."""
    await desk.run(["a", "b", "c"], max_credits=0)
    assert desk.states() == {"queued": 3}
    report = await desk.run(["b"])
    assert desk.bought == {"b": 1}
    assert (report.total, report.saved) == (1, 1)


async def test_a_limit_holds_for_many_models_of_unknown_price(
    clock: ManualClock, tmp_path: Path
) -> None:
    """While nobody knows what one costs, no other of unknown price is submitted."""
    models = tuple(f"model-{k}" for k in range(5))
    lines = [RawRequest("/v1/images/generations", body={"model": m, "prompt": m}) for m in models]
    async with Emulator(clock=clock, pictures="tiny", credits=100.0, models=models) as emulator:
        report = await Desk(emulator, tmp_path / "out").run(lines, max_credits=1)
        assert emulator.books.charged == 1
    assert stop_of(report).kind == "max_credits"


async def test_files_are_named_after_the_id_or_the_prompt(desk: Desk) -> None:
    """Names are readable, legal everywhere, and differ in more than case."""
    await desk.run(
        [
            {"id": "hero", "prompt": "a"},
            {"id": "HERO", "prompt": "b"},
            {"id": "con", "prompt": "c"},
            {"id": "../../etc/passwd", "prompt": "d"},
            {"id": 'a<b>:"|?*', "prompt": "e"},
            {"prompt": "A serene lake: at sunset?", "n": 2},
            {"prompt": "평화로운 호수"},
            {"prompt": "x" * 2000},
        ]
    )
    names = desk.pictures()
    assert len({name.lower() for name in names}) == len(names) == 9
    assert {"hero-1.png", "HERO-1.png"} & set(names)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyzHERO0123456789._-") for name in names)
    assert not any(name.split(".")[0].split("-")[0] == "con" for name in names)
    assert sum(name.startswith("a-serene-lake-at-sunset-") for name in names) == 2
    assert max(len(name) for name in names) < 130


async def test_a_file_of_somebody_else_is_not_replaced(desk: Desk) -> None:
    """Where a name is taken by a file the ledger does not know, another is used."""
    desk.out.mkdir()
    (desk.out / "hero-1.png").write_text("mine")
    report = await desk.run([{"id": "hero", "prompt": "a"}])
    assert report.saved == 1
    assert (desk.out / "hero-1.png").read_text() == "mine"


@pytest.mark.parametrize("item", [{"prompt": "a lake", "n": 2}, {"id": "h", "prompt": "b", "n": 2}])
async def test_no_picture_of_an_item_takes_the_name_of_a_file_of_somebody_else(
    desk: Desk, tmp_path: Path, item: dict[str, Any]
) -> None:
    """With an id or without, the first or a later one: all its names are looked at."""
    await Desk(desk.emulator, tmp_path / "other").run([item])
    desk.out.mkdir()
    for path in (tmp_path / "other").glob("*-2.png"):
        (desk.out / path.name).write_text("mine")
    (mine,) = desk.out.iterdir()
    report = await desk.run([item])
    assert (report.saved, len(desk.pictures())) == (1, 3)
    assert mine.read_text() == "mine"
    assert mine.name not in {file["name"] for file in desk.manifest()[0]["files"]}


async def test_where_every_name_is_taken_another_is_found(desk: Desk) -> None:
    """Even the one that only this item would have."""
    desk.out.mkdir()
    digest = hashlib.sha256(b"id:h").hexdigest()[:16]
    for name in ("h-1.png", f"h-{digest}-1.jpg"):
        (desk.out / name).write_text("mine")
    assert (await desk.run([{"id": "h", "prompt": "b"}])).saved == 1
    assert {(desk.out / name).read_text() for name in ("h-1.png", f"h-{digest}-1.jpg")} == {"mine"}


async def test_metadata_and_fields_reach_the_manifest(desk: Desk) -> None:
    """What a line holds beside the request's fields is kept; an id may be a number."""
    await desk.run([{"id": 7, "prompt": "a", "size": "1024x1024", "chapter": "one", "tags": [1]}])
    (item,) = desk.manifest()
    assert (item["id"], item["line"], item["state"]) == ("7", 1, "saved")
    assert item["request"] == {
        "model": "wan2.5-text-to-image",
        "prompt": "a",
        "size": "1024x1024",
    }
    assert item["metadata"] == {"chapter": "one", "tags": [1]}
    assert item["task_id"] == desk.emulator.books.tasks()[0].id
    assert item["credits"] == 1
    assert item["error"] is None


async def test_requests_of_all_kinds_are_taken(desk: Desk) -> None:
    """Requests made in Python and other endpoints go through a batch, too."""
    report = await desk.run(
        [
            ImageRequest("a", n=2),
            RawRequest("/v1/videos/generations", body={"model": "sora-2", "prompt": "b"}),
            {"path": "/v1/images/generations", "body": {"model": "z-image-turbo", "prompt": "c"}},
        ]
    )
    kinds = {(task.type, task.prompt, task.n) for task in desk.emulator.books.tasks()}
    assert report.saved + report.failed == 3
    assert {("image", "a", 2), ("video", "b", 1)} <= kinds


async def test_progress_is_reported_while_nothing_changes(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rate and time left of a batch that hangs do not stay what they were."""
    monkeypatch.setattr(_context, "REPORT_EVERY", 0.005)
    desk.emulator.faults.add(faults.TaskHangs(50))
    stop = asyncio.Event()
    seen: list[BatchProgress] = []

    def follow(now: BatchProgress) -> None:
        seen.append(now)
        if seen[-5:].count(now) == 5:
            stop.set()

    report = await desk.run(["a"], progress=follow, stop=stop, grace=0)
    assert report.exit_code == 130


async def test_progress_counts_every_item_all_the_time(desk: Desk) -> None:
    """Each report adds up to the total, and the last one says that all is saved."""
    seen: list[BatchProgress] = []
    await desk.run(prompts(30), progress=seen.append)
    for now in seen:
        parts = now.queued + now.running + now.completed + now.saved + now.failed + now.uncertain
        assert parts == now.total == 30
    assert seen[0].queued == 30
    assert seen[-1].saved == 30
    assert any(now.seconds_left is not None and now.seconds_left >= 0 for now in seen)
    assert seen[-1].credits == 30
