"""The type of a file, and whether it is complete, judged by its bytes."""

from __future__ import annotations

import os
import re
from typing import IO, Final

__all__ = ["EXTENSIONS", "is_whole", "media_type"]

_SIGNATURES: Final = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png"),
    (re.compile(rb"\xff\xd8\xff"), "jpg"),
    (re.compile(rb"RIFF.{4}WEBP", re.DOTALL), "webp"),
    (re.compile(rb"RIFF.{4}WAVE", re.DOTALL), "wav"),
    (re.compile(rb"GIF8[79]a"), "gif"),
    # Many texts begin with "BM", so the size of the second header must be a known one too.
    (re.compile(rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", re.DOTALL), "bmp"),
    (re.compile(rb"II\*\0|MM\0\*"), "tiff"),
    (re.compile(rb".{4}ftypavi[fs]|.{4}ftypm[is]f1.{0,40}avif", re.DOTALL), "avif"),
    (re.compile(rb".{4}ftyp(?:hei|hev|mif1|msf1)", re.DOTALL), "heic"),
    (re.compile(rb".{4}ftypM4[AB] ", re.DOTALL), "m4a"),
    (re.compile(rb".{4}ftypqt  ", re.DOTALL), "mov"),
    (re.compile(rb"\0\0\0.ftyp[A-Za-z0-9][A-Za-z0-9 ]{3}", re.DOTALL), "mp4"),
    (re.compile(rb"\x1a\x45\xdf\xa3.{0,40}webm", re.DOTALL), "webm"),
    (re.compile(rb"\x1a\x45\xdf\xa3.{0,40}matroska", re.DOTALL), "mkv"),
    (re.compile(rb"OggS\0"), "ogg"),
    (re.compile(rb"fLaC"), "flac"),
    (re.compile(rb"ID3[\x02-\x04]|\xff[\xe2\xe3\xf2\xf3\xfa\xfb][^\xf0-\xff]", re.DOTALL), "mp3"),
)


EXTENSIONS: Final = tuple(dict.fromkeys(extension for _, extension in _SIGNATURES))


def media_type(head: bytes) -> str | None:
    """The extension for a file that begins with *head* (64 bytes suffice), None if unknown."""
    return next((ext for signature, ext in _SIGNATURES if signature.match(head)), None)


def is_whole(file: IO[bytes], extension: str, head: bytes) -> bool:
    """False if the end of a file of that type is missing; bytes after its end are allowed."""
    size = file.seek(0, os.SEEK_END)
    if extension == "webp":
        return size >= int.from_bytes(head[4:8], "little") + 8
    file.seek(max(0, size - 64 * 1024))
    tail = file.read()
    if extension == "gif":
        return tail.rstrip(b"\0").endswith(b";")
    return {"png": b"IEND\xaeB`\x82", "jpg": b"\xff\xd9"}.get(extension, b"") in tail
