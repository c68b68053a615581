"""An image service in FastAPI; ``images.py`` beside it says what it needs."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from socket import socket
from typing import Annotated, Any

import uvicorn
from fastapi import Body, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from images import Images

from evolink_async import EvolinkError, RequestValidationError


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    await images.resume()
    yield
    await images.aclose()


images = Images()
app = FastAPI(lifespan=lifespan)
app.mount("/hooks/evolink", images.receiver.asgi)


@app.post("/tasks", status_code=202)
async def submit(prompt: Annotated[str, Body(embed=True)]) -> dict[str, str]:
    try:
        return {"id": await images.submit(prompt)}
    except RequestValidationError as error:
        raise HTTPException(422, str(error)) from error
    except EvolinkError as error:
        raise HTTPException(503, str(error)) from error


@app.get("/tasks/{task_id}")
async def show(task_id: str) -> dict[str, Any]:
    if (found := images.find(task_id)) is None:
        raise HTTPException(404)
    return found


@app.get("/tasks/{task_id}/events")
async def events(task_id: str) -> StreamingResponse:
    await show(task_id)
    return StreamingResponse(images.events(task_id), media_type="text/event-stream")


class Server(uvicorn.Server):
    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        """Close the session first: submits in flight are answered, and streams end."""
        await images.aclose()
        await super().shutdown(sockets)


if __name__ == "__main__":
    config = uvicorn.Config(
        app,
        port=int(os.environ.get("PORT", "8000")),
        access_log=False,  # it would hold the paths of callbacks, which are secret
        timeout_graceful_shutdown=5,  # for clients that do not read
    )
    Server(config).run()
