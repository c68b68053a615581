"""The files behind the result links."""

from __future__ import annotations

import asyncio
import importlib
import io
import math
import wave
from collections import OrderedDict

from aiohttp import web

from evolink_async.emulator._png import tiny_picture
from evolink_async.emulator._tasks import RESULT_LIFETIME, GenerationTask

__all__ = ["Results"]

_CACHED = 32
"""Files that are kept."""
_CONTENT_TYPES = {"image": "image/png", "audio": "audio/wav", "video": "video/mp4"}
_EMPTY_VIDEO = b"\0\0\0\x1cftypisom\0\0\2\0isomiso2mp41\0\0\0\x08mdat"
"""An MP4 container without a track: enough to be recognised, nothing to watch."""
_REFUSAL = (
    '<?xml version="1.0" encoding="UTF-8"?>\n'
    "<Error><Code>{code}</Code><Message>{message}</Message></Error>"
)


class Results:
    """Makes the results when they are requested, and keeps the last few.

    Args:
        pictures: ``full`` or ``tiny``.
    """

    def __init__(self, pictures: str) -> None:
        self._pictures = pictures
        self._cache: OrderedDict[str, bytes] = OrderedDict()

    async def answer(self, path: str, task: GenerationTask | None, now: float) -> web.Response:
        """The answer to a GET of *path*, as an object store gives it: errors are XML."""
        paths = task.result_paths() if task is not None else ()
        if task is None or path not in paths or task.timeline.status_at(now) != "completed":
            return _refusal(404, "NoSuchKey", "The specified key does not exist.")
        if now > task.timeline.ends_at + RESULT_LIFETIME:
            return _refusal(403, "AccessDenied", "Request has expired")
        body = await self._file(path, task, paths.index(path) + 1)
        task.delivered += 1
        return web.Response(body=body, content_type=_CONTENT_TYPES[task.submission.type])

    async def _file(self, path: str, task: GenerationTask, number: int) -> bytes:
        body = self._cache.get(path)
        if body is None:
            body = self._cache[path] = await self._make(task, number)
            if len(self._cache) > _CACHED:
                self._cache.popitem(last=False)
        return body

    async def _make(self, task: GenerationTask, number: int) -> bytes:
        order = task.submission
        if order.type == "audio":
            return _sound(number)
        if order.type == "video":
            return _EMPTY_VIDEO
        if self._pictures == "tiny":
            return tiny_picture(order.prompt, order.size, number)
        draw = importlib.import_module("evolink_async.emulator._pictures").draw_picture
        body: bytes = await asyncio.to_thread(draw, order.prompt, order.size, number)
        return body


def _refusal(status: int, code: str, message: str) -> web.Response:
    text = _REFUSAL.format(code=code, message=message)
    return web.Response(text=text, status=status, content_type="application/xml")


def _sound(number: int) -> bytes:
    """A quarter of a second of a sine tone, higher with each *number*."""
    rate, frequency = 8000, 440 * 2 ** (number / 12)
    pace = 2 * math.pi * frequency / rate
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as sound:
        sound.setparams((1, 1, rate, 0, "NONE", ""))
        sound.writeframes(bytes(128 + int(60 * math.sin(pace * n)) for n in range(rate // 4)))
    return buffer.getvalue()
