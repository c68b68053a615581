"""How a batch saves results, and finds them again."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from aiohttp import web
from desk import DAY, Desk, not_found, prompts

from evolink_async import PollPolicy
from evolink_async.batch._ledger import LEDGER
from evolink_async.emulator import faults
from evolink_async.emulator._exchange import Exchange
from evolink_async.errors import ConfigurationError


async def test_what_could_not_be_downloaded_is_downloaded_by_the_next_run(desk: Desk) -> None:
    """A completed item waits for its files; nothing is bought again."""
    desk.emulator.faults.add(faults.NotAPicture("text/html", route="result"))
    first = await desk.run(prompts(3))
    assert (first.completed, first.saved, first.exit_code) == (3, 0, 1)
    assert desk.pictures() == []
    desk.emulator.faults.clear()
    assert (await desk.run(prompts(3))).saved == 3
    assert desk.emulator.books.accepted == 3


async def test_expired_links_are_said_plainly_and_resubmitted_when_asked(
    desk: Desk,
) -> None:
    """After a day the results are gone; only with consent they are paid for again."""
    desk.emulator.faults.add(faults.NotAPicture("text/html", route="result"))
    await desk.run(prompts(2))
    desk.emulator.faults.clear()
    desk.wait(DAY + 60)
    report = await desk.run(prompts(2))
    assert (report.failed, report.expired) == (2, 2)
    assert "expired" in (report.problems[0].message or "")
    assert (await desk.run(prompts(2))).failed == 2
    assert (await desk.run(prompts(2), resubmit_expired=True)).saved == 2
    assert set(desk.bought.values()) == {2}
    assert (await desk.run(prompts(2))).credits == desk.emulator.books.charged == 4


async def test_a_missing_file_is_downloaded_again(desk: Desk) -> None:
    """One that was deleted comes back under its name; nothing is bought."""
    await desk.run(prompts(3))
    name = desk.pictures()[1]
    content = (desk.out / name).read_bytes()
    (desk.out / name).unlink()
    report = await desk.run(prompts(3))
    assert (report.saved, report.pictures) == (3, 1)
    assert (desk.out / name).read_bytes() == content
    assert desk.emulator.books.accepted == 3


async def test_a_changed_file_is_kept_aside_and_downloaded_again(desk: Desk) -> None:
    """Somebody's work on a picture is not overwritten."""
    await desk.run(["a"])
    (name,) = desk.pictures()
    (desk.out / name).write_bytes(b"retouched")
    await desk.run(["a"])
    kept = [path for path in desk.out.glob("*.png") if path.name != name]
    assert [path.read_bytes() for path in kept] == [b"retouched"]
    assert ".changed-" in kept[0].name
    assert (desk.out / name).read_bytes() != b"retouched"


async def test_files_whose_record_was_lost_are_recognised_when_their_links_have_expired(
    desk: Desk,
) -> None:
    """A crash between the last rename and its record costs nothing, however late the next run."""
    await desk.run([{"prompt": "a", "n": 2}])
    desk.change("UPDATE items SET state = 'completed', saved_at = NULL")
    desk.change("DELETE FROM files")
    desk.wait(DAY + 60)
    report = await desk.run([{"prompt": "a", "n": 2}])
    assert (report.saved, report.pictures) == (1, 2)


@pytest.mark.parametrize("damage", ["other name", "no picture", "cut off", "not as recorded"])
async def test_only_an_items_own_whole_pictures_are_taken_for_its_files(
    desk: Desk, damage: str
) -> None:
    """What merely lies under a name like theirs leaves the item expired."""
    await desk.run(["a"])
    (name,) = desk.pictures()
    path = desk.out / name
    content = path.read_bytes()
    if damage == "other name":
        path.rename(path.with_suffix(".changed-01234567.png"))
    elif damage == "no picture":
        path.write_text("notes on a lake")
    elif damage == "cut off":
        path.write_bytes(content[:-12])
    else:
        path.write_bytes(content[:-30] + bytes(10) + content[-20:])
    desk.change("UPDATE items SET state = 'completed', saved_at = NULL")
    if damage != "not as recorded":
        desk.change("DELETE FROM files")
    desk.wait(DAY + 60)
    report = await desk.run(["a"])
    assert (report.saved, report.expired) == (0, 1)


