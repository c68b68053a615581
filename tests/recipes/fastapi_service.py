"""An image service in FastAPI: one session, callbacks, progress by server-sent events.

Needs ``EVOLINK_API_KEY``; ``PUBLIC_URL``, the https address the service is reached at;
``CALLBACK_SECRET``, kept over restarts; and ``STORE``, an SQLite file. ``PORT`` if not 8000.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Annotated

import uvicorn
from fastapi import Body, FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from evolink_async import EvolinkError, RequestValidationError, Session, SessionClosedError, Task
from evolink_async.webhook import CallbackReceiver


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Open the session, pick up what the last run left, and close when the server stops."""
    store.execute("CREATE TABLE IF NOT EXISTS tasks (id PRIMARY KEY, state, urls)")
    async with Session() as app.state.session:
        receiver = CallbackReceiver(
            app.state.session,
            public_url=os.environ["PUBLIC_URL"] + "/hooks/evolink",
            secret=os.environ["CALLBACK_SECRET"],
        )
        app.mount("/hooks/evolink", receiver.asgi)
        for (task_id,) in store.execute("SELECT id FROM tasks WHERE state = 'running'").fetchall():
            follow(app.state.session.task(task_id))
        yield
    await asyncio.gather(*followers)  # they end with the session


store = sqlite3.connect(os.environ["STORE"])
followers: set[asyncio.Task[None]] = set()
app = FastAPI(lifespan=lifespan)


def save(task_id: str, state: str, urls: tuple[str, ...] = ()) -> None:
    with store:
        store.execute("REPLACE INTO tasks VALUES (?, ?, ?)", (task_id, state, json.dumps(urls)))


def follow(task: Task) -> None:
    """Write the task's outcome down, whoever else waits for it."""
    follower = asyncio.create_task(outcome(task))
    followers.add(follower)
    follower.add_done_callback(followers.discard)


async def outcome(task: Task) -> None:
    try:
        result = await task
    except SessionClosedError:
        pass  # it is still running: the next start picks it up
    except EvolinkError as error:
        save(task.id, str(error))
    else:
        save(task.id, "completed", result.urls)


@app.post("/tasks", status_code=202)
async def submit(prompt: Annotated[str, Body(embed=True)]) -> dict[str, str]:
    try:
        task = await app.state.session.submit(prompt)
    except RequestValidationError as error:
        raise HTTPException(422, str(error)) from error
    except EvolinkError as error:
        raise HTTPException(503, str(error)) from error
    save(task.id, "running")
    follow(task)
    return {"id": task.id}


@app.get("/tasks/{task_id}")
async def show(task_id: str) -> dict[str, object]:
    found = store.execute("SELECT state, urls FROM tasks WHERE id = ?", (task_id,)).fetchone()
    if found is None:
        raise HTTPException(404)
    return {"id": task_id, "state": found[0], "urls": json.loads(found[1])}


@app.get("/tasks/{task_id}/events")
async def events(task_id: str) -> StreamingResponse:
    await show(task_id)
    return StreamingResponse(
        stream(app.state.session.task(task_id)), media_type="text/event-stream"
    )


async def stream(task: Task) -> AsyncIterator[str]:
    """Each change as an event; who leaves stops the stream, not the task."""
    looker = asyncio.create_task(look(task))
    try:
        async with aclosing(task.updates()) as updates:
            async for snapshot in updates:
                news = {"status": snapshot.status, "progress": snapshot.progress}
                yield f"data: {json.dumps(news)}\n\n"
    except EvolinkError as error:
        yield f"event: error\ndata: {json.dumps(str(error))}\n\n"
    finally:
        looker.cancel()


async def look(task: Task) -> None:
    """Callbacks tell of the end, not of progress: look while somebody is watching."""
    while not task.done():
        await asyncio.sleep(3)
        with suppress(EvolinkError):
            await task.refresh()


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    # Streams of running tasks would keep the server from stopping.
    uvicorn.run(app, port=port, timeout_graceful_shutdown=1)
