"""File names that are safe on every system."""

from __future__ import annotations

import re
from pathlib import Path, PureWindowsPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolink_async._files import safe_name


@pytest.mark.parametrize(
    "task_id", ["task-unified-1757156493-imcg5zqt", "abcd", "a.b_c-D9", "x" * 112]
)
def test_ordinary_ids_keep_their_name(task_id: str) -> None:
    """An id that is a safe file name is not changed."""
    assert safe_name(task_id) == task_id


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "..", "...", "/", "../../etc/passwd", "..\\..\\x", "a/b", "a:b", "C:x", "a\0b",
        "-rf", ".hidden", "trailing.", "trailing ", "con", "CON", "nul.txt", "Com1", "LPT9.x",
        "aux", "prn.", "a*b?", "\u202eabc", "\x1b[31m", "\ud800", "\u00fcber", "x" * 300, "a\nb",
        "a%2fb", "~", "$HOME", "|x",
    ],
)  # fmt: skip
def test_other_ids_get_a_safe_name(text: str) -> None:
    """Any other text becomes a different name that is safe on every system."""
    name = safe_name(text)
    check_name(name)
    assert name != text
    assert safe_name(name) == name


def check_name(name: str) -> None:
    """*name* is a single, visible, ordinary path component on any system."""
    assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,119}", name)
    assert not name.endswith(".")
    for path in (name, f"{name}-1.png"):
        assert Path(path).name == path
        assert not PureWindowsPath(path).is_reserved()
        assert PureWindowsPath(path).parts == (path,)


@given(st.text(max_size=200))
def test_any_text_as_a_name(text: str) -> None:
    """Any text gives a safe name, and that name is its own safe name."""
    name = safe_name(text)
    check_name(name)
    assert safe_name(name) == name


@given(st.sets(st.text(st.sampled_from("aA:._-/ 1"), min_size=1, max_size=4), max_size=50))
def test_names_do_not_collide(texts: set[str]) -> None:
    """Different ids have different names, and so have all their files."""
    stems = [f"{safe_name(text)}-{k}" for text in texts for k in (1, 2, 11)]
    assert len(set(stems)) == len(stems)
