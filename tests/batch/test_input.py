"""What a batch reads, and what it refuses."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from desk import Desk

from evolink_async.batch import Invalid
from evolink_async.emulator import faults
from evolink_async.errors import ConfigurationError, RequestValidationError


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
    """Another encoding, other line ends and stray control characters are refused, with advice."""
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
