"""The ledger: what it remembers, who may use it, and what it does when it cannot write."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evolink_async._http.secret import Secret
from evolink_async.batch import _connection, _ledger
from evolink_async.batch._connection import LOCK, RESERVE, RESERVED
from evolink_async.batch._ledger import Counts, Entry, File, Invalid, Item, Ledger
from evolink_async.errors import LedgerError

KEY = "0123456789abcdef"


def entry(
    line: int, prompt: str = "a lake", user_id: str | None = None, pictures: int = 1
) -> Entry:
    return Entry(
        line=line,
        user_id=user_id,
        digest=f"digest of {prompt}",
        request=f'{{"prompt": "{prompt}"}}',
        metadata=None,
        model="m",
        pictures=pictures,
    )


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / _ledger.LEDGER


async def load(ledger: Ledger, *prompts: str) -> tuple[Item, ...]:
    await ledger.load([entry(k, p) for k, p in enumerate(prompts, 1)], skip_invalid=False)
    return await ledger.page()


async def item(ledger: Ledger) -> Item:
    (found,) = await ledger.page()
    return found


async def test_an_item_is_remembered_through_all_its_states(path: Path) -> None:
    """Each state with its time, its ids, its credits and its files, also by the next opening."""
    async with Ledger(path) as ledger:
        (first,) = await load(ledger, "a lake")
        assert (first.state, first.line, first.request) == ("queued", 1, {"prompt": "a lake"})
        await ledger.submitting(first.number, KEY)
        assert ((await item(ledger)).state, (await item(ledger)).idempotency_key) == (
            "submitting",
            KEY,
        )
        await ledger.submitted(first.number, key=None, task_id="task-1", reserved=2.0)
        stem = await ledger.completed(first.number, snapshot='{"x": 1}', used=1.5, stems=("a", "b"))
        await ledger.saved(first.number, [File(name="a-1.png", sha256="00", bytes=3)])
    async with Ledger(path) as ledger:
        last = await item(ledger)
    assert stem == "a"
    assert (last.state, last.task_id, last.idempotency_key) == ("saved", "task-1", KEY)
    assert (last.credits_reserved, last.credits_used, last.snapshot) == (2.0, 1.5, {"x": 1})
    assert last.files == (File(name="a-1.png", sha256="00", bytes=3),)
    assert list(last.times) == ["queued", "submitting", "submitted", "completed", "saved", "ended"]
    assert sorted(last.times.values()) == list(last.times.values())


async def test_what_was_being_submitted_by_a_process_that_is_gone_is_uncertain(path: Path) -> None:
    """It keeps its key, and is not queued."""
    async with Ledger(path) as ledger:
        (first,) = await load(ledger, "a lake")
        await ledger.submitting(first.number, KEY)
    async with Ledger(path) as ledger:
        last = await item(ledger)
    assert (last.state, last.idempotency_key, last.code) == ("uncertain", KEY, "submit_uncertain")


async def test_what_was_accepted_cannot_be_submitted_again(path: Path) -> None:
    """Asking for that is a mistake, which is stopped before it costs anything."""
    async with Ledger(path) as ledger:
        (first,) = await load(ledger, "a lake")
        await ledger.submitting(first.number, KEY)
        await ledger.submitted(first.number, key=KEY, task_id="task-1", reserved=1.0)
        with pytest.raises(AssertionError):
            await ledger.submitting(first.number, KEY)
        assert (await item(ledger)).state == "submitted"


async def test_a_change_is_on_disk_when_it_returns(path: Path) -> None:
    """Another reader sees it at once, without the ledger being closed."""
    async with Ledger(path) as ledger:
        (first,) = await load(ledger, "a lake")
        await ledger.submitting(first.number, KEY)
        reader = sqlite3.connect(path)
        assert reader.execute("SELECT state FROM items").fetchall() == [("submitting",)]
        assert reader.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        reader.close()


async def test_changes_that_wait_together_share_a_commit(path: Path) -> None:
    """Many at once take fewer commits than there are changes, and all are done."""
    async with Ledger(path) as ledger:
        items = await load(ledger, *(f"lake {k}" for k in range(60)))
        commits = [0]

        def count(connection: sqlite3.Connection) -> None:
            def trace(sql: str) -> None:
                commits[0] += sql == "COMMIT"

            connection.set_trace_callback(trace)

        await ledger._do(count)
        await asyncio.gather(*(ledger.submitting(each.number, KEY) for each in items))
        assert (await ledger.counts()).states == {"submitting": 60}
    assert commits[0] < 20


async def test_sums_are_kept_over_every_turn(path: Path) -> None:
    """Credits of failed and retried items are counted once each, prices at their highest."""
    async with Ledger(path) as ledger:
        lines = [entry(k, f"lake {k}", pictures=2) for k in range(1, 7)]
        await ledger.load(lines, skip_invalid=False)
        for each in await ledger.page():
            await ledger.submitting(each.number, f"{KEY}{each.line}")
        for line in range(1, 5):
            await ledger.submitted(line, key=None, task_id=f"task-{line}", reserved=float(line))
        await ledger.completed(2, snapshot="{}", used=1.0, stems=("a",))
        await ledger.failed(3, code="service_error", message="", retryable=True)
        await ledger.failed(4, code="results_expired", message="", used=4.0)
        await ledger.uncertain(5, key=None, message="")
        await ledger.queued(6)
        expected = Counts(
            states={"submitted": 1, "completed": 1, "failed": 2, "uncertain": 1, "queued": 1},
            pictures={"m": 2},
            spent=1.0 + 1.0 + 4.0,
            unstated={},
            prices={"m": 2.0},
            uncertain={"m": 2},
            retryable=1,
            expired=1,
        )
        assert await ledger.counts() == expected
        assert await ledger.requeue_failed() == 1
        counts = await ledger.counts()
        assert (counts.spent, counts.states["queued"]) == (6.0, 2)


async def test_a_changed_line_keeps_what_the_failed_one_has_cost(path: Path) -> None:
    """Its credits stay in the sums; its task, key and snapshot are gone with its request."""
    async with Ledger(path) as ledger:
        await ledger.load([entry(1, "a", "x")], skip_invalid=False)
        await ledger.submitting(1, KEY)
        await ledger.submitted(1, key=None, task_id="task-1", reserved=3.0)
        await ledger.completed(1, snapshot="{}", used=None, stems=("a",))
        await ledger.failed(1, code="results_expired", message="", guess=5.0)
        assert (await ledger.counts()).spent == 3.0
        await ledger.load([entry(1, "b", "x")], skip_invalid=False)
        last = await item(ledger)
        assert (await ledger.counts()).spent == 3.0
        await ledger.submitting(1, KEY)
        await ledger.submitted(1, key=None, task_id="task-2", reserved=1.0)
        assert (await ledger.counts()).spent == 4.0
    assert (last.state, last.task_id, last.idempotency_key, last.snapshot) == (
        "queued",
        None,
        None,
        None,
    )
    assert (last.credits_used, last.credits_reserved, list(last.times)) == (None, None, ["queued"])


async def test_names_differ_in_more_than_case(path: Path) -> None:
    """Of two names that a file system may take for one, the second item gets another."""
    async with Ledger(path) as ledger:
        a, b, c = await load(ledger, "a", "b", "c")
        taken = [
            await ledger.completed(each.number, snapshot="{}", used=None, stems=stems)
            for each, stems in ((a, ("Hero",)), (b, ("HERO", "hero-2")), (c, ("hero", "HERO-2")))
        ]
        again = await ledger.completed(a.number, snapshot="{}", used=None, stems=("other",))
    assert taken == ["Hero", "hero-2", "HERO-2-3"]
    assert again == "Hero"


async def test_pages_follow_the_input(path: Path) -> None:
    """Items come in the order of their lines, each once, page by page."""
    async with Ledger(path) as ledger:
        await load(ledger, *(f"lake {k}" for k in range(10)))
        await load(ledger, *(f"lake {k}" for k in reversed(range(10))))
        seen: list[int] = []
        after = (0, 0)
        while page := await ledger.page("queued", after=after, limit=3):
            seen += [each.line for each in page]
            after = (page[-1].line, page[-1].number)
    assert seen == list(range(1, 11))


async def test_a_bad_line_leaves_the_input_of_before(path: Path) -> None:
    """Unless bad ones are to be skipped, nothing of the new input is taken over."""
    async with Ledger(path) as ledger:
        await load(ledger, "a lake")
        bad: list[Entry | Invalid] = [entry(1, "new"), Invalid(2, "bad")]
        loaded = await ledger.load(bad, skip_invalid=False)
        assert (loaded.valid, loaded.invalid) == (1, 1)
        assert [each.request["prompt"] for each in await ledger.page()] == ["a lake"]
        assert await ledger.invalid() == (Invalid(2, "bad"),)
        await ledger.load(bad, skip_invalid=True)
        assert [each.request["prompt"] for each in await ledger.page()] == ["new"]


async def test_an_input_that_breaks_off_leaves_the_one_of_before(path: Path) -> None:
    """An error while the lines are read reaches the caller, and the ledger stays usable."""

    def lines() -> Iterator[Entry]:
        yield entry(1, "new")
        raise ConnectionError("gone")

    async with Ledger(path) as ledger:
        await load(ledger, "a lake")
        with pytest.raises(ConnectionError):
            await ledger.load(lines(), skip_invalid=False)
        assert [each.request["prompt"] for each in await ledger.page()] == ["a lake"]


async def test_an_input_that_is_given_up_leaves_the_folder_free(path: Path) -> None:
    """The line that never came is not waited for, and the next run may begin at once."""
    reading, never = threading.Event(), threading.Event()

    def lines() -> Iterator[Entry]:
        yield entry(1)
        reading.set()
        never.wait()
        yield entry(2)
        read_on.append(3)

    read_on: list[int] = []
    async with Ledger(path) as ledger:
        await load(ledger, "a sea")
        load_all = asyncio.create_task(ledger.load(lines(), skip_invalid=False))
        await asyncio.to_thread(reading.wait)
        load_all.cancel()
        with pytest.raises(asyncio.CancelledError):
            await load_all
    async with Ledger(path) as ledger:
        assert (await item(ledger)).request["prompt"] == "a sea"
    (reader,) = (each for each in threading.enumerate() if each.name == "evolink-input")
    never.set()
    await asyncio.to_thread(reader.join)
    assert read_on == []


async def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(path: Path) -> None:
    """The lock lasts as long as the process, however that ends."""
    holder = (
        "import asyncio, sys, pathlib\n"
        "from evolink_async.batch._ledger import Ledger\n"
        "async def main():\n"
        "    async with Ledger(pathlib.Path(sys.argv[1])):\n"
        "        print('open', flush=True)\n"
        "        await asyncio.sleep(100)\n"
        "asyncio.run(main())\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", holder, str(path), stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"open\n"
    try:
        with pytest.raises(LedgerError, match="in use by another process") as caught:
            await Ledger(path).__aenter__()
        assert caught.value.path == path
    finally:
        process.kill()
        await process.wait()
    async with Ledger(path) as ledger:
        assert await ledger.page() == ()


@pytest.mark.parametrize("opened_before", [False, True])
@pytest.mark.parametrize("replaced", [False, True])
@pytest.mark.parametrize("name", [LOCK, _ledger.LEDGER, f"{_ledger.LEDGER}-wal"])
async def test_a_file_of_it_that_was_removed_lets_nothing_be_submitted(
    path: Path, name: str, *, replaced: bool, opened_before: bool
) -> None:
    """Another process may have the folder, or would find less than was recorded: no submit."""
    if opened_before:
        async with Ledger(path):
            pass
    async with Ledger(path) as ledger:
        (first,) = await load(ledger, "a lake")
        assert await ledger.loss() is None
        path.with_name(name).rename(path.with_name("away"))
        if replaced:
            path.with_name(name).touch()
        with pytest.raises(LedgerError, match=f"{name} was .*(removed|replaced) while it"):
            await ledger.submitting(first.number, KEY)
        assert (await item(ledger)).state == "queued"
        lost = "replaced" if replaced else "removed"
        assert await ledger.loss() == (lost if name == _ledger.LEDGER else None)


async def test_a_submit_that_is_refused_takes_no_other_change_with_it(path: Path) -> None:
    """Where the lock is gone nothing is submitted, and what was paid for is still recorded."""
    async with Ledger(path) as ledger:
        first, second = await load(ledger, "a lake", "a sea")
        await ledger.submitting(first.number, KEY)
        path.with_name(LOCK).unlink()
        outcomes = await asyncio.gather(
            ledger.submitting(second.number, KEY),
            ledger.submitted(first.number, key=None, task_id="task-1", reserved=None),
            return_exceptions=True,
        )
        assert [type(each) for each in outcomes] == [LedgerError, type(None)]
        assert [each.state for each in await ledger.page()] == ["submitted", "queued"]


async def test_a_log_that_was_removed_takes_nothing_with_it(path: Path) -> None:
    """What was recorded before and after is in the ledger once that is closed."""
    async with Ledger(path) as ledger:
        first, second = await load(ledger, "a lake", "a sea")
        await ledger.submitting(first.number, KEY)
        path.with_name(f"{_ledger.LEDGER}-wal").unlink()
        await ledger.submitted(first.number, key=None, task_id="task-1", reserved=None)
    async with Ledger(path) as ledger:
        states = {each.number: each.state for each in await ledger.page()}
        assert states == {first.number: "submitted", second.number: "queued"}


@pytest.mark.parametrize(("version", "advice"), [(99, "upgrade"), (1, "another folder")])
async def test_another_format_is_refused(path: Path, version: int, advice: str) -> None:
    """With the advice to upgrade, or to leave the folder alone; the file stays as it is."""
    async with Ledger(path):
        pass
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {version}")
    connection.close()
    with pytest.raises(LedgerError, match=rf"format {version}.*{advice}"):
        await Ledger(path).__aenter__()


async def test_it_belongs_to_one_api_and_one_key(path: Path) -> None:
    """Once something was bought, another base URL or key is refused; the key is not kept."""
    one, two = "https://one.example", "https://two.example"
    async with Ledger(path) as ledger:
        await ledger.claim(two, Secret("sk-other").fingerprint)
        (first,) = await load(ledger, "a lake")
        await ledger.claim(one, Secret("sk-first-key").fingerprint)
        await ledger.submitted(first.number, key=KEY, task_id="task-1", reserved=1.0)
        await ledger.claim(one, Secret("sk-first-key").fingerprint)
        with pytest.raises(LedgerError, match=f"{one}.*{two}.*EVOLINK_BASE_URL back to {one}"):
            await ledger.claim(two, Secret("sk-first-key").fingerprint)
        with pytest.raises(LedgerError, match=f"{one}.*emulator.*choose another folder"):
            await ledger.claim(_ledger.EMULATOR, None)
        with pytest.raises(LedgerError, match="another account's key") as caught:
            await ledger.claim(one, Secret("sk-second-key").fingerprint)
        assert "sk-" not in str(caught.value)
        await ledger.claim(one, Secret("sk-second-key").fingerprint, replace_key=True)
        await ledger.claim(one, Secret("sk-second-key").fingerprint)
    assert not any(b"sk-second" in each.read_bytes() for each in path.parent.iterdir())


async def test_a_folder_of_an_emulator_is_not_for_the_real_api(path: Path) -> None:
    """Nor for its key; the next emulator may go on with it."""
    async with Ledger(path) as ledger:
        await ledger.claim(_ledger.EMULATOR, None)
        (first,) = await load(ledger, "a lake")
        await ledger.submitted(first.number, key=KEY, task_id="task-1", reserved=1.0)
        await ledger.claim(_ledger.EMULATOR, None)
        with pytest.raises(LedgerError, match=r"belongs to emulator.*run it with --emulator again"):
            await ledger.claim("https://one.example", Secret("sk-first-key").fingerprint)


def text_file(path: Path) -> None:
    path.write_text("not a database, but long enough to be one. " * 9)


def database(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.execute("CREATE TABLE mine (x)")
    connection.close()


@pytest.mark.parametrize("make", [text_file, database])
def test_another_file_under_its_name_is_refused(path: Path, make: Callable[[Path], None]) -> None:
    """Neither a text nor somebody else's database is written to."""

    async def enter() -> None:
        with pytest.raises(LedgerError, match="not a ledger"):
            await Ledger(path).__aenter__()

    make(path)
    before = path.read_bytes()
    asyncio.run(enter())
    assert path.read_bytes() == before


