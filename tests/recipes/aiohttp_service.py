"""An image service in aiohttp.web: one session, callbacks, progress by server-sent events.

Needs ``EVOLINK_API_KEY``; ``PUBLIC_URL``, the https address the service is reached at;
``CALLBACK_SECRET``, kept over restarts; and ``STORE``, a JSON file. ``PORT`` if not 8000.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from aiohttp import web

from evolink_async import EvolinkError, RequestValidationError, Session, SessionClosedError, Task
from evolink_async.webhook import CallbackReceiver

STORE = Path(os.environ["STORE"])
SESSION = web.AppKey("SESSION", Session)
routes = web.RouteTableDef()
tasks: dict[str, dict[str, Any]] = {}
followers: set[asyncio.Task[None]] = set()


async def life(app: web.Application) -> AsyncIterator[None]:
    """Open the session and pick up what the last run left."""
    session = app[SESSION] = Session()
    receiver = CallbackReceiver(
        session,
        public_url=os.environ["PUBLIC_URL"] + "/hooks/evolink",
        secret=os.environ["CALLBACK_SECRET"],
    )
    app.router.add_route("*", "/hooks/evolink/{token}", receiver.aiohttp_handler)
    load()
    for task_id in [name for name, task in tasks.items() if task["state"] == "running"]:
        follow(session.task(task_id))
    yield


async def stop(app: web.Application) -> None:
    """Close the session first: the streams of running tasks end with it."""
    await app[SESSION].aclose()
    await asyncio.gather(*followers)


def load() -> None:
    if STORE.exists():
        tasks.update(json.loads(STORE.read_text("utf-8")))


def save(task_id: str, state: str, urls: tuple[str, ...] = ()) -> None:
    tasks[task_id] = {"id": task_id, "state": state, "urls": urls}
    new = STORE.with_suffix(".new")
    new.write_text(json.dumps(tasks), "utf-8")
    new.replace(STORE)


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


@routes.post("/tasks")
async def submit(request: web.Request) -> web.Response:
    try:
        task = await request.app[SESSION].submit((await request.json())["prompt"])
    except (RequestValidationError, ValueError, KeyError, TypeError) as error:
        raise web.HTTPUnprocessableEntity(text=str(error)) from error
    except EvolinkError as error:
        raise web.HTTPServiceUnavailable(text=str(error)) from error
    save(task.id, "running")
    follow(task)
    return web.json_response({"id": task.id}, status=202)


def find(request: web.Request) -> dict[str, Any]:
    try:
        return tasks[request.match_info["task_id"]]
    except KeyError:
        raise web.HTTPNotFound from None


@routes.get("/tasks/{task_id}")
async def show(request: web.Request) -> web.Response:
    return web.json_response(find(request))


@routes.get("/tasks/{task_id}/events")
async def events(request: web.Request) -> web.StreamResponse:
    """Each change as an event; who leaves stops the stream, not the task."""
    task = request.app[SESSION].task(find(request)["id"])
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    looker = asyncio.create_task(look(task))
    with suppress(ConnectionError):  # when nobody is watching any more
        try:
            async with aclosing(task.updates()) as updates:
                async for snapshot in updates:
                    news = {"status": snapshot.status, "progress": snapshot.progress}
                    await response.write(f"data: {json.dumps(news)}\n\n".encode())
        except EvolinkError as error:
            await response.write(f"event: error\ndata: {json.dumps(str(error))}\n\n".encode())
        finally:
            looker.cancel()
    return response


async def look(task: Task) -> None:
    """Callbacks tell of the end, not of progress: look while somebody is watching."""
    while not task.done():
        await asyncio.sleep(3)
        with suppress(EvolinkError):
            await task.refresh()


if __name__ == "__main__":
    app = web.Application()
    app.add_routes(routes)
    app.cleanup_ctx.append(life)
    app.on_shutdown.append(stop)
    web.run_app(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
