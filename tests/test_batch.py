"""A batch: what is bought, what is kept, and what is said, whatever happens in between."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import io
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter, namedtuple
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from attrs import define

from evolink_async import (
    ImageRequest,
    PollPolicy,
    RawRequest,
    RetryPolicy,
    Session,
    _batch_cli,
    _batch_run,
)
from evolink_async.__main__ import main
from evolink_async._ledger import LEDGER
from evolink_async.batch import BatchProgress, BatchReport, Invalid, run_batch
from evolink_async.emulator import Emulator, ManualClock, RealClock, faults
from evolink_async.emulator._exchange import Exchange
from evolink_async.errors import (
    ConfigurationError,
    LedgerError,
    RequestValidationError,
)

RETRY = RetryPolicy(attempts=2, wait_initial=0.01, wait_jitter=0)
DAY = 24 * 3600.0


@define
class Desk:
    """An emulated API, and a folder to run batches in."""

    emulator: Emulator
    out: Path

    @asynccontextmanager
    async def session(self, **settings: Any) -> AsyncIterator[Session]:
        settings = {"retry": RETRY, "clock": self.emulator.clock, **settings}
        async with Session(
            self.emulator.api_key, base_url=self.emulator.base_url, **settings
        ) as session:
            yield session

    async def run(
        self, source: Any, *, settings: dict[str, Any] | None = None, **options: Any
    ) -> BatchReport:
        async with self.session(**(settings or {})) as session:
            return await run_batch(session, source, self.out, **options)

    def rows(self, sql: str) -> list[tuple[Any, ...]]:
        """What the ledger on disk says."""
        connection = sqlite3.connect(self.out / LEDGER)
        try:
            return connection.execute(sql).fetchall()
        finally:
            connection.close()

    def change(self, sql: str, *values: object) -> None:
        """Have the ledger on disk say something else."""
        connection = sqlite3.connect(self.out / LEDGER)
        with connection:
            connection.execute(sql, values)
        connection.close()

    def wait(self, seconds: float) -> None:
        """Let time pass, the API's and that of this machine, between two runs."""
        assert isinstance(self.emulator.clock, ManualClock)
        self.emulator.clock.advance(seconds)
        self.change(
            "UPDATE items SET submitted_at = submitted_at - ?1, completed_at = completed_at - ?1",
            seconds,
        )

    def states(self) -> dict[str, int]:
        return Counter(state for (state,) in self.rows("SELECT state FROM items WHERE wanted = 1"))

    def manifest(self) -> list[dict[str, Any]]:
        lines = (self.out / "manifest.jsonl").read_text("utf-8").splitlines()
        return [json.loads(line) for line in lines]

    def pictures(self) -> list[str]:
        return sorted(path.name for path in self.out.glob("*.png"))

    @property
    def bought(self) -> Counter[str]:
        return Counter(task.prompt for task in self.emulator.books.tasks())


@pytest.fixture
def desk(emulator: Emulator, tmp_path: Path) -> Desk:
    return Desk(emulator, tmp_path / "out")


async def until(condition: Callable[[], bool]) -> None:
    """Return once *condition* holds."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event
        await asyncio.sleep(0.005)


def prompts(count: int, word: str = "lake") -> list[str]:
    return [f"{word} {k}" for k in range(count)]


# ---------------------------------------------------------------------------------------------
# Without trouble


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
    plain = ["a", "b", "a"]
    named = [{"id": k, "prompt": prompt} for k, prompt in zip("xyz", plain, strict=True)]
    for lines in (plain, named, plain, named, plain):
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
    assert report.stop is not None
    assert report.stop.kind == "max_credits"


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


async def test_progress_is_told_while_nothing_changes(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rate and time left of a batch that hangs do not stay what they were."""
    monkeypatch.setattr(_batch_run, "_TELL_EVERY", 0.005)
    desk.emulator.faults.add(faults.TaskHangs(50))
    stop = asyncio.Event()
    seen: list[BatchProgress] = []

    def look(now: BatchProgress) -> None:
        seen.append(now)
        if seen[-5:].count(now) == 5:
            stop.set()

    report = await desk.run(["a"], progress=look, stop=stop, grace=0)
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


# ---------------------------------------------------------------------------------------------
# Input


async def test_a_file_of_json_lines(desk: Desk, tmp_path: Path) -> None:
    """Strings and objects, one a line; blank lines and a byte order mark do not matter."""
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(b'\xef\xbb\xbf"a lake"\r\n\r\n{"prompt": "a \\u00e9tang", "n": 2}\n')
    report = await desk.run(source)
    assert report.saved == 2
    assert {(t.prompt, t.n) for t in desk.emulator.books.tasks()} == {("a lake", 1), ("a étang", 2)}


async def test_a_text_file(desk: Desk, tmp_path: Path) -> None:
    """One prompt a line, the last without its end."""
    source = tmp_path / "prompts.txt"
    source.write_text("  a lake \n\n[not json]\n평화로운 호수", "utf-8")
    await desk.run(str(source))
    assert set(desk.bought) == {"a lake", "[not json]", "평화로운 호수"}


@pytest.mark.parametrize("name", ["prompts.json", "prompts.txt"])
@pytest.mark.parametrize("indent", [None, 2])
async def test_an_array_is_not_taken_for_prompts(
    desk: Desk, tmp_path: Path, name: str, indent: int | None
) -> None:
    """Whoever saves JSON instead of JSON Lines does not pay for pictures of its brackets."""
    source = tmp_path / name
    contents = [json.dumps([{"prompt": "a"}, {"prompt": "b"}], indent=indent)]
    contents += ['["a",\n"b"]'] if name == "prompts.json" else []
    for content in contents:
        source.write_text(content)
        with pytest.raises(RequestValidationError, match="Nothing was submitted"):
            await desk.run(source)
    assert desk.emulator.books.requests() == ()


