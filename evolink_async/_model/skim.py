"""Batch answers at a glance, where msgspec is installed (the extra ``fast``).

Most tasks of a batch answer go on, and of those a few words are all that matters: they are
picked out without making Python objects of everything else.
"""

from __future__ import annotations

import msgspec

__all__ = ["Row", "rows", "texts"]


class Row(msgspec.Struct, gc=False):
    """What matters of a task that goes on."""

    id: str
    status: str
    progress: int | None = None


class _Rows(msgspec.Struct):
    data: list[Row]


class _Texts(msgspec.Struct):
    data: list[msgspec.Raw]


_ROWS = msgspec.json.Decoder(_Rows)
_TEXTS = msgspec.json.Decoder(_Texts)


def rows(body: bytes) -> list[Row] | None:
    """The tasks of a regular batch answer; None if anything about it is unusual.

    What is accepted here is read alike by `json`, which also takes some that is not; but for
    numbers of thousands of digits in what is skipped, which fail when somebody asks for them.
    """
    try:
        if not body.isascii():
            body.decode()  # what is skipped is not looked at so closely
        return _ROWS.decode(body).data
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None


def texts(body: bytes) -> list[msgspec.Raw]:
    """The JSON text of each task, of a body that has `rows`."""
    return _TEXTS.decode(body).data
