"""What an image service does in any web framework: one session, callbacks, tasks in a store.

Needs ``EVOLINK_API_KEY``; ``PUBLIC_URL``, the https address the service is reached at;
``CALLBACK_SECRET``, kept over restarts; and ``STORE``, an SQLite file. ``PORT`` if not 8000;
``POLL_INTERVAL``, seconds between two polls of a task somebody watches, if not 3.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sqlite3
from collections.abc import AsyncGenerator, Coroutine
from contextlib import suppress
from typing import Any, TypeVar

from evolink_async import (
    EvolinkError,
    Session,
    SessionClosedError,
    SubmitUncertainError,
    Task,
    TaskTimeoutError,
)
from evolink_async.webhook import CallbackReceiver

POLL_INTERVAL = float(os.environ.get("POLL_INTERVAL", "3"))
T = TypeVar("T")
logger = logging.getLogger(__name__)


def setting(name: str) -> str:
    if not (value := os.environ.get(name)):
        raise SystemExit(f"set {name} in the environment: images.py says at its top what it is")
    return value


class Images:
    def __init__(self) -> None:
        secret, public_url = setting("CALLBACK_SECRET"), setting("PUBLIC_URL")
        self.session = Session()
        self.receiver = CallbackReceiver(
            self.session, public_url=f"{public_url}/hooks/evolink", secret=secret
        )
        self._store = sqlite3.connect(setting("STORE"))
        self._store.execute("CREATE TABLE IF NOT EXISTS tasks (id PRIMARY KEY, state, urls)")
        self._jobs: set[asyncio.Task[Any]] = set()
        self._viewers: dict[str, list[object]] = {}

    async def resume(self) -> None:
        """Watch the tasks that were running when the service stopped."""
        running = self._store.execute("SELECT id FROM tasks WHERE state = 'running'")
        for (task_id,) in running.fetchall():
            self._start(self._follow(self.session.task(task_id)))

    async def aclose(self) -> None:
        """Close the session: submits in flight are answered, and waiting requests end."""
        await self.session.aclose()
        while self._jobs:
            await asyncio.wait(self._jobs)

    async def submit(self, prompt: str) -> str:
        """The id of a new task, which is stored even if the client disconnects meanwhile."""
        return await asyncio.shield(self._start(self._submit(prompt)))

    async def _submit(self, prompt: str) -> str:
        try:
            task = await self.session.submit(prompt)
        except SubmitUncertainError:
            logger.exception("perhaps paid for")  # it holds the idempotency key to ask again with
            raise
        self._save(task.id, "running")
        self._start(self._follow(task))
        return task.id

    async def _follow(self, task: Task) -> None:
        """Store the outcome of the task."""
        try:
            result = await task
        except SessionClosedError:
            pass  # it is still running: the next start picks it up
        except EvolinkError as error:
            self._save(task.id, str(error))
        else:
            self._save(task.id, "completed", result.urls)

    def _start(self, job: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        """Run *job* apart from the request, which may be cancelled."""
        task = asyncio.create_task(job)
        self._jobs.add(task)
        task.add_done_callback(self._jobs.discard)
        return task

    def _save(self, task_id: str, state: str, urls: tuple[str, ...] = ()) -> None:
        with self._store:
            row = (task_id, state, json.dumps(urls))
            self._store.execute("REPLACE INTO tasks VALUES (?, ?, ?)", row)

    def find(self, task_id: str) -> dict[str, Any] | None:
        found = self._store.execute("SELECT state, urls FROM tasks WHERE id = ?", (task_id,))
        row = found.fetchone()
        return row and {"id": task_id, "state": row[0], "urls": json.loads(row[1])}

    async def events(self, task_id: str) -> AsyncGenerator[str, None]:
        """Each change as a server-sent event; a client that disconnects does not stop the task.

        Callbacks report the end, not progress, so the first viewer polls for all of them. Only
        a write shows whether a viewer is still connected, so there is one after each wait.
        """
        found = self.find(task_id)
        if found is not None and found["state"] != "running":
            yield event(found["state"], None)
            return
        task, me, last = self.session.task(task_id), object(), ""
        viewers = self._viewers.setdefault(task_id, [])
        viewers.append(me)
        try:
            while not task.done():
                news = event(task.status, task.progress)
                yield news if news != last else ": ping\n\n"
                last = news
                with suppress(TaskTimeoutError):
                    await task.wait(timeout=POLL_INTERVAL)
                if viewers[0] is me and not task.done():
                    with suppress(EvolinkError):  # the next poll may succeed
                        await task.refresh()
        except EvolinkError:
            pass  # the task failed or the service stops: the last event says which
        finally:
            viewers.remove(me)
            if not viewers:
                del self._viewers[task_id]
        yield event(task.status, task.progress)


def event(status: str | None, progress: int | None) -> str:
    return f"data: {json.dumps({'status': status, 'progress': progress})}\n\n"
