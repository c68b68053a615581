"""Text from outside, made fit for a terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import examples, nested

from evolink_async._text import printable, shown


@pytest.mark.parametrize(
    ("given_text", "expected"),
    [
        ("A serene lake", "A serene lake"),
        ("평화로운 호수 🌅", "평화로운 호수 🌅"),
        ("\x1b[2Jgone", " [2Jgone"),
        ("a\nb\tc\r\0d", "a b c  d"),
        ("\x9b31mred\x85", " 31mred "),
        ("user\u202etxt.exe", "user txt.exe"),
        ("\u2028line\u2029", " line "),
        ("lone\ud800", "lone "),
        ("", ""),
    ],
)
def test_control_characters_become_spaces(given_text: str, expected: str) -> None:
    """What a terminal would obey, and what cannot be encoded, is shown as a space."""
    assert printable(given_text) == expected


@pytest.mark.parametrize(
    ("length", "expected"), [(9, "x" * 9), (10, "x" * 10), (11, "x" * 9 + "…")]
)
def test_long_text_is_cut(length: int, expected: str) -> None:
    """Text of exactly the limit is whole; longer text ends in an ellipsis, at the limit."""
    assert printable("x" * length, 10) == expected


@examples(300)
@given(st.text(st.characters()), st.integers(1, 40))
def test_printable_is_bounded_and_harmless(text: str, limit: int) -> None:
    """No text gets longer than the limit or keeps a character that a terminal obeys."""
    result = printable(text, limit)
    assert len(result) <= limit
    assert not {unicodedata.category(c) for c in result} & {"Cc", "Cf", "Cs", "Zl", "Zp"}
    result.encode()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("a\x1b", r"'a\x1b'"),
        (1.5, "1.5"),
        (10**5000, "<int>"),
        ([10**5000], "<list>"),
        (nested(5000, objects=False), "<list>"),
        ("y" * 100, "'" + "y" * 78 + "…"),
    ],
    ids=["text", "number", "huge", "huge inside", "deep", "long"],
)
def test_any_value_can_be_shown(value: object, expected: str) -> None:
    """A value whose repr fails is shown as its type; a long one is cut."""
    assert shown(value) == expected
