"""Batches and the disk: full, read-only, removed, shared."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from collections import namedtuple
from pathlib import Path

import pytest
from desk import Desk, prompts, stop_of

from evolink_async.batch import BatchProgress, run_batch
from evolink_async.batch._ledger import LEDGER
from evolink_async.emulator import faults
from evolink_async.errors import ConfigurationError, LedgerError


async def test_a_disk_that_is_nearly_full_stops_before_more_is_bought(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be saved is not paid for."""
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 - as in shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    report = await desk.run(prompts(3))
    assert (stop_of(report).kind, report.exit_code, report.queued) == ("disk", 3, 3)
    assert desk.emulator.books.requests() == ()


@pytest.mark.parametrize("removed", ["folder", "ledger"])
async def test_a_folder_that_is_removed_stops_the_batch_and_what_was_paid_for_is_named(
    desk: Desk, removed: str
) -> None:
    """What runs is saved, the manifest knows it, and the report names the loss of the ledger."""

    def follow(now: BatchProgress) -> None:
        if now.saved == 2 and desk.out.exists() and not gone:
            gone.append(removed)
            if removed == "folder":
                # A picture that gets its name meanwhile must not end the removal half-way.
                shutil.rmtree(desk.out, ignore_errors=True)
            else:
                for path in desk.out.glob("ledger.*"):
                    path.unlink()

    gone: list[str] = []
    report = await desk.run(prompts(60), progress=follow, settings={"max_in_flight": 4})
    assert (stop_of(report).kind, report.exit_code) == ("disk", 3)
    assert report.uncertain == 0
    assert "ledger.sqlite3 was removed while it was in use" in report.unwritten[-1]
    named = {item["task_id"] for item in desk.manifest()} - {None}
    assert named == {task.id for task in desk.emulator.books.tasks()}
    assert "manifest.jsonl, if it was written, names it all: copy it" in report.unwritten[-1]


@pytest.mark.parametrize("loss", ["removed", "replaced"])
async def test_a_ledger_that_lost_its_name_stops_the_batch_and_that_is_told(
    desk: Desk, loss: str
) -> None:
    """Even with the lock in place: whoever opens that name finds a ledger without what was paid."""
    ledger = desk.out / LEDGER

    def follow(now: BatchProgress) -> None:
        if now.saved == 2 and not (desk.out / "away").exists():
            ledger.rename(desk.out / "away")
            if loss == "replaced":
                ledger.touch()

    report = await desk.run(prompts(60), progress=follow, settings={"max_in_flight": 4})
    assert (stop_of(report).kind, report.exit_code) == ("disk", 3)
    assert f"{ledger} was {loss} while it was in use" in stop_of(report).message
    assert len(desk.bought) <= 12
    (why,) = report.unwritten
    assert f"{ledger} was {loss} while it was in use" in why
    named = {item["task_id"] for item in desk.manifest()} - {None}
    assert named == {task.id for task in desk.emulator.books.tasks()}


async def test_a_folder_removed_between_two_tries_of_a_submit_is_told(desk: Desk) -> None:
    """The first try was refused: nothing is sent again, and the report says what is gone."""
    desk.emulator.faults.add(faults.Status(503, route="submit", times=1))

    def follow(now: BatchProgress) -> None:
        if now.running == 1:
            shutil.rmtree(desk.out, ignore_errors=True)

    report = await desk.run(prompts(1), progress=follow)
    assert (stop_of(report).kind, report.exit_code, report.queued) == ("disk", 3, 1)
    assert f"{LEDGER} was removed while it was in use" in report.unwritten[-1]
    assert desk.bought == {}


@pytest.mark.parametrize("name", ["manifest.jsonl", "gallery.html"])
async def test_a_folder_removed_while_its_last_files_are_written_still_gets_them(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Without the ledger nothing else names what was paid for; the report says what is missing."""
    flush = os.fsync
    gone: list[str] = []

    def remove(number: int) -> None:
        flush(number)
        if not gone and any(desk.out.glob(f".{name}.*.part")):
            gone.append(name)
            shutil.rmtree(desk.out)

    monkeypatch.setattr(os, "fsync", remove)
    report = await desk.run(prompts(3))
    assert gone == [name]
    assert (report.gallery, report.exit_code) == (desk.out / "gallery.html", 3)
    assert (desk.out / "gallery.html").exists()
    assert f"{LEDGER} was removed while it was in use" in report.unwritten[-1]
    if name == "manifest.jsonl":
        named = {item["task_id"] for item in desk.manifest()}
        assert named == {task.id for task in desk.emulator.books.tasks()}
    else:
        assert report.manifest is None
        assert "manifest.jsonl was removed as soon as it was written" in report.unwritten[0]


async def test_an_error_of_the_progress_function_is_not_taken_for_one_of_the_disk(
    desk: Desk,
) -> None:
    """It is raised as it is, also one of the system; the next run goes on, paid once."""

    def follow(now: BatchProgress) -> None:
        if now.saved == 2:
            for path in desk.out.glob("*.png"):
                path.unlink()
            raise FileNotFoundError(errno.ENOENT, "mine")

    with pytest.raises(FileNotFoundError, match="mine"):
        await desk.run(prompts(20), progress=follow, settings={"max_in_flight": 4})
    last = await desk.run(prompts(20), resend_uncertain=True)
    assert (last.saved, last.unwritten, len(desk.pictures())) == (20, (), 20)
    assert set(desk.bought.values()) == {1}


async def test_a_disk_that_cannot_be_asked_stops_the_batch(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the system, as of a share that went away, is in the report."""

    def fail(_: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    report = await desk.run(prompts(3))
    assert (stop_of(report).kind, report.exit_code, report.queued) == ("disk", 3, 3)
    assert f"the folder {desk.out} cannot be used any more: Stale file" in stop_of(report).message


async def test_a_missing_input_makes_no_folder(desk: Desk, tmp_path: Path) -> None:
    """A slip in its name leaves nothing behind."""
    for source in ("no-such-file.txt", tmp_path, "a\0b"):
        with pytest.raises(ConfigurationError, match="cannot be read"):
            await desk.run(source)
    assert not desk.out.exists()


async def test_trying_the_folder_touches_no_other_file(desk: Desk) -> None:
    """Another batch of this process may be trying the same one."""
    desk.out.mkdir()
    probe = desk.out / f".{os.getpid()}.probe"
    probe.touch()
    await desk.run(["a"])
    assert [path.name for path in desk.out.glob(".*.probe")] == [probe.name]


async def test_a_folder_that_cannot_be_one_is_refused(desk: Desk, tmp_path: Path) -> None:
    """Before the input is read, with the name."""
    (tmp_path / "file").write_text("")
    async with desk.session() as session:
        for out in (tmp_path / "file", tmp_path / "file" / "below", "a\0b"):
            with pytest.raises(ConfigurationError, match=r"the folder .* cannot be written to"):
                await run_batch(session, ["a"], out)


async def test_a_full_disk_stops_the_batch_and_loses_nothing(desk: Desk) -> None:
    """With a folder in the way of every name nothing can be saved; the next run saves it all."""
    if not hasattr(os, "geteuid"):
        pytest.skip("no file size limits on this system")
    import resource  # noqa: PLC0415 - not everywhere

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    desk.out.mkdir()

    def follow(now: BatchProgress) -> None:
        if now.running == 3:  # pictures are larger than this; the ledger's file is so already
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))

    try:
        with pytest.raises(LedgerError):
            await desk.run(prompts(3), progress=follow)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    last = await desk.run(prompts(3), resend_uncertain=True)
    assert last.saved == 3
    assert set(desk.bought.values()) == {1}
