"""The smallest true picture: one flat colour, without any imaging library."""

from __future__ import annotations

import hashlib
import struct
import zlib

__all__ = ["tiny_picture"]


def tiny_picture(prompt: str, size: tuple[int, int], variant: int) -> bytes:
    """A valid PNG of exactly *size* in one flat colour, chosen by *prompt* and *variant*.

    A palette of one colour at one bit per pixel keeps 1440x1440 pixels under 2 kB.
    """
    width, height = size
    seed = f"{variant}:{prompt}".encode("utf-8", "surrogatepass")
    colour = hashlib.sha256(seed).digest()[:3]
    rows = (b"\0" + bytes(-(-width // 8))) * height
    return b"".join(
        (
            b"\x89PNG\r\n\x1a\n",
            _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 3, 0, 0, 0)),
            _chunk(b"PLTE", colour),
            _chunk(b"IDAT", zlib.compress(rows, 9)),
            _chunk(b"IEND", b""),
        )
    )


def _chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