async def test_standard_input(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """A single dash is standard input; JSON is recognised by its first line."""
    stdin = io.TextIOWrapper(io.BytesIO(b'{"prompt": "a lake"}\n"a sea"\n'))
    monkeypatch.setattr(sys, "stdin", stdin)
    await desk.run("-")
    assert set(desk.bought) == {"a lake", "a sea"}


BAD_LINES = [
    (b'{"prompt": "a", "size": "1x1"}', "size="),
    (b'{"size": "1024x1024"}', "prompt="),
    (b'{"prompt": "a"', "not JSON"),
    (b"[1]", "neither a prompt nor an object"),
    (b'{"prompt": "a", "id": ""}', "id="),
    (b'{"prompt": "a", "id": true}', "id="),
    (b'{"prompt": "a", "id": "\\ud800"}', "id="),
    (b'{"prompt": "a", "note": NaN}', "NaN"),
    (b'"\\ud800"', "prompt="),
    (b'"\xff"', "save the file as UTF-8"),
    (b'"a\x00"', "character 3 is NUL, as in UTF-16"),
    (b'"a"\r"b"', "carriage return"),
    (b'"a\x0cb"', "U+000C"),
    (b'"' + b"x" * 2001 + b'"', "at most 2000 characters"),
    (b'"' + b"x" * (1 << 20) + b'"', "longer than"),
    (b'"' + b"x" * (3 << 20), "longer than"),
    (b'{"prompt": "a", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "not JSON"),
    (b'{"prompt": "a", "deep": ' + b"[" * 100 + b"]" * 100 + b"}", "deeper than 100"),
    (b'{"prompt": "a", "x": ' + b'{"y":' * 900 + b"1" + b"}" * 901, "'x' is nested deeper"),
    (b'{"prompt": "b", "id": "twice"}', "id of line 1"),
]


@pytest.mark.parametrize(("line", "why"), BAD_LINES, ids=[why for _, why in BAD_LINES])
async def test_a_bad_line_is_reported_with_its_number_before_any_money_is_spent(
    desk: Desk, tmp_path: Path, line: bytes, why: str
) -> None:
    """Nothing is submitted, unless bad lines are to be skipped; then the rest is."""
    source = tmp_path / "prompts.jsonl"
    source.write_bytes(b'{"prompt": "first", "id": "twice"}\n' + line + b'\n"last"\n')
    bad: list[Invalid] = []
    with pytest.raises(RequestValidationError, match="line 2") as caught:
        await desk.run(source, on_invalid=bad.append)
    assert [each.line for each in bad] == [2]
    assert why in bad[0].reason
    assert bad[0].reason in str(caught.value)
    assert desk.emulator.books.requests() == ()
    report = await desk.run(source, skip_invalid=True)
    assert (report.saved, report.invalid, report.exit_code) == (2, 1, 0)
    assert set(desk.bought) == {"first", "last"}


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ("a\nb\n".encode("utf-16"), "line 1: it is not UTF-8 text; save the file as UTF-8"),
        ("a\nb\n".encode("utf-16-le"), "line 1: character 2 is NUL, as in UTF-16 text"),
        ("a\nb\n".encode("utf-16-be"), "line 1: character 1 is NUL, as in UTF-16 text"),
        ("湖\n海\n".encode("utf-16-le"), "NUL|not UTF-8"),
        (b"a\rb\rc\r", "line 1: character 2 is a carriage return; end lines"),
        (b"a\nb\x1b[2J\n", "line 2: character 2 is the control character U\\+001B"),
        ("a\x92s".encode(), "line 1: character 2 is the control character U\\+0092"),
    ],
)
async def test_what_is_no_text_is_not_paid_for(
    desk: Desk, tmp_path: Path, content: bytes, why: str
) -> None:
    """Another encoding, other line ends and stray control characters are told with what to do."""
    source = tmp_path / "prompts.txt"
    source.write_bytes(content)
    with pytest.raises(RequestValidationError, match=why):
        await desk.run(source)
    assert desk.emulator.books.requests() == ()
    source.write_bytes(b"a\ttab\r\nb\r\n")
    assert (await desk.run(source)).saved == 2
    source.write_bytes(b'{"prompt": "a \xc2\x85", "note": "\x7f"}\n')
    assert (await desk.run(source)).pictures == 1


@pytest.mark.parametrize("content", [b"", b"\n \r\n\t\n", b"\xef\xbb\xbf"])
async def test_an_empty_input_is_refused_and_leaves_the_one_of_before(
    desk: Desk, tmp_path: Path, content: bytes
) -> None:
    """A file that is empty by mistake says so, and nothing that was queued is forgotten."""
    await desk.run(["a"], max_credits=0)
    source = tmp_path / "empty.txt"
    source.write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"empty.txt holds no prompt"):
        await desk.run(source)
    with pytest.raises(ConfigurationError, match="the input holds no prompt"):
        await desk.run([])
    assert desk.states() == {"queued": 1}


async def test_an_input_of_bad_lines_only_is_refused_even_if_they_may_be_skipped(
    desk: Desk,
) -> None:
    """There would be nothing left; what was queued before stays."""
    await desk.run(["a"], max_credits=0)
    with pytest.raises(RequestValidationError, match="2 of 2 lines"):
        await desk.run(["", ""], skip_invalid=True)
    assert desk.states() == {"queued": 1}


async def test_every_bad_line_is_reported(desk: Desk) -> None:
    """However many there are, in their order."""
    bad: list[Invalid] = []
    with pytest.raises(RequestValidationError, match="1200 of 1201 lines"):
        await desk.run(["good", *[""] * 1200], on_invalid=bad.append)
    assert [each.line for each in bad] == list(range(2, 1202))


async def test_an_id_whose_request_was_bought_cannot_get_another(desk: Desk) -> None:
    """A changed line under an id that was paid for is a bad line; one not bought may change."""
    await desk.run([{"id": "x", "prompt": "a"}, {"id": "y", "prompt": "forbidden"}])
    desk.emulator.faults.add(faults.TaskFails("content_policy_violation", prompt="forbidden"))
    await desk.run([{"id": "z", "prompt": "forbidden"}])
    with pytest.raises(RequestValidationError, match="new id"):
        await desk.run([{"id": "x", "prompt": "b"}])
    report = await desk.run([{"id": "z", "prompt": "b"}])
    assert desk.bought["b"] == 1
    assert report.failed == 0


async def test_metadata_that_is_no_json_is_a_bad_line(desk: Desk) -> None:
    """Of an iterable, too, each line is checked before anything is submitted."""
    with pytest.raises(RequestValidationError, match="line 2: metadata"):
        await desk.run(["a", {"prompt": "b", "note": object()}])


@pytest.mark.parametrize("source", [7, b"bytes", {"prompt": "a"}, "no/such/file.txt", None])
async def test_a_source_that_is_none_is_refused(desk: Desk, source: Any) -> None:
    """It must be a path, a dash, or an iterable."""
    with pytest.raises(ConfigurationError, match=r"source|cannot be read"):
        await desk.run(source)


# ---------------------------------------------------------------------------------------------
# Failures


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
    """After a 401 or 402 no more is submitted; what runs is saved; what is left is told."""
    desk.emulator.faults.add(fault)
    settings = {"max_connections": 1}
    report = await desk.run(prompts(10), settings=settings)
    assert report.stop is not None
    assert (report.stop.kind, report.exit_code) == (kind, 3)
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
    assert report.stop is not None
    assert (report.stop.kind, report.exit_code) == ("refused", 3)
    assert (report.failed, report.queued) == (0, 50)
    assert len(desk.emulator.books.submits()) <= 16
    desk.emulator.faults.clear()
    assert (await desk.run(prompts(50))).saved == 50