async def test_links_that_have_changed_since_are_used(desk: Desk) -> None:
    """Where the links in the ledger lead nowhere any more, the task is asked for its new ones."""
    desk.emulator.faults.add(faults.NotAPicture("text/html", route="result"))
    await desk.run(["a"])
    desk.emulator.faults.clear()
    desk.change("UPDATE items SET snapshot = replace(snapshot, '/results/', '/results/0')")
    report = await desk.run(["a"])
    assert (report.saved, desk.emulator.books.accepted) == (1, 1)


class DeadLinks(faults.RequestFault):
    """Answers whose result links lead to a host that nobody reaches."""

    async def after(self, _exchange: Exchange, response: web.Response) -> web.StreamResponse:
        assert isinstance(response.body, bytes)
        answer = json.loads(response.body)
        for task in answer.get("data", [answer]):
            if task.get("results"):
                task["results"] = ["http://127.0.0.1:9/gone.png"]
        return web.json_response(answer)


async def test_a_fresh_link_that_is_not_found_is_tried_again(desk: Desk) -> None:
    """A host that does not have the file yet has it a moment later."""
    desk.emulator.faults.add(not_found(times=1))
    report = await desk.run(["a"])
    assert (report.saved, report.exit_code) == (1, 0)


@pytest.mark.parametrize("status", [403, 404, 410])
async def test_a_link_that_is_not_found_before_its_time_does_not_expire(
    desk: Desk, status: int
) -> None:
    """It stays to be downloaded, with the reason, and nothing is bought, asked for or not."""
    desk.emulator.faults.add(not_found(status))
    assert (await desk.run(["a"])).completed == 1
    report = await desk.run(["a"], resubmit_expired=True)
    assert (report.completed, report.failed, report.exit_code) == (1, 0, 1)
    (problem,) = report.problems
    assert (problem.state, problem.code) == ("completed", "download_failed")
    assert f"the host answered {status}" in (problem.message or "")
    desk.emulator.faults.clear()
    assert (await desk.run(["a"])).saved == 1
    assert desk.manifest()[0]["error"] is None
    assert desk.bought == {"a": 1}


async def test_a_file_that_was_put_back_is_taken_as_it_is(desk: Desk) -> None:
    """Missed while its link did not answer, it is recognised by its check sum, however late."""
    await desk.run(["a"])
    (name,) = desk.pictures()
    (desk.out / name).rename(desk.out / "elsewhere")
    desk.emulator.faults.add(not_found())
    assert (await desk.run(["a"])).completed == 1
    desk.wait(DAY + 60)
    shutil.copy(desk.out / "elsewhere", desk.out / name)
    assert (await desk.run(["a"])).saved == 1
    assert desk.pictures() == [name]


@pytest.mark.parametrize("found", ["file", "link", "fresh link", "unread", None])
async def test_what_expired_is_looked_for_once_more_before_it_is_paid_for_again(
    desk: Desk, found: str | None
) -> None:
    """On disk, behind its link and behind the links the API gives now, if it can say."""
    await desk.run(["a"])
    (name,) = desk.pictures()
    (desk.out / name).rename(desk.out / "elsewhere")
    desk.emulator.faults.add(not_found(403))
    desk.change("UPDATE items SET completed_at = completed_at - ?", DAY + 60)
    assert (await desk.run(["a"])).expired == 1
    assert (await desk.run(["a"])).expired == 1
    if found == "file":
        (desk.out / "elsewhere").rename(desk.out / name)
    elif found == "link":
        desk.emulator.faults.clear()
        desk.emulator.faults.add(faults.Status(500, route=("read", "batch")))
    elif found == "fresh link":
        desk.emulator.faults.clear()
        desk.change("UPDATE items SET snapshot = replace(snapshot, '/results/', '/results/0')")
    elif found == "unread":
        desk.emulator.faults.add(faults.Status(500, route=("read", "batch"), times=20))
        report = await desk.run(["a"], resubmit_expired=True)
        assert (report.completed, report.failed) == (1, 0)
    if found in {"unread", None}:
        desk.emulator.faults.clear()
        desk.emulator.faults.add(not_found(403, times=1))
    report = await desk.run(["a"], resubmit_expired=True)
    assert (report.saved, report.expired) == (1, 0)
    assert desk.bought == {"a": 2 if found in {"unread", None} else 1}


async def test_links_that_are_dead_and_a_task_that_nobody_knows_are_lost_at_once(
    desk: Desk,
) -> None:
    """However young they are; found again by any later run should they come back."""
    desk.emulator.faults.add(not_found(times=20))
    assert (await desk.run(["a"])).completed == 1
    desk.emulator.faults.clear()
    desk.emulator.faults.add(not_found(404))
    desk.emulator.faults.add(faults.Status(404, route=("read", "batch")))
    assert (await desk.run(["a"])).expired == 1
    desk.emulator.faults.clear()
    report = await desk.run(["a"])
    assert (report.saved, desk.bought) == (1, {"a": 1})