async def test_a_full_disk_is_an_error_and_nothing_is_half_done(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A change that finds no room says what to do; with room the ledger goes on."""
    monkeypatch.setattr(_connection, "FULL_DISK_PAUSES", (0.0, 0.01))
    async with Ledger(path) as ledger:
        (first,) = await load(ledger, "a lake")

        def limit(connection: sqlite3.Connection, pages: int = 1) -> None:
            connection.execute(f"PRAGMA max_page_count = {pages}")

        await ledger._do(limit)
        with pytest.raises(LedgerError, match="full; make room"):
            await ledger.completed(
                first.number, snapshot='"' + "x" * 50_000 + '"', used=1, stems=("a",)
            )
        assert (await item(ledger)).state == "queued"
        await ledger._do(lambda connection: limit(connection, 1 << 20))
        await ledger.submitting(first.number, KEY)
        assert (await item(ledger)).state == "submitting"


async def test_room_is_kept_for_recording_what_was_paid_for(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While it is open a file holds the room, which a full disk is given back once."""
    monkeypatch.setattr(_connection, "FULL_DISK_PAUSES", (0.0, 0.01))
    reserve = path.with_name(RESERVE)
    async with Ledger(path) as ledger:
        (first,) = await load(ledger, "a lake")
        assert reserve.stat().st_size == RESERVED

        def limit(connection: sqlite3.Connection) -> None:
            connection.execute("PRAGMA max_page_count = 1")

        await ledger._do(limit)
        with pytest.raises(LedgerError):
            await ledger.completed(
                first.number, snapshot='"' + "x" * 50_000 + '"', used=1, stems=("a",)
            )
        assert not reserve.exists()
    async with Ledger(path):
        assert reserve.exists()
    assert not reserve.exists()


async def test_a_file_of_somebody_else_is_not_taken_for_the_room(path: Path) -> None:
    """It stays as it is, whatever its name."""
    reserve = path.with_name(RESERVE)
    reserve.write_text("mine")
    async with Ledger(path) as ledger:
        await load(ledger, "a lake")
    assert reserve.read_text() == "mine"


async def test_a_cancelled_change_is_still_made_in_its_turn(path: Path) -> None:
    """What was asked for first happens first, also if nobody waits for it any more."""
    async with Ledger(path) as ledger:
        (first,) = await load(ledger, "a lake")
        change = asyncio.ensure_future(ledger.submitting(first.number, KEY))
        await asyncio.sleep(0)
        change.cancel()
        await ledger.queued(first.number)
        last = await item(ledger)
    assert (last.state, last.idempotency_key) == ("queued", None)


async def test_memory_does_not_grow_with_the_input(path: Path) -> None:
    """Thirty times the lines take no more memory than a third of what keeping them would."""
    import tracemalloc  # noqa: PLC0415 - once

    async def peak(count: int) -> int:
        tracemalloc.start()
        lines = (entry(k, f"{k} " + "x" * 1000) for k in range(1, count + 1))
        async with Ledger(path.with_name(f"{count}.sqlite3")) as ledger:
            await ledger.load(lines, skip_invalid=False)
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    assert await peak(12_000) < 12_000 * 1000 / 3