async def test_an_empty_account_pays_for_what_it_can(tmp_path: Path, clock: ManualClock) -> None:
    """Credits that run out in the middle leave the rest queued, to be bought after topping up."""
    async with Emulator(clock=clock, pictures="tiny", credits=7) as emulator:
        desk = Desk(emulator, tmp_path)
        report = await desk.run(prompts(20))
    assert (report.saved, report.queued, report.still_to_pay) == (7, 13, 13.0)
    assert report.stop is not None
    assert report.stop.kind == "credits"


async def test_an_outage_is_waited_out(desk: Desk) -> None:
    """Submits that are surely refused for a while are put off, not lost and not doubled."""
    desk.emulator.faults.add(faults.Status(503, route="submit", between=(0, 120)))
    report = await desk.run(prompts(20))
    assert (report.saved, report.exit_code) == (20, 0)
    assert set(desk.bought.values()) == {1}


async def test_what_waited_while_another_was_put_off_is_not_bought_twice(tmp_path: Path) -> None:
    """The queue is read before the pause; who was submitted during it is not in it any more."""
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


async def test_an_outage_without_end_stops_the_batch(desk: Desk) -> None:
    """After so long without one accepted submit the batch says why and ends, all still queued."""
    desk.emulator.faults.add(faults.Status(503, route="submit"))
    report = await desk.run(prompts(5), patience=300)
    assert report.stop is not None
    assert (report.stop.kind, report.exit_code, report.queued) == ("network", 3, 5)


async def test_a_server_that_never_says_what_became_of_submits_is_left(desk: Desk) -> None:
    """Money is put at risk a few times, not a thousand."""
    desk.emulator.faults.add(faults.Status(500, route="submit", processed=True))
    report = await desk.run(prompts(200))
    assert report.stop is not None
    assert report.stop.kind == "network"
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
    lines = [*prompts(1004), "doubt 1", "doubt 2"]
    desk.emulator.faults.add(faults.Reset("after", route="submit", prompt="doubt"))
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
    assert report.stop is not None
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
    """It fails plainly, and is paid for again only when that is asked for."""
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


# ---------------------------------------------------------------------------------------------
# Results


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


@pytest.mark.parametrize("trouble", ["other name", "no picture", "cut off", "not as recorded"])
async def test_only_an_items_own_whole_pictures_are_taken_for_its_files(
    desk: Desk, trouble: str
) -> None:
    """What merely lies under a name like theirs leaves the item expired."""
    await desk.run(["a"])
    (name,) = desk.pictures()
    path = desk.out / name
    content = path.read_bytes()
    if trouble == "other name":
        path.rename(path.with_suffix(".changed-01234567.png"))
    elif trouble == "no picture":
        path.write_text("notes on a lake")
    elif trouble == "cut off":
        path.write_bytes(content[:-12])
    else:
        path.write_bytes(content[:-30] + bytes(10) + content[-20:])
    desk.change("UPDATE items SET state = 'completed', saved_at = NULL")
    if trouble != "not as recorded":
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


def not_found(status: int = 404, **which: Any) -> faults.Fault:
    """What a host answers whose links have expired, or that does not have the file yet."""
    return faults.Status(status, route="result", body="no such key", **which)


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


@pytest.mark.parametrize("stop", ["limit", "empty account", "kill"])
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
    elif stop == "limit":
        await desk.run(lines, resubmit_expired=True, max_credits=4)
    else:
        desk.change("UPDATE items SET state = 'queued', ended_at = NULL")
        await desk.run(lines)
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
    """Under the name an item has had since it completed: moved, told, and not taken for its own."""
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
@pytest.mark.parametrize("kind", ["file", "folder", "dead link"])
async def test_what_appears_under_the_name_of_an_output_stays_and_is_told(
    desk: Desk, name: str, kind: str
) -> None:
    """The pictures are saved, the report has no such file and says why, the exit code is not 0."""
    path = desk.out / name

    def appear(now: BatchProgress) -> None:
        if now.saved == 1 and not os.path.lexists(path):
            if kind == "folder":
                path.mkdir()
            elif kind == "file":
                path.write_text("mine")
            else:
                path.symlink_to("nowhere")

    report = await desk.run(["a"], progress=appear)
    assert (report.saved, report.exit_code) == (1, 3)
    assert (report.manifest is None, report.gallery is None) == (
        name == "manifest.jsonl",
        name == "gallery.html",
    )
    (why,) = report.unwritten
    assert why.startswith(f"{path} cannot be written: what is there is not what the batch wrote")
    assert path.is_symlink() if kind == "dead link" else path.exists()
    assert not list(desk.out.glob(".*.part"))
    with pytest.raises(ConfigurationError, match=f"{name} would be overwritten"):
        await desk.run(["a"])
    assert path.is_dir() or path.is_symlink() or path.read_text() == "mine"
    assert desk.emulator.books.accepted == 1


async def test_an_output_that_was_changed_is_not_written_over(desk: Desk) -> None:
    """Somebody's notes in the manifest are kept; one that is gone is written anew."""
    await desk.run(["a"])
    manifest = desk.out / "manifest.jsonl"
    with manifest.open("a") as file:
        file.write("a note\n")
    with pytest.raises(ConfigurationError, match=r"manifest.jsonl would be overwritten.*move it"):
        await desk.run(["a", "b"])
    assert manifest.read_text().endswith("a note\n")
    assert desk.emulator.books.accepted == 1
    manifest.unlink()
    (desk.out / "gallery.html").write_text("mine")
    report = await desk.run(["a", "b"], gallery=False)
    assert (report.saved, report.exit_code, report.gallery) == (2, 0, None)
    assert len(desk.manifest()) == 2
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


async def test_the_input_and_foreign_files_are_not_written_over(desk: Desk) -> None:
    """A file under the name of an output is refused before anything is asked for."""
    desk.out.mkdir()
    for name in ("manifest.jsonl", "gallery.html"):
        path = desk.out / name
        path.write_text('"a lake"\n')
        for source in (path, ["a lake"]):
            with pytest.raises(ConfigurationError, match=f"{name}.*would be overwritten"):
                await desk.run(source)
        assert path.read_text() == '"a lake"\n'
        path.unlink()
    assert desk.emulator.books.requests() == ()
    assert (await desk.run(["a lake"])).saved == 1
    with pytest.raises(ConfigurationError, match=r"the input .*would be overwritten"):
        await desk.run(desk.out / "manifest.jsonl")


