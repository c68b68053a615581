"""`parse_json` refuses what is not JSON; `loads` is `json.loads`, with msgspec and without."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import bodies, examples, json_values

from evolink_async import EvolinkError, InvalidResponseError
from evolink_async._model import json as _json
from evolink_async._model.json import parse_json


def outcome(load: Callable[[bytes], Any], text: bytes) -> str:
    """What comes of *text*: the value with its types, or that it is refused."""
    try:
        return repr(load(text))
    except (ValueError, RecursionError):
        return "refused"


def written(value: object, *, ascii_only: bool) -> bytes:
    """*value* as JSON, as far as `json` can write it."""
    try:
        return json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        return b""


values = json_values | st.floats() | st.integers()
texts = bodies | st.builds(written, values, ascii_only=st.booleans())


@examples(500)
@given(texts)
def test_loads_gives_what_json_gives(text: bytes) -> None:
    """The same value of the same types, or an error of the same kind."""
    assert outcome(_json.loads, text) == outcome(json.loads, text)


@pytest.mark.parametrize(
    "text",
    [
        b"NaN",
        b"[-Infinity, 1e400]",
        b"-0",
        b"1" * 30,
        b"9" * 5000,
        b"1." + b"3" * 400,
        b'"\\ud800"',
        b'"\xed\xa0\x80"',
        b'{"a": 1, "a": 2}',
        b"\xef\xbb\xbf1",
        '{"a": "é"}'.encode("utf-16"),
        b'"\xff"',
        b"[1,]",
        b"01",
        b"",
        b"[" * 100_000 + b"]" * 100_000,
    ],
)
def test_loads_of_odd_texts(text: bytes) -> None:
    """What one library takes and the other does not is as `json` says."""
    assert outcome(_json.loads, text) == outcome(json.loads, text)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"<html>", b'{"id": "task-1"', b"\xff\xfe\x00", b"nul", b"{} {}", b"9" * 5000),
        *(
            b"[" * 100_000,
            b'{"a":' * 100_000,
            b"[" * 102 + b"]" * 102,
            b'"\xff"',
            b"\xef\xbb\xbf{}x",
        ),
    ],
    ids=range(12),
)
def test_what_is_not_json(body: bytes) -> None:
    """Cut, deep, absurd or otherwise unusable text is our error, with the head of the body."""
    with pytest.raises(InvalidResponseError) as caught:
        parse_json(body)
    assert len(caught.value.head) <= 200


@examples(300)
@given(st.binary(max_size=30))
def test_any_text_is_json_or_our_error(body: bytes) -> None:
    """Bytes of any kind are parsed, or refused with an EvolinkError."""
    try:
        parse_json(body)
    except EvolinkError as error:
        assert isinstance(error, InvalidResponseError)  # noqa: PT017 - a value is right too


@examples(300)
@given(st.lists(values, max_size=5), st.booleans(), st.booleans())
def test_items_have_their_own_text(items: list[Any], ascii_only: bool, other: bool) -> None:  # noqa: FBT001 - of hypothesis
    """Each item of a list is what it is in the whole, and its text says the same."""
    body = written({"x": 1, "data": items} if other else {"data": items}, ascii_only=ascii_only)
    try:
        whole = json.loads(body)["data"]
    except (ValueError, RecursionError):
        return
    found = _json.parse_items(body, "data")
    assert repr([item for item, _ in found]) == repr(whole)
    for item, text in found:
        assert text is None or repr(json.loads(text)) == repr(item)


@pytest.mark.parametrize("text", [b"[]", b'{"data": {}}', b'{"more": []}', b"{", b"\xff"])
def test_no_list_of_items(text: bytes) -> None:
    """Anything but an object with that list is one error of ours."""
    with pytest.raises(InvalidResponseError):
        _json.parse_items(text, "data")


def test_items_without_msgspec(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing needs it: a task's text is then written anew."""
    monkeypatch.setattr(_json, "msgspec", None)
    assert _json.parse_items(b'{"data": [1, {"a": 2}]}', "data") == [(1, None), ({"a": 2}, None)]
