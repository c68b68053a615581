"""What a batch is made of: lines of text or objects, to checked entries of the ledger.

A bad line becomes an `Invalid` with its number and what is wrong with it; nothing here
raises for what a line holds. One line is in memory at a time.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import IO, Any, Final

from attrs import fields

from evolink_async._checks import refuse
from evolink_async._model.requests import ImageRequest, RawRequest, as_request
from evolink_async._text import printable, shown
from evolink_async.batch._rows import Entry, Invalid
from evolink_async.errors import ConfigurationError, RequestValidationError

__all__ = ["Source", "check_readable", "name_of", "read"]

Source = str | os.PathLike[str] | Iterable[str | Mapping[str, Any] | ImageRequest | RawRequest]

_LONGEST: Final = 1 << 20
"""Bytes of one line: 100 times what a request with a 2000-character prompt needs."""
_ID_LIMIT: Final = 200
_DEEPEST: Final = 100
"""Levels of nesting: what is read once must be written and read again, with less stack left."""
_IMAGE_FIELDS: Final = frozenset(f.name for f in fields(ImageRequest))
_RAW_FIELDS: Final = frozenset({"path", "body"})
_JSON_NAMES: Final = (".jsonl", ".ndjson", ".json")
_CONTROL: Final = {
    True: re.compile(r"[\x00-\x08\x0a-\x1f]"),
    False: re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]"),
}
"""What no line of JSON (True) or text (False) holds; a tab may be."""
_UNCHECKED: Final = '; to let the API decide, write it as an object with "validate": false'
_NO_PROMPT: Final = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")
"""No prompt has these, wherever it comes from; lines and tabs are fine."""


class _BadLineError(ValueError):
    """What is wrong with a line."""


def read(source: Source) -> Iterator[Entry | Invalid]:
    """The entries of *source*, blank lines left out.

    Args:
        source: A path, ``-`` for standard input, or an iterable of prompts, mappings (as
            the objects of a JSON Lines file) or requests. A file is JSON Lines if its name
            ends in ``.jsonl``, ``.ndjson`` or ``.json``, or its first line is a JSON string
            or object, or begins an array (whose lines are bad ones, and not prompts to be
            paid for); else it is text, one prompt a line.

    Raises:
        ConfigurationError: *source* is none of these, or the file cannot be read.
    """
    if isinstance(source, str | os.PathLike):
        return _of_file(os.fspath(source))
    if isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        allowed = "a path, '-' for standard input, or an iterable of prompts, mappings or requests"
        raise refuse("source", source, allowed)
    return (_entry(line, item) for line, item in enumerate(source, 1))


def check_readable(source: Source) -> None:
    """Refuse an input that is not there, before a folder is made for it.

    Raises:
        ConfigurationError: It is not there, or cannot be one.
    """
    if not isinstance(source, str | os.PathLike):
        return
    why: object = None
    if source == "-":
        if sys.stdin is None:
            raise ConfigurationError("the prompts cannot be read: standard input is closed")
        return
    if not os.fspath(source):
        raise refuse("source", source, "the path of a file, or '-'")
    try:
        mode = Path(source).stat().st_mode  # not opened: a pipe can be read only once
    except (OSError, ValueError) as exc:
        why = exc.strerror if isinstance(exc, OSError) else "it cannot be the name of a file"
    else:
        why = "it is a folder" if stat.S_ISDIR(mode) else None
    if why is not None:
        name = printable(os.fspath(source))
        raise ConfigurationError(f"the prompts cannot be read from {name}: {why}")


def name_of(source: Source) -> str:
    """What to call the input in a message."""
    if source == "-":
        return "standard input"
    return printable(os.fspath(source)) if isinstance(source, str | os.PathLike) else "the input"


def _of_file(name: str) -> Iterator[Entry | Invalid]:
    try:
        opened = nullcontext(sys.stdin.buffer) if name == "-" else Path(name).open("rb")  # noqa: SIM115 - closed below
        with opened as file:
            yield from _of_lines(file, as_json=name.lower().endswith(_JSON_NAMES) or None)
    except OSError as exc:
        raise ConfigurationError(
            f"the prompts cannot be read from {printable(name)}: {exc.strerror or exc}"
        ) from exc


def _of_lines(file: IO[bytes], *, as_json: bool | None) -> Iterator[Entry | Invalid]:
    for line, raw in enumerate(_lines(file), 1):
        text = "" if raw is None else _decoded(raw, first=line == 1)
        if text is not None and raw is not None and not text.strip():
            continue
        if as_json is None:
            as_json = _looks_like_json(text or "")
        if raw is None:
            yield Invalid(line, f"it is longer than {_LONGEST} bytes")
        elif text is None:
            yield Invalid(line, "it is not UTF-8 text; save the file as UTF-8")
        elif (found := _CONTROL[as_json].search(text.rstrip("\r\n"))) is not None:
            yield Invalid(line, _why_not(found))
        else:
            yield _of_json(line, text) if as_json else _entry(line, text.strip())


def _why_not(found: re.Match[str]) -> str:
    """What a control character where none belongs says about the file."""
    where = f"character {found.start() + 1} is "
    if found[0] == "\0":
        return f"{where}NUL, as in UTF-16 text; save the file as UTF-8"
    if found[0] == "\r":
        return f"{where}a carriage return; end lines with a line feed, or both"
    return (
        f"{where}the control character U+{ord(found[0]):04X}; remove it, or save the file as UTF-8"
    )


def _lines(file: IO[bytes]) -> Iterator[bytes | None]:
    """The lines of a file, None for one that is too long to be a request."""
    while raw := file.readline(_LONGEST):
        if len(raw) < _LONGEST or raw.endswith(b"\n"):
            yield raw
            continue
        while (rest := file.readline(_LONGEST)) and not rest.endswith(b"\n"):
            pass
        yield None


def _decoded(raw: bytes, *, first: bool) -> str | None:
    try:
        return raw.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError:
        return None


def _looks_like_json(text: str) -> bool:
    try:
        return isinstance(json.loads(text), str | dict | list)
    except (ValueError, RecursionError):
        return text.lstrip().startswith("{") or text.strip() in {"[", "[{"}


def _of_json(line: int, text: str) -> Entry | Invalid:
    try:
        item = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as exc:
        return Invalid(line, f"it is not JSON: {printable(str(exc), 120)}")
    return _entry(line, item)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _entry(line: int, item: object) -> Entry | Invalid:
    try:
        return _checked(line, item)
    except _BadLineError as exc:
        return Invalid(line, str(exc))
    except RequestValidationError as exc:
        return Invalid(line, exc.problem + (_UNCHECKED if exc.way_past == "validate" else ""))


def _checked(line: int, item: object) -> Entry:
    user_id: str | None = None
    metadata: dict[str, Any] = {}
    asked: object = item
    if isinstance(item, Mapping):
        for name, value in item.items():
            _check_depth(value, name, _DEEPEST - 1)
        user_id = _user_id(item.get("id"))
        names = _IMAGE_FIELDS if "prompt" in item or not set(item) >= _RAW_FIELDS else _RAW_FIELDS
        asked = {name: value for name, value in item.items() if name in names}
        metadata = {k: v for k, v in item.items() if k not in names and k != "id"}
    elif not isinstance(item, str | ImageRequest | RawRequest):
        raise _BadLineError(f"{shown(item)} is neither a prompt nor an object")
    request = as_request(asked)
    prompt = request.prompt if isinstance(request, ImageRequest) else None
    if prompt is not None and (found := _NO_PROMPT.search(prompt)) is not None:
        raise _BadLineError(
            f"character {found.start() + 1} of the prompt is the control character "
            f"U+{ord(found[0]):04X}; remove it"
        )
    return Entry(
        line=line,
        user_id=user_id,
        digest=_digest(request),
        request=json.dumps(request.to_json()),
        metadata=_dumped(metadata) if metadata else None,
        model=request.model,
        pictures=_pictures(request),
    )


def _check_depth(value: object, name: object, levels: int) -> None:
    """Refuse what is nested too deeply, or holds itself."""
    if not isinstance(value, Mapping | list | tuple):
        return
    if levels == 0:
        raise _BadLineError(
            f"{shown(name)} is nested deeper than {_DEEPEST} levels; at most {_DEEPEST} are kept"
        )
    for each in value.values() if isinstance(value, Mapping) else value:
        _check_depth(each, name, levels - 1)


def _user_id(value: object) -> str | None:
    if value is None:
        return None
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not 0 < len(text) <= _ID_LIMIT or not text.isprintable():
        raise _BadLineError(
            f"id={shown(value)} is not allowed: a text of 1 to {_ID_LIMIT} printable "
            "characters, or a whole number"
        )
    return text


def _dumped(metadata: Mapping[str, Any]) -> str:
    try:
        return json.dumps(metadata, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as exc:
        raise _BadLineError(f"metadata: JSON values only ({printable(str(exc), 100)})") from exc


def _digest(request: ImageRequest | RawRequest) -> str:
    """Equal for requests that ask the API for the same, however they are written."""
    body = json.dumps([request.path, request.body()], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(body.encode()).hexdigest()


def _pictures(request: ImageRequest | RawRequest) -> int:
    n = request.body().get("n")
    return n if isinstance(n, int) and not isinstance(n, bool) and 1 <= n <= 1000 else 1