FORMAT_1 = """
CREATE TABLE items (
    number INTEGER PRIMARY KEY,
    identity TEXT NOT NULL UNIQUE,
    user_id TEXT,
    digest TEXT NOT NULL,
    line INTEGER NOT NULL,
    wanted INTEGER NOT NULL DEFAULT 1,
    request TEXT NOT NULL,
    metadata TEXT,
    model TEXT NOT NULL,
    pictures INTEGER NOT NULL,
    state TEXT NOT NULL DEFAULT 'queued',
    idempotency_key TEXT,
    task_id TEXT,
    snapshot TEXT,
    stem TEXT,
    code TEXT,
    message TEXT,
    retryable INTEGER NOT NULL DEFAULT 0,
    credits_reserved REAL,
    credits_used REAL,
    credits_before REAL NOT NULL DEFAULT 0,
    queued_at REAL NOT NULL,
    submitting_at REAL,
    submitted_at REAL,
    completed_at REAL,
    saved_at REAL,
    ended_at REAL
);
CREATE INDEX items_by_state ON items (state, line, number);
CREATE INDEX items_by_line ON items (line, number);
CREATE UNIQUE INDEX items_by_stem ON items (stem COLLATE NOCASE) WHERE stem IS NOT NULL;
CREATE TABLE files (
    item INTEGER NOT NULL REFERENCES items (number),
    position INTEGER NOT NULL,
    name TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    bytes INTEGER NOT NULL,
    PRIMARY KEY (item, position)
) WITHOUT ROWID;
CREATE TABLE incoming (
    line INTEGER PRIMARY KEY,
    user_id TEXT,
    digest TEXT NOT NULL,
    request TEXT NOT NULL,
    metadata TEXT,
    model TEXT NOT NULL,
    pictures INTEGER NOT NULL
);
CREATE TABLE invalid (line INTEGER PRIMARY KEY, reason TEXT NOT NULL);
PRAGMA application_id = 1165380715;
PRAGMA user_version = 1;
"""


@pytest.mark.parametrize("gallery", [True, False])
async def test_a_batch_of_the_first_format_goes_on(desk: Desk, gallery: bool) -> None:  # noqa: FBT001 - a parameter
    """Nothing is bought again; what lies under the names of the outputs is kept, once."""
    await desk.run(prompts(3), max_credits=2)
    ledger = desk.out / LEDGER
    ledger.rename(desk.out / "newer")
    connection = sqlite3.connect(ledger)
    connection.executescript(FORMAT_1)
    connection.execute("ATTACH ? AS newer", (str(desk.out / "newer"),))
    for table in ("items", "files"):
        connection.execute(f"INSERT INTO {table} SELECT * FROM newer.{table}")  # noqa: S608 - ours
    connection.commit()
    connection.close()
    before = {name: (desk.out / name).read_bytes() for name in ("manifest.jsonl", "gallery.html")}
    for _ in range(2):
        report = await desk.run(prompts(3), gallery=gallery)
        assert (report.saved, report.exit_code, report.unwritten) == (3, 0, ())
    assert desk.bought == {f"lake {k}": 1 for k in range(3)}
    assert [item["state"] for item in desk.manifest()] == ["saved"] * 3
    (kept,) = desk.out.glob("manifest.changed-*.jsonl")
    assert kept.read_bytes() == before["manifest.jsonl"]
    pages = [path.read_bytes() for path in desk.out.glob("gallery*.html")]
    assert before["gallery.html"] in pages
    assert len(pages) == 1 + gallery


async def test_what_a_killed_download_has_left_is_removed(desk: Desk) -> None:
    """Files that never got their name go; others that look a little like them stay."""
    desk.out.mkdir()
    (desk.out / ".lake-1.0123456789abcdef.part").touch()
    (desk.out / ".mine.part").touch()
    await desk.run(["a"])
    assert [path.name for path in desk.out.glob(".*.part")] == [".mine.part"]


# ---------------------------------------------------------------------------------------------
# Money


@pytest.mark.parametrize("limit", [0, 1, 7, 10])
async def test_max_credits_holds(desk: Desk, limit: int) -> None:
    """Not one credit more is reserved than allowed, in all runs together."""
    lines = [{"prompt": f"lake {k}", "n": 1 + k % 2} for k in range(12)]
    report = await desk.run(lines, max_credits=limit)
    books = desk.emulator.books
    assert books.charged + books.reserved <= limit
    assert limit - books.charged < 2
    assert report.stop is not None
    assert (report.stop.kind, report.exit_code) == ("max_credits", 1)
    again = await desk.run(lines, max_credits=limit)
    assert books.charged <= limit
    assert again.credits == books.charged


async def test_the_first_submit_of_a_model_goes_alone(desk: Desk) -> None:
    """Until its price is known nothing else is put at risk; then the limit is used in full."""
    answered = asyncio.Event()
    seen: list[int] = []

    def look(now: BatchProgress) -> None:
        if not answered.is_set():
            seen.append(len(desk.emulator.books.submits()))
        if now.credits:
            answered.set()

    report = await desk.run(prompts(6), max_credits=6, progress=look)
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
    assert report.stop is not None
    assert report.stop.kind == "max_credits"
    assert "does not say what" in report.stop.message
    assert (report.saved, report.queued, report.still_to_pay) == (1, 4, None)
    assert (await desk.run(prompts(5))).saved == 5


