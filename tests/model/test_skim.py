"""Batch answers at a glance: what msgspec picks out is what parsing them whole gives."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import bodies, examples, json_values

from evolink_async import InvalidResponseError, TaskSnapshot
from evolink_async._http.protocol import _parsed, _skimmed, read_tasks

pytest.importorskip("msgspec")

IDS = ("task-0001", "task-0002", "task-0003")


def told(page: Any, others: dict[str, Any]) -> dict[str, Any]:
    """Everything a page and its others say of `IDS`."""
    said: dict[str, Any] = {}
    for task_id in IDS:
        found = others[task_id] if task_id in others else page.snapshot(task_id)
        said[task_id] = (
            (found.id, found.status, found.progress, found.raw)
            if isinstance(found, TaskSnapshot)
            else repr(found)
        )
    return said


def same(body: bytes) -> None:
    skimmed = _skimmed(body, IDS)
    if skimmed is not None:
        assert told(*skimmed) == told(*_parsed(body, IDS))


tasks = st.fixed_dictionaries(
    {},
    optional={
        "id": st.sampled_from([*IDS, *IDS, "task-9999", None, 7]),
        "status": st.sampled_from(["processing", "processing", "pending", "completed", "", 3]),
        "progress": st.sampled_from([0, 40, 100, -1, 10**30, 40.0, True, None, "40"]),
        "error": json_values,
    },
)


@examples(500)
@given(data=st.lists(tasks | json_values, max_size=5), ascii_only=st.booleans())
def test_skimming_says_what_parsing_says(data: list[Any], *, ascii_only: bool) -> None:
    """Whatever the tasks of an answer are, in whatever order and number."""
    try:
        body = json.dumps({"data": data}, ensure_ascii=ascii_only).encode()
    except (ValueError, RecursionError):
        return
    same(body)


@examples(500)
@given(bodies)
@example(b'{"data":[{"id":"task-0001","status":"pending","x":"\xff"}]}')
@example(b'{"data":[{"id":"task-0001","status":"pending","\xc3\x28":1}]}')
@example(b'{"data":[{"id":"task-0001","status":"pending"}],"data":[]}')
@example(b'{"data":[{"id":"task-0001","id":"task-0002","status":"pending"}]}')
@example(b'{"data":[{"id":"task-0001","status":"pending","progress":12}]}\x00')
@example(b'{"data":[{"id":"task-0001","status":"pending","x":' + b"[" * 5000 + b"]" * 5000 + b"}]}")
def test_what_is_no_batch_answer_is_refused_alike(body: bytes) -> None:
    """Nothing is taken at a glance that is refused when it is parsed."""
    same(body)


@pytest.mark.parametrize(
    "odd",
    ['"x":NaN', '"x":"\\ud800"', '"progress":40.5', '"progress":true', '"status":null'],
    ids=["NaN", "lone surrogate", "half a percent", "true percent", "no status"],
)
def test_what_is_unusual_is_parsed_whole(odd: str) -> None:
    """What `json` takes and msgspec does not is no less read."""
    body = f'{{"data":[{{"id":"task-0001","status":"processing",{odd}}}]}}'.encode()
    assert _skimmed(body, IDS) is None
    page, others = read_tasks(body, IDS)
    assert page is not None
    assert others["task-0002"] is None


def test_a_number_that_python_cannot_hold() -> None:
    """A task that cannot be parsed when it is looked at says so in an error of ours."""
    body = b'{"data":[{"id":"task-0001","status":"pending","x":' + b"9" * 5000 + b"}]}"
    page, _ = read_tasks(body, IDS)
    assert page is not None
    seen = page.snapshot("task-0001")
    assert seen.status == "pending"
    with pytest.raises(InvalidResponseError):
        _ = seen.raw


def test_without_msgspec() -> None:
    """Nothing needs it: every answer is parsed whole."""
    script = (
        "import sys; sys.modules['msgspec'] = None\n"
        "from evolink_async._http import protocol\n"
        "assert protocol._skim is None\n"
        'body = b\'{"data": [{"id": "task-0001", "status": "pending", "progress": 7}]}\'\n'
        "page, others = protocol.read_tasks(body, ('task-0001',))\n"
        "print(page.snapshot('task-0001').progress, others)"
    )
    done = subprocess.run(  # noqa: S603 - our own interpreter
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout == "7 {}\n"