@pytest.mark.parametrize("stop", ["limit", "empty account"])
async def test_what_is_not_bought_anew_after_all_keeps_what_it_has(desk: Desk, stop: str) -> None:
    """Until another submit may have left, its task, credits and good pictures are on record."""
    lines = [{"id": "x", "prompt": "a", "n": 4}]
    await desk.run(lines)
    (desk.out / "x-2.png").unlink()
    desk.emulator.faults.add(not_found(403))
    desk.change("UPDATE items SET completed_at = completed_at - ?", DAY + 60)
    await desk.run(lines)
    if stop == "empty account":
        desk.emulator.faults.add(faults.Status(402, route="submit"))
        await desk.run(lines, resubmit_expired=True)
    else:
        await desk.run(lines, resubmit_expired=True, max_credits=4)
    (item,) = desk.manifest()
    assert (item["state"], item["credits"]) == ("failed", 4)
    assert desk.rows("SELECT code, task_id IS NULL FROM items") == [("results_expired", 0)]
    assert [file["name"] for file in item["files"]] == ["x-1.png", "x-3.png", "x-4.png"]
    desk.emulator.faults.clear()
    report = await desk.run(lines)
    assert (report.saved, report.credits, desk.bought) == (1, 4, {"a": 1})
    assert desk.emulator.books.charged == 4


async def test_what_is_bought_anew_is_all_new(desk: Desk) -> None:
    """Its age and its files are those of the new purchase; what was paid before still counts."""
    lines = [{"id": "x", "prompt": "a", "n": 2}]
    await desk.run(lines)
    (desk.out / "x-2.png").unlink()
    desk.emulator.faults.add(not_found(403))
    desk.change("UPDATE items SET completed_at = completed_at - ?", DAY + 60)
    assert (await desk.run(lines)).expired == 1
    report = await desk.run(lines, resubmit_expired=True)
    assert (report.completed, report.credits, desk.bought) == (1, 4, {"a": 2})
    desk.emulator.faults.clear()
    report = await desk.run(lines)
    assert (report.saved, report.credits, desk.bought) == (1, 4, {"a": 2})
    assert len(desk.manifest()[0]["files"]) == 2


async def test_what_expired_and_left_the_input_is_not_paid_for_again(desk: Desk) -> None:
    """Nobody asks for it any more, also if it left while it was looked for."""
    desk.emulator.faults.add(not_found(times=6))
    await desk.run(prompts(3))
    desk.wait(DAY + 60)
    assert (await desk.run(prompts(3))).expired == 3
    desk.emulator.faults.add(faults.Status(500, route=("read", "batch")))
    assert (await desk.run(prompts(2), resubmit_expired=True)).completed == 2
    desk.emulator.faults.clear()
    await desk.run(["lake 1"], resubmit_expired=True)
    assert desk.bought == {"lake 0": 1, "lake 1": 2, "lake 2": 1}


async def test_a_host_that_is_not_reached_is_looked_for_elsewhere_and_in_the_end_given_up(
    desk: Desk,
) -> None:
    """The next run takes the links the API gives then; after a day it says that they expired."""
    desk.emulator.faults.add(DeadLinks(route=("read", "batch")))
    first = await desk.run(["a"])
    assert (first.completed, first.problems[0].code) == (1, "download_failed")
    desk.emulator.faults.clear()
    assert (await desk.run(["a"])).saved == 1
    desk.emulator.faults.add(DeadLinks(route=("read", "batch")))
    await desk.run(["a", "b"])
    desk.wait(DAY + 60)
    report = await desk.run(["a", "b"])
    assert (report.saved, report.expired, report.problems[0].code) == (1, 1, "results_expired")
    assert "expired (they live 24 hours; http://127.0.0.1:9/" in (report.problems[0].message or "")
    desk.emulator.faults.clear()
    assert (await desk.run(["a", "b"], resubmit_expired=True)).saved == 2
    assert desk.bought == {"a": 1, "b": 2}


async def test_a_task_that_ended_long_ago_has_links_that_expired(desk: Desk) -> None:
    """It was never seen to complete; what counts is when it did, not when that was seen."""
    desk.emulator.faults.add(faults.TaskHangs(50, times=1))
    await desk.run(["a"], settings={"poll": PollPolicy(deadline=60)})
    desk.emulator.complete(desk.emulator.books.tasks()[0].id)
    desk.wait(DAY + 600)
    assert (await desk.run(["a"])).expired == 1


