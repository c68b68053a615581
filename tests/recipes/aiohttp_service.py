"""An image service in aiohttp.web; ``images.py`` beside it says what it needs."""

from __future__ import annotations

import os
from contextlib import aclosing, suppress
from typing import Any

from aiohttp import web
from images import Images

from evolink_async import EvolinkError, RequestValidationError

images = Images()
routes = web.RouteTableDef()


@routes.post("/tasks")
async def submit(request: web.Request) -> web.Response:
    try:
        return web.json_response({"id": await images.submit(await prompt(request))}, status=202)
    except RequestValidationError as error:
        raise web.HTTPUnprocessableEntity(text=str(error)) from error
    except EvolinkError as error:
        raise web.HTTPServiceUnavailable(text=str(error)) from error


async def prompt(request: web.Request) -> str:
    """Only a string: a mapping would be fields of the request, its size and model too."""
    with suppress(ValueError, RecursionError):
        match await request.json():
            case {"prompt": str(text)}:
                return text
    raise web.HTTPUnprocessableEntity(text='send JSON such as {"prompt": "A lake"}')


def find(request: web.Request) -> dict[str, Any]:
    if (found := images.find(request.match_info["task_id"])) is None:
        raise web.HTTPNotFound
    return found


@routes.get("/tasks/{task_id}")
async def show(request: web.Request) -> web.Response:
    return web.json_response(find(request))


@routes.get("/tasks/{task_id}/events")
async def events(request: web.Request) -> web.StreamResponse:
    task_id = find(request)["id"]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    with suppress(ConnectionError):  # the client has gone
        async with aclosing(images.events(task_id)) as news:
            async for line in news:
                await response.write(line.encode())
    return response


async def start(_: web.Application) -> None:
    await images.resume()


async def stop(_: web.Application) -> None:
    await images.aclose()


if __name__ == "__main__":
    app = web.Application()
    app.add_routes(routes)
    app.router.add_route("*", "/hooks/evolink/{token}", images.receiver.aiohttp_handler)
    app.on_startup.append(start)
    app.on_shutdown.append(stop)  # before open streams are waited for: they end with the session
    web.run_app(
        app,
        host="127.0.0.1",
        port=int(os.environ.get("PORT", "8000")),
        access_log=None,  # it would hold the paths of callbacks, which are secret
    )