@pytest.mark.parametrize("known", [False, True])
async def test_max_credits_holds_over_runs_that_are_left_and_never_told_a_reservation(
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

        def look(_: BatchProgress, stop: asyncio.Event = stop, before: list[Any] = before) -> None:
            if len(desk.rows(accepted)) > len(before):
                stop.set()

        await desk.run(lines, max_credits=4, stop=stop, grace=0, progress=look)
        assert books.charged + books.reserved <= 4
    report = await desk.run(lines, max_credits=4)
    assert report.stop is not None
    assert report.stop.kind == "max_credits"
    assert (books.charged, report.saved + report.uncertain) == (4, 4)


@pytest.mark.parametrize("said", ["-5", "1e308", "NaN", "true", '"1"'])
async def test_what_is_no_number_of_credits_counts_as_not_said(desk: Desk, said: str) -> None:
    """It neither lifts the limit nor uses it up: the end of the first task tells the price."""

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
    """What is spent and what is in doubt are told apart, the same at the end as on the way."""
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
    assert (report.credits, report.credits_in_doubt) == (5, 1)
    assert (seen[-1].credits, seen[-1].credits_in_doubt) == (5, 1)


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


async def test_a_first_submit_in_doubt_is_the_only_one_of_unknown_price(desk: Desk) -> None:
    """However often it is run again, no other is risked before that one has told the price."""
    desk.emulator.faults.add(faults.Reset("after", route="submit"))
    for _ in range(3):
        report = await desk.run(prompts(9), max_credits=3)
        assert (report.uncertain, len(desk.emulator.books.submits())) == (1, 1)
        assert report.stop is not None
        assert "uncertain items resent first" in report.stop.message
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
        ("patience", -1),
        ("patience", None),
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


async def test_doubts_of_unknown_price_are_unknown(desk: Desk) -> None:
    """Nobody has said yet what the one that may have been accepted costs: not 0."""
    desk.emulator.faults.add(faults.Reset("after", route="submit", nth=1))
    seen: list[BatchProgress] = []
    report = await desk.run(["a"], progress=seen.append)
    assert (report.uncertain, report.credits, report.credits_in_doubt) == (1, 0, None)
    assert seen[-1].credits_in_doubt is None


@pytest.mark.parametrize("limit", [-1, True, "5", float("nan")])
async def test_a_limit_that_is_none_is_refused(desk: Desk, limit: Any) -> None:
    """It must be a number of credits."""
    with pytest.raises(ConfigurationError, match="max_credits"):
        await desk.run(["a"], max_credits=limit)


# ---------------------------------------------------------------------------------------------
# Being stopped


async def test_stopped_it_lets_what_runs_finish_and_says_how_to_go_on(desk: Desk) -> None:
    """No more is submitted, what runs is saved, the rest stays queued for the next run."""
    stop = asyncio.Event()

    def look(now: BatchProgress) -> None:
        if now.saved:
            stop.set()

    report = await desk.run(
        prompts(60), stop=stop, grace=20, progress=look, settings={"max_in_flight": 8}
    )
    assert report.stop is not None
    assert (report.stop.kind, report.exit_code) == ("interrupted", 130)
    assert report.running == report.completed == report.uncertain == 0
    assert 0 < report.saved < 60
    assert report.saved + report.queued == 60
    assert desk.emulator.books.accepted == report.saved
    assert (await desk.run(prompts(60))).saved == 60
    assert set(desk.bought.values()) == {1}


async def test_stopped_after_everything_is_saved_it_has_not_failed(desk: Desk) -> None:
    """An interrupt that finds nothing left to do costs nobody an exit code."""
    stop = asyncio.Event()
    stop.set()
    await desk.run(prompts(3))
    report = await desk.run(prompts(3), stop=stop)
    assert (report.saved, report.exit_code) == (3, 0)
    assert (await desk.run(prompts(4), stop=stop)).exit_code == 130


async def test_a_grace_time_that_passes_leaves_what_runs(desk: Desk) -> None:
    """Tasks that outlast it stay submitted, and the next run picks them up."""
    desk.emulator.faults.add(faults.TaskHangs(50))
    stop = asyncio.Event()

    def look(now: BatchProgress) -> None:
        if now.running == 4:
            stop.set()

    report = await desk.run(prompts(4), stop=stop, grace=0.2, progress=look)
    assert report.running + report.uncertain + report.queued == 4
    for task in desk.emulator.books.tasks():
        desk.emulator.complete(task.id)
    desk.emulator.faults.clear()
    assert (await desk.run(prompts(4))).saved == 4 - report.uncertain
    assert set(desk.bought.values()) == {1}


async def test_cancelled_it_leaves_at_once_and_records_what_was_in_the_air(desk: Desk) -> None:
    """A submit without an answer is uncertain, with its key; nothing else is lost."""
    desk.emulator.faults.add(faults.Latency(0.5, when="after", route="submit", prompt="lake 1"))
    async with desk.session() as session:
        job = asyncio.create_task(run_batch(session, prompts(2), desk.out))
        await until(lambda: desk.emulator.books.accepted == 2 and "submitted" in desk.states())
        job.cancel()
        with pytest.raises(asyncio.CancelledError):
            await job
        assert desk.states()["uncertain"] == 1
        await session.aclose(grace=0)
    assert desk.rows("SELECT count(*) FROM items WHERE idempotency_key IS NULL") == [(0,)]


async def test_what_was_not_sent_goes_back_to_the_queue(tmp_path: Path) -> None:
    """Stopped in a cool-down, what was refused and what waits behind it is queued, not in doubt."""
    async with Emulator(pictures="tiny", time_scale=100, estimate=1) as emulator:
        desk = Desk(emulator, tmp_path / "out")
        emulator.faults.add(faults.Status(429, retry_after=200, route="submit", nth=2))
        stop = asyncio.Event()
        async with desk.session(max_connections=1, clock=None) as session:
            job = asyncio.create_task(
                run_batch(session, prompts(6), desk.out, stop=stop, grace=0.05)
            )
            await until(lambda: session.stats.cool_downs > 0)
            stop.set()
            report = await job
    assert (report.queued, report.uncertain) == (5, 0)
    assert report.saved + report.running + report.completed == 1


async def test_a_closed_session_ends_the_batch(desk: Desk) -> None:
    """Nothing is lost when somebody closes the session under a batch."""
    async with desk.session() as session:

        def look(now: BatchProgress) -> None:
            if now.saved == 1:
                closing.append(asyncio.ensure_future(session.aclose(grace=0)))

        closing: list[asyncio.Future[None]] = []
        report = await run_batch(session, prompts(50), desk.out, progress=look)
    assert report.stop is not None
    assert report.stop.kind == "closed"
    last = await desk.run(prompts(50), resend_uncertain=True)
    assert last.saved == 50
    assert set(desk.bought.values()) == {1}


async def test_two_batches_cannot_share_a_folder(desk: Desk) -> None:
    """The second is told so, and the first goes on."""
    async with desk.session() as session:
        first = asyncio.create_task(run_batch(session, prompts(40), desk.out))
        await until((desk.out / LEDGER).exists)
        with pytest.raises(LedgerError, match="in use by another process"):
            await run_batch(session, ["b"], desk.out)
        assert (await first).saved == 40


async def test_a_key_that_is_refused_while_tasks_run_stops_the_batch(desk: Desk) -> None:
    """The tasks stay submitted, for a run with a key that works."""
    desk.emulator.faults.add(faults.Status(401, route=("read", "batch")))
    report = await desk.run(prompts(3), grace=0.2)
    assert report.stop is not None
    assert (report.stop.kind, report.running) == ("authentication", 3)
    desk.emulator.faults.clear()
    assert (await desk.run(prompts(3))).saved == 3
    assert set(desk.bought.values()) == {1}


# ---------------------------------------------------------------------------------------------
# The disk


async def test_a_disk_that_is_nearly_full_stops_before_more_is_bought(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What could not be saved is not paid for."""
    usage = namedtuple("usage", "total used free")  # noqa: PYI024 - as in shutil
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9, 10**6))
    report = await desk.run(prompts(3))
    assert report.stop is not None
    assert (report.stop.kind, report.exit_code, report.queued) == ("disk", 3, 3)
    assert desk.emulator.books.requests() == ()


@pytest.mark.parametrize("removed", ["folder", "ledger"])
async def test_a_folder_that_is_removed_stops_the_batch_and_what_was_paid_for_is_named(
    desk: Desk, removed: str
) -> None:
    """What runs is still saved, the manifest knows it, and the loss of the ledger is told."""

    def look(now: BatchProgress) -> None:
        if now.saved == 2 and desk.out.exists() and not gone:
            gone.append(removed)
            if removed == "folder":
                # A picture that gets its name meanwhile must not end the removal half-way.
                shutil.rmtree(desk.out, ignore_errors=True)
            else:
                for path in desk.out.glob("ledger.*"):
                    path.unlink()

    gone: list[str] = []
    report = await desk.run(prompts(60), progress=look, settings={"max_in_flight": 4})
    assert report.stop is not None
    assert (report.stop.kind, report.exit_code) == ("disk", 3)
    assert report.uncertain == 0
    assert "ledger.sqlite3 was removed while it was in use" in report.unwritten[-1]
    named = {item["task_id"] for item in desk.manifest()} - {None}
    assert named == {task.id for task in desk.emulator.books.tasks()}
    with pytest.raises(ConfigurationError, match=r"manifest.jsonl would be overwritten"):
        await desk.run(prompts(60))


@pytest.mark.parametrize("loss", ["removed", "replaced"])
async def test_a_ledger_that_lost_its_name_stops_the_batch_and_that_is_told(
    desk: Desk, loss: str
) -> None:
    """Though nobody touched the lock; what others would open knows nothing of what is paid for."""
    ledger = desk.out / LEDGER

    def look(now: BatchProgress) -> None:
        if now.saved == 2 and not (desk.out / "away").exists():
            ledger.rename(desk.out / "away")
            if loss == "replaced":
                ledger.touch()

    report = await desk.run(prompts(60), progress=look, settings={"max_in_flight": 4})
    assert report.stop is not None
    assert (report.stop.kind, report.exit_code) == ("disk", 3)
    assert f"{ledger} was {loss} while it was in use" in report.stop.message
    assert len(desk.bought) <= 12
    (why,) = report.unwritten
    assert f"{ledger} was {loss} while it was in use" in why
    named = {item["task_id"] for item in desk.manifest()} - {None}
    assert named == {task.id for task in desk.emulator.books.tasks()}


async def test_a_folder_removed_between_two_tries_of_a_submit_is_told(desk: Desk) -> None:
    """The first try was refused: nothing is sent again, and the report says what is gone."""
    desk.emulator.faults.add(faults.Status(503, route="submit", times=1))

    def look(now: BatchProgress) -> None:
        if now.running == 1:
            shutil.rmtree(desk.out, ignore_errors=True)

    report = await desk.run(prompts(1), progress=look)
    assert report.stop is not None
    assert (report.stop.kind, report.exit_code, report.queued) == ("disk", 3, 1)
    assert f"{LEDGER} was removed while it was in use" in report.unwritten[-1]
    assert desk.bought == {}


@pytest.mark.parametrize("name", ["manifest.jsonl", "gallery.html"])
async def test_a_folder_removed_while_its_last_files_are_written_still_gets_them(
    desk: Desk, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Without the ledger nothing else names what was paid for; what is not there is told."""
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

    def look(now: BatchProgress) -> None:
        if now.saved == 2:
            for path in desk.out.glob("*.png"):
                path.unlink()
            raise FileNotFoundError(errno.ENOENT, "mine")

    with pytest.raises(FileNotFoundError, match="mine"):
        await desk.run(prompts(20), progress=look, settings={"max_in_flight": 4})
    last = await desk.run(prompts(20), resend_uncertain=True)
    assert (last.saved, last.unwritten, len(desk.pictures())) == (20, (), 20)
    assert set(desk.bought.values()) == {1}


async def test_a_disk_that_cannot_be_asked_stops_the_batch(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the system, as of a share that went away, is told in the report."""

    def fail(_: Path) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(shutil, "disk_usage", fail)
    report = await desk.run(prompts(3))
    assert report.stop is not None
    assert (report.stop.kind, report.exit_code, report.queued) == ("disk", 3, 3)
    assert f"the folder {desk.out} cannot be used any more: Stale file" in report.stop.message


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

    def look(now: BatchProgress) -> None:
        if now.running == 3:  # pictures are larger than this; the ledger's file is so already
            resource.setrlimit(resource.RLIMIT_FSIZE, (1024, hard))

    try:
        with pytest.raises(LedgerError):
            await desk.run(prompts(3), progress=look)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, previous)
    last = await desk.run(prompts(3), resend_uncertain=True)
    assert last.saved == 3
    assert set(desk.bought.values()) == {1}


# ---------------------------------------------------------------------------------------------
# The command


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """An emulated API in a thread, found by the environment; generations end at once."""
    with Emulator(pictures="tiny", time_scale=1000, duration=1, estimate=1) as emulator:
        monkeypatch.setenv("EVOLINK_API_KEY", emulator.api_key)
        monkeypatch.setenv("EVOLINK_BASE_URL", emulator.base_url)
        yield emulator


@pytest.fixture
def lakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file of three prompts, in the current folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lakes.txt").write_text("lake 0\nlake 1\nlake 2\n")
    return "lakes.txt"


def test_the_command_saves_and_summarises(
    api: Emulator, lakes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A table on stdout, progress on stderr; the second time nothing is bought."""
    assert main(["batch", lakes, "--out", "out"]) == 0
    out, err = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (rows["saved"], rows["items"], rows["credits"]) == ("3", "3", "3")
    assert rows["gallery"] == (Path("out").resolve() / "gallery.html").as_uri()
    assert "3 of 3 saved" in err
    assert main(["batch", lakes, "--out", "out", "--no-gallery", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["saved"], report["pictures"], report["gallery"]) == (3, 0, None)
    assert api.books.accepted == 3


def test_the_command_names_what_went_wrong_and_what_to_do(
    api: Emulator, lakes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Failed, uncertain and unsent items each with a reason, and the options that may help."""
    api.faults.add(
        faults.TaskFails("service_error", "\x1b[2Jbusy", prompt="lake 0", times=1),
        faults.Reset("after", route="submit", prompt="lake 1", times=1),
        faults.NotAPicture("text/html", route="result", times=1),
    )
    assert main(["batch", lakes, "--out", "out"]) == 1
    err = capsys.readouterr().err
    assert "line 1: failed, service_error" in err
    assert "line 2: may have been accepted and charged (idempotency key" in err
    assert "line 3: generated, not downloaded yet" in err
    for word in ("--resend-uncertain", "--retry-failed", "run the same command again", "busy"):
        assert word in err
    assert "\x1b" not in err
    rest = Path("rest.txt")
    rest.write_text("lake 2\n")
    assert main(["batch", str(rest), "--out", "out"]) == 1
    assert "no longer in the input: may have been accepted" in capsys.readouterr().err
    again = ["batch", lakes, "--out", "out", "--resend-uncertain", "--retry-failed"]
    assert main(again) == 0
    assert api.books.charged == 3


def test_the_command_names_what_it_kept_aside(
    api: Emulator, lakes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A retouched picture gets another name, which is told; so is why one is not downloaded."""
    assert main(["batch", lakes, "--out", "out"]) == 0
    first, *_ = sorted(Path("out").glob("*.png"))
    first.write_bytes(b"retouched")
    api.faults.add(not_found())
    assert main(["batch", lakes, "--out", "out"]) == 1
    told = capsys.readouterr().err
    assert re.search(r"line 1: generated, not downloaded yet \(task .*the host answered 404", told)
    assert first.read_bytes() == b"retouched"
    api.faults.clear()
    assert main(["batch", lakes, "--out", "out", "--json"]) == 0
    out, err = capsys.readouterr()
    (kept,) = json.loads(out)["kept"]
    assert Path(kept).read_bytes() == b"retouched"
    assert f"kept as {kept}" in err


def test_the_command_says_what_is_left_to_pay_for(
    api: Emulator, lakes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """At its own limit it ends with 1, without credits with 3, and tells the price of the rest."""
    assert main(["batch", lakes, "--out", "out", "--max-credits", "1"]) == 1
    assert "2 not submitted, about 2 credits" in capsys.readouterr().err
    api.faults.add(faults.Status(402, route="submit"))
    assert main(["batch", lakes, "--out", "out"]) == 3
    err = capsys.readouterr().err
    assert "error: nothing is left to spend" in err
    assert "2 not submitted, about 2 credits" in err


def test_the_command_names_every_bad_line(
    api: Emulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And ends with the code for wrong usage, unless they are to be skipped."""
    source = tmp_path / "p.jsonl"
    source.write_text('"a lake"\n{"prompt": ""}\n7\n')
    assert main(["batch", str(source), "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert "line 2: prompt=''" in err
    assert "line 3: 7 is neither" in err
    assert api.books.requests() == ()
    assert main(["batch", str(source), "--out", str(tmp_path / "out"), "--skip-invalid"]) == 0
    assert "bad lines skipped 2" in capsys.readouterr().out


def test_the_command_runs_without_key_or_money(
    lakes: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With an emulator of its own; without one, and without a key, it says what is missing."""
    monkeypatch.setitem(_batch_cli.EMULATED, "clock", ManualClock())
    monkeypatch.delitem(_batch_cli.EMULATED, "time_scale")
    monkeypatch.setitem(_batch_cli.EMULATED, "pictures", "tiny")
    assert main(["batch", lakes, "--out", "out", "--emulator"]) == 0
    assert len(list(Path("out").glob("*.png"))) == 3
    assert main(["batch", lakes, "--out", "out", "--emulator"]) == 0
    with contextlib.closing(sqlite3.connect(Path("out") / LEDGER)) as ledger:
        ledger.execute("UPDATE items SET state = 'submitted' WHERE number = 1")
        ledger.commit()
    assert "--emulator" not in capsys.readouterr().err
    assert main(["batch", lakes, "--out", "out", "--emulator"]) == 1
    assert "each run with --emulator has an emulator of its own" in capsys.readouterr().err
    again = ["batch", lakes, "--out", "out", "--emulator", "--resubmit-expired"]
    assert main(again) == 0
    assert main(["batch", lakes, "--out", "other"]) == 2
    assert "EVOLINK_API_KEY" in capsys.readouterr().err


def test_the_command_speaks_of_its_options(
    api: Emulator, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What to do next is said in words that can be typed, not in those of Python."""
    source, out = tmp_path / "p.jsonl", tmp_path / "out"
    source.write_text('"a"\n{"prompt": "b", "n": 3}\n')
    assert main(["batch", str(source), "--out", str(out)]) == 2
    first = capsys.readouterr().err
    assert "--skip-invalid" in first
    assert '"validate": false' in first
    source.write_text("\n")
    assert main(["batch", str(source), "--out", str(out)]) == 2
    source.write_text('"a"\n')
    assert main(["batch", str(source), "--out", str(source)]) == 2
    assert main(["batch", str(source), "--out", str(out), "--max-credits", "nan"]) == 2
    assert main(["batch", str(out / "gallery.html"), "--out", str(out)]) == 2
    assert main(["batch", str(source), "--out", str(out)]) == 0
    told = first + capsys.readouterr().err
    assert not re.search(r"skip_invalid|validate=|resubmit_expired|max_credits|out=|source=", told)
    source.write_text('{"prompt": "b", "n": 3, "validate": false}\n')
    assert main(["batch", str(source), "--out", str(out)]) in {0, 1}
    assert [task.n for task in api.books.tasks(prompt="b")] in ([3], [])
    assert [record.prompt for record in api.books.submits()] == ["a", "b"]


def test_the_command_does_not_end_with_0_if_the_manifest_is_missing(
    api: Emulator, lakes: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All pictures are there, and what is not is an error with what to do."""
    sync = os.fsync

    def sync_and_spoil(descriptor: int) -> None:
        sync(descriptor)
        Path("out", "manifest.jsonl").touch()

    monkeypatch.setattr(os, "fsync", sync_and_spoil)
    assert main(["batch", lakes, "--out", "out"]) == 3
    out, err = capsys.readouterr()
    assert "saved             3" in out
    assert "error: " in err
    assert "manifest.jsonl cannot be written" in err
    assert "move it, then run the same batch again" in err


async def test_a_log_is_told_how_it_goes_even_while_nothing_changes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A line every few seconds, from the reading on; what is new in the end is told, once."""
    monkeypatch.setattr(_batch_cli, "_LINE_EVERY", 0.005)
    told: list[str] = []
    console = _batch_cli.Console(
        drive=asyncio.run,
        say=told.append,
        say_json=lambda value: told.append(str(value)),
        tell=told.append,
        emulator=lambda settings: Emulator(**settings),
    )
    running, done = BatchProgress(total=1, running=1), BatchProgress(total=1, saved=1)
    async with _batch_cli._progress(console) as show:
        await until(lambda: told.count("reading the prompts") >= 3)
        reading = len(told)
        show(running)
        assert told[reading:] == [_batch_cli._words(running)]
        await until(lambda: told.count(_batch_cli._words(running)) >= 3)
        show(done)
    assert told.count(_batch_cli._words(done)) == 1


@pytest.mark.parametrize(
    ("now", "words"),
    [
        (
            BatchProgress(total=9, queued=9),
            "0 of 9 saved, 0 running, 0 to download, 9 queued, 0 credits",
        ),
        (
            BatchProgress(
                total=9,
                saved=4,
                running=3,
                failed=1,
                uncertain=1,
                credits=7,
                credits_in_doubt=1.5,
                rate=0.5,
                seconds_left=600,
            ),
            (
                "4 of 9 saved, 3 running, 0 to download, 0 queued, 1 failed, 1 uncertain, "
                "7 credits, 1.5 in doubt, 0.5/s, about 10 min left"
            ),
        ),
        (
            BatchProgress(total=1, running=1, rate=12.4, seconds_left=9000),
            "0 of 1 saved, 1 running, 0 to download, 0 queued, 0 credits, 12/s, about 2.5 h left",
        ),
    ],
)
def test_progress_in_words(now: BatchProgress, words: str) -> None:
    """Trouble is named where there is some; rate and time left once they are known."""
    assert _batch_cli._words(now) == words


def test_progress_fits_a_terminal_of_80_columns() -> None:
    """What is least needed is left out: trouble and the time left stay."""
    now = BatchProgress(
        total=20_000,
        saved=10_000,
        running=32,
        completed=8,
        queued=9_960,
        failed=11,
        uncertain=2,
        credits=10_051,
        credits_in_doubt=2,
        rate=1.2,
        seconds_left=8_000,
    )
    words = _batch_cli._words(now, 80 - 13)
    assert len(words) <= 80 - 13
    for part in ("10000 of 20000 saved", "11 failed", "2 uncertain", "about 2.2 h left"):
        assert part in words
    assert _batch_cli._words(now, 1000) == _batch_cli._words(now)


def test_of_many_failures_some_are_told_and_the_rest_counted(
    api: Emulator, lakes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thousand lines of the same trouble help nobody; the manifest has them all."""
    Path(lakes).write_text("".join(f"lake {k}\n" for k in range(25)))
    api.faults.add(faults.Status(400, route="submit"))
    assert main(["batch", lakes, "--out", "out"]) == 1
    err = capsys.readouterr().err
    assert err.count(": failed, ") == 20
    assert "... and 5 more items: see the manifest" in err


def command(*argv: str, **options: Any) -> subprocess.Popen[str]:
    """The command in a process of its own."""
    return subprocess.Popen(  # noqa: S603 - our own command
        [sys.executable, "-m", "evolink_async", "batch", *argv], text=True, **options
    )


def test_interrupted_it_finishes_what_runs_and_says_how_to_go_on(api: Emulator, lakes: str) -> None:
    """The first signal stops submitting; the exit code says so; the next run does the rest."""
    Path(lakes).write_text("".join(f"lake {k}\n" for k in range(400)))
    process = command(
        lakes,
        "--out",
        "out",
        "--max-in-flight",
        "2",
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    while api.books.accepted < 5:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopping: no more is submitted" in err
    assert "run the same command again to go on" in err
    assert "error" not in err
    saved = dict(line.split(maxsplit=1) for line in out.splitlines())["saved"]
    assert int(saved) == api.books.accepted < 400


def test_a_terminal_that_is_closed_interrupts_it(api: Emulator, lakes: str) -> None:
    """What runs is finished and recorded, though nobody can be told any more."""
    Path(lakes).write_text("".join(f"lake {k}\n" for k in range(400)))
    terminal, end = os.openpty()
    process = command(
        lakes,
        "--out",
        "out",
        "--max-in-flight",
        "2",
        stdout=end,
        stderr=end,
        env={**os.environ, "TERM": "xterm"},
    )
    os.close(end)
    while api.books.accepted < 5:
        assert os.read(terminal, 4096)
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 130
    saved = [json.loads(line) for line in Path("out/manifest.jsonl").read_text().splitlines()]
    assert Counter(item["state"] for item in saved)["saved"] == api.books.accepted < 400


def test_without_a_terminal_to_lose_it_goes_on(api: Emulator, lakes: str) -> None:
    """Under nohup the signal of a closed terminal stays ignored."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as a child of nohup inherits it
    try:
        process = command(lakes, "--out", "out", stdout=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGHUP, before)
    while not api.books.accepted:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    assert process.wait(30) == 0


def test_interrupted_twice_it_leaves_at_once(api: Emulator, lakes: str) -> None:
    """What runs goes on without it, and is picked up by the next run."""
    api.faults.add(faults.TaskHangs(50))
    process = command(lakes, "--out", "out", stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    assert process.stderr is not None
    while api.books.accepted < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    while "stopping" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=10)
    assert process.returncode == 130
    assert "left at once; run the same command again to go on" in err
    for task in api.books.tasks():
        api.complete(task.id)
    assert main(["batch", lakes, "--out", "out", "--resend-uncertain"]) == 0
    assert api.books.accepted == 3


def test_interrupted_while_it_reads_it_leaves_at_once(api: Emulator, tmp_path: Path) -> None:
    """It does not wait for the rest of a pipe that nobody writes to."""
    ledger_file = tmp_path / "out" / LEDGER
    process = command(
        "-", "--out", str(ledger_file.parent), stdin=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdin is not None
    assert process.stderr is not None
    while not ledger_file.exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130
    assert "run the same command again" in process.stderr.read()
    process.stdin.close()
    process.stderr.close()
    assert api.books.requests() == ()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo terminals on this system")
def test_on_a_terminal_it_draws_a_bar_and_a_table(api: Emulator, lakes: str) -> None:
    """One live line while it runs, a drawn table at the end."""
    terminal, end = os.openpty()
    process = command(
        lakes,
        "--out",
        "out",
        stdout=end,
        stderr=end,
        env={**os.environ, "TERM": "xterm", "COLUMNS": "80"},
    )
    os.close(end)
    shown = b""
    with contextlib.suppress(OSError):  # how Linux says that nobody writes there any more
        while chunk := os.read(terminal, 4096):
            shown += chunk
    os.close(terminal)
    assert process.wait() == 0
    assert "┃" in shown.decode() or "│" in shown.decode()
    assert b"3 of 3 saved" in shown
    assert "…" not in shown.decode()