async def test_a_file_that_came_between_two_runs_is_kept(desk: Desk) -> None:
    """Under the name of a completed item: moved, reported, and not taken for its own."""
    desk.emulator.faults.add(faults.NotAPicture())
    await desk.run([{"id": "hero", "prompt": "a"}])
    desk.emulator.faults.clear()
    mine = desk.out / "hero-1.png"
    mine.mkdir()
    report = await desk.run([{"id": "hero", "prompt": "a"}])
    assert (report.completed, report.kept, mine.is_dir()) == (1, (), True)
    mine.rmdir()
    mine.write_bytes(b"mine")
    report = await desk.run([{"id": "hero", "prompt": "a"}])
    (kept,) = report.kept
    assert (report.saved, kept.read_bytes(), kept.parent) == (1, b"mine", desk.out)
    assert kept.name.startswith("hero-1.changed-")
    assert mine.read_bytes().startswith(b"\x89PNG")
    for again in (b"mine", b"other"):
        mine.write_bytes(again)
        await desk.run([{"id": "hero", "prompt": "a"}])
    found = Counter(path.read_bytes() for path in desk.out.glob("*.changed-*"))
    assert found == {b"mine": 2, b"other": 1}


async def test_a_picture_that_lost_its_record_is_not_kept_twice(desk: Desk) -> None:
    """What a crash left between name and record is what arrives again."""
    await desk.run(["a"])
    desk.change("UPDATE items SET state = 'completed', saved_at = NULL")
    desk.change("DELETE FROM files")
    report = await desk.run(["a"])
    assert (report.saved, report.kept, len(desk.pictures())) == (1, (), 1)


@pytest.mark.parametrize("later", ["complete", "changed line", "bought again"])
async def test_a_part_of_the_pictures_is_listed_and_kept(desk: Desk, later: str) -> None:
    """What arrived of four is in the manifest, is not fetched again, and never written over."""
    line = {"id": "hero", "prompt": "a", "n": 4}
    desk.emulator.faults.add(not_found(nth=3), not_found(nth=5))
    assert (await desk.run([line])).completed == 1
    (item,) = desk.manifest()
    part = {file["name"]: (desk.out / file["name"]).read_bytes() for file in item["files"]}
    assert sorted(part) == desk.pictures()
    assert len(part) == 3
    if later == "complete":
        desk.emulator.faults.clear()
        requests = len(desk.emulator.books.requests())
        report = await desk.run([line])
        assert len(desk.emulator.books.requests()) == requests + 1
    else:
        desk.wait(DAY + 60)
        assert (await desk.run([line])).expired == 1
        assert len(desk.manifest()[0]["files"]) == 3
        (desk.out / min(part)).unlink()
        part.pop(min(part))
        assert (await desk.run([line])).expired == 1
        assert {file["name"] for file in desk.manifest()[0]["files"]} == set(part)
        line = {**line, "prompt": "b"} if later == "changed line" else line
        report = await desk.run([line], resubmit_expired=True)
    assert report.saved == 1
    assert {name: (desk.out / name).read_bytes() for name in part} == part
    named = {file["name"] for file in desk.manifest()[0]["files"]}
    assert len(named) == 4
    assert (set(part) <= named) == (later == "complete")


async def test_a_clock_that_was_set_back_does_not_hide_a_missing_file(desk: Desk) -> None:
    """What an earlier run saved is looked at, whatever time it says that was."""
    await desk.run(["a"])
    desk.change("UPDATE items SET saved_at = saved_at + 1e6")
    (name,) = desk.pictures()
    (desk.out / name).unlink()
    assert (await desk.run(["a"])).saved == 1
    assert desk.pictures() == [name]


async def test_a_retouched_picture_is_left_alone_where_it_cannot_be_downloaded_again(
    desk: Desk,
) -> None:
    """It keeps its name, and why its item failed is said with it."""
    await desk.run(["a"])
    (name,) = desk.pictures()
    (desk.out / name).write_bytes(b"retouched")
    desk.wait(DAY + 60)
    report = await desk.run(["a"])
    assert (report.expired, report.kept, desk.pictures()) == (1, (), [name])
    assert (desk.out / name).read_bytes() == b"retouched"
    assert (report.problems[0].message or "").startswith(f"{name} has changed, and the links")


@pytest.mark.parametrize("name", ["manifest.jsonl", "gallery.html"])
@pytest.mark.parametrize("kind", ["file", "dead link"])
async def test_what_has_the_name_of_an_output_is_replaced(desk: Desk, name: str, kind: str) -> None:
    """Manifest and gallery are generated: an edited one, or a stranger, makes way for the new."""
    path = desk.out / name
    desk.out.mkdir()
    if kind == "file":
        path.write_text("mine")
    else:
        path.symlink_to("nowhere")
    report = await desk.run(["a"])
    assert (report.saved, report.exit_code, report.unwritten) == (1, 0, ())
    written = path.read_text("utf-8")
    assert "mine" not in written
    assert desk.bought.keys() == {"a"}
    path.write_text(written + "a note")
    assert (await desk.run(["a", "b"])).exit_code == 0
    assert len(desk.manifest()) == 2
    assert "a note" not in path.read_text("utf-8")
    assert {each.name for each in desk.out.iterdir()} == {
        "gallery.html",
        "ledger.lock",
        LEDGER,
        "manifest.jsonl",
        *desk.pictures(),
    }


@pytest.mark.parametrize("name", ["manifest.jsonl", "gallery.html"])
async def test_a_folder_in_the_way_of_an_output_stays_and_is_named(desk: Desk, name: str) -> None:
    """The pictures are saved, the report has no such file and says why, the exit code is not 0."""
    path = desk.out / name
    path.mkdir(parents=True)
    report = await desk.run(["a"])
    assert (report.saved, report.exit_code) == (1, 3)
    assert (report.manifest is None, report.gallery is None) == (
        name == "manifest.jsonl",
        name == "gallery.html",
    )
    (why,) = report.unwritten
    assert why.startswith(f"{path} cannot be written: Is a directory; see to that")
    assert path.is_dir()
    assert not list(desk.out.glob(".*.part"))
    path.rmdir()
    assert (await desk.run(["a"])).exit_code == 0
    assert desk.bought == {"a": 1}


async def test_a_gallery_that_is_not_wanted_is_left_alone(desk: Desk) -> None:
    """The batch writes only what was asked for."""
    desk.out.mkdir()
    (desk.out / "gallery.html").write_text("mine")
    report = await desk.run(["a"], gallery=False)
    assert (report.saved, report.exit_code, report.gallery) == (1, 0, None)
    assert (desk.out / "gallery.html").read_text() == "mine"


async def test_an_output_without_room_is_told_and_the_old_one_stays(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the flush fails, as on a full disk, no half of a file gets the name."""
    await desk.run(["a"])
    before = (desk.out / "manifest.jsonl").read_bytes()
    fsync = os.fsync

    def full(descriptor: int) -> None:
        drafts = desk.out.glob(".manifest.jsonl.*.part")
        if any(os.path.samestat(draft.stat(), os.fstat(descriptor)) for draft in drafts):
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        report = await desk.run(["a", "b"])
    assert (report.saved, report.exit_code, report.manifest) == (2, 3, None)
    assert "No space left" in report.unwritten[0]
    assert (desk.out / "manifest.jsonl").read_bytes() == before
    assert not list(desk.out.glob(".*.part"))
    report = await desk.run(["a", "b"])
    assert (report.exit_code, len(desk.manifest())) == (0, 2)


@pytest.mark.parametrize("name", ["manifest.jsonl", "gallery.html"])
@pytest.mark.parametrize("by", ["its path", "a link"])
async def test_the_input_is_not_written_over(
    desk: Desk, tmp_path: Path, name: str, by: str
) -> None:
    """An input under the name of an output is refused before anything is asked for."""
    desk.out.mkdir()
    path = source = desk.out / name
    path.write_text('"a lake"\n')
    if by == "a link":
        source = tmp_path / "prompts.jsonl"
        source.symlink_to(path)
    with pytest.raises(ConfigurationError, match=f"the input .*{name} would be overwritten"):
        await desk.run(source)
    assert path.read_text() == '"a lake"\n'
    assert desk.emulator.books.requests() == ()


async def test_what_a_killed_download_has_left_is_removed(desk: Desk) -> None:
    """Files that never got their name go; others with similar names stay."""
    desk.out.mkdir()
    (desk.out / ".lake-1.0123456789abcdef.part").touch()
    (desk.out / ".mine.part").touch()
    await desk.run(["a"])
    assert [path.name for path in desk.out.glob(".*.part")] == [".mine.part"]
