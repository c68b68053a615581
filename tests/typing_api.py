"""A user's file that uses every public name, with the types a user may rely on.

Never run, only type-checked: what breaks it breaks somebody's program.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, assert_type

import aiohttp

import evolink_async
from evolink_async import (
    APIConnectionError,
    APIStatusError,
    APITimeoutError,
    AuthenticationError,
    Clock,
    ConfigurationError,
    Credits,
    DownloadError,
    EvolinkError,
    GenerationResult,
    ImageRequest,
    InsufficientCreditsError,
    InvalidRequestError,
    InvalidResponseError,
    LedgerError,
    NotFoundError,
    Outcome,
    PermissionDeniedError,
    PollPolicy,
    RateLimitError,
    RawRequest,
    RequestTooLargeError,
    RequestValidationError,
    RetryPolicy,
    ServerError,
    Session,
    SessionClosedError,
    Stats,
    SubmitUncertainError,
    Task,
    TaskCancelledError,
    TaskError,
    TaskFailedError,
    TaskSnapshot,
    TaskSummary,
    TaskTimeoutError,
    Timeout,
    Usage,
    errors,
)

version: str = evolink_async.__version__
base: type[EvolinkError] = errors.EvolinkError


class OwnClock:
    """A clock of the user's own needs nothing from this package."""

    def now(self) -> float:
        return 0.0

    async def sleep_until(self, when: float) -> None:
        await asyncio.sleep(when)

    def hold(self) -> AbstractContextManager[None]:
        return nullcontext()


clock: Clock = OwnClock()


async def first_use() -> None:
    async with Session() as session:
        assert_type(session, Session)
        result = await session.generate("A serene lake", size="1280x1280", n=2)
        assert_type(result, GenerationResult)
        paths = await session.download(result, "out/")
        assert_type(paths, tuple[Path, ...])
        task = await session.submit("A peaceful lake")
        assert_type(task, Task)
        async for snapshot in task.updates():
            assert_type(snapshot, TaskSnapshot)
        assert_type(await task, GenerationResult)
        assert_type(session.task("task-unified-1"), Task)


def settings(http: aiohttp.ClientSession) -> Session:
    return Session(
        "key",
        base_url="https://api.evolink.ai",
        max_in_flight=32,
        max_connections=16,
        max_requests_per_second=5.5,
        poll=PollPolicy(min_interval=0.25, max_interval=60, deadline=None),
        retry=RetryPolicy(
            attempts=8,
            timeout=600,
            wait_initial=0.5,
            wait_max=30,
            wait_jitter=0.5,
            wait_exp_base=2,
            budget=500,
            resend_uncertain=False,
        ),
        timeout=Timeout(connect=10, submit=60, read=30.5),
        http=http,
        callback="https://example.com/done",
        clock=clock,
    )


def requests() -> Sequence[ImageRequest | RawRequest | Mapping[str, Any] | str]:
    image = ImageRequest(
        "A lake",
        model="wan2.5-text-to-image",
        size="1280x1280",
        n=4,
        prompt_extend=False,
        callback_url="https://example.com/done",
        extra={"seed": 7},
        validate=True,
    )
    raw = RawRequest("/v1/videos/generations", body={"model": "m", "prompt": "p"})
    assert_type(image.prompt, str)
    assert_type(image.size, str | None)
    assert_type(image.n, int | None)
    assert_type(image.path, str)
    assert_type(raw.path, str)
    assert_type(image.body(), dict[str, Any])
    assert_type(raw.body(), dict[str, Any])
    assert_type(ImageRequest.from_json(image.to_json()), ImageRequest)
    assert_type(RawRequest.from_json(raw.to_json()), RawRequest)
    return [image, raw, {"prompt": "A lake"}, "A lake"]


async def before_send(idempotency_key: str) -> None:
    print(idempotency_key)  # noqa: T201 - never run


async def submitting(session: Session) -> None:
    for request in requests():
        task = await session.submit(
            request, idempotency_key="0123456789abcdef", before_send=before_send
        )
        await session.generate(request, idempotency_key=None, before_send=None)
        await task


async def prompts() -> AsyncIterator[str]:
    yield "A lake"


async def many(session: Session) -> None:
    for source in (["A lake"], ("A lake",), requests()):
        async for outcome in session.map(source):
            assert_type(outcome, Outcome)
    async for outcome in session.map(prompts()):
        assert_type(outcome.index, int)
        assert_type(outcome.task, Task | None)
        assert_type(outcome.result, GenerationResult | None)
        assert_type(outcome.error, EvolinkError | None)
        print(outcome.request)  # noqa: T201 - never run


async def tasks(session: Session) -> None:
    assert_type(session.tasks, tuple[Task, ...])
    async for row in session.list(status="completed", type="image", model="m", limit=5):
        assert_type(row, TaskSummary)
        assert_type((row.id, row.status), tuple[str, str])
        assert_type((row.model, row.type), tuple[str | None, str | None])
        assert_type(row.created, float | None)
        assert_type(row.raw, Mapping[str, Any])
    left = await session.credits()
    assert_type(left, Credits)
    assert_type(left.remaining, float)
    assert_type(left.token_unlimited, bool)
    stats = session.stats
    assert_type(stats, Stats)
    assert_type(stats.running + stats.submits + stats.reads + stats.cool_downs, int)
    assert_type(stats.cooling_down, float)
    await session.aclose(grace=0)
    await session.aclose()


async def one_task(task: Task, session: Session) -> None:
    assert_type(task.id, str)
    assert_type(task.status, str | None)
    assert_type(task.progress, int | None)
    assert_type(task.snapshot, TaskSnapshot | None)
    assert_type(task.request, ImageRequest | RawRequest | None)
    assert_type(task.idempotency_key, str | None)
    assert_type(task.done(), bool)
    assert_type(await task.wait(timeout=5.5), GenerationResult)
    assert_type(await task.refresh(), TaskSnapshot)
    assert_type(await task.download(Path("out"), overwrite=True), tuple[Path, ...])
    assert_type(await session.download(task, Path("out"), overwrite=False), tuple[Path, ...])
    assert_type(await asyncio.gather(task, task), tuple[GenerationResult, GenerationResult])
    assert_type(await asyncio.wait_for(task, 5), GenerationResult)
    assert_type(await asyncio.create_task(task.wait()), GenerationResult)
    for first in asyncio.as_completed([task.wait(), task.wait()]):
        assert_type(await first, GenerationResult)


def values(snapshot: TaskSnapshot, result: GenerationResult) -> Usage:
    assert_type((snapshot.id, snapshot.status), tuple[str, str])
    assert_type(snapshot.progress, int | None)
    assert_type(snapshot.is_terminal, bool)
    assert_type((snapshot.model, snapshot.type), tuple[str | None, str | None])
    assert_type(snapshot.created, float | None)
    assert_type(snapshot.estimated_time, float | None)
    assert_type(snapshot.duration, float | None)
    assert_type(snapshot.urls, tuple[str, ...])
    assert_type((snapshot.error_code, snapshot.error_message), tuple[str | None, str | None])
    assert_type(snapshot.raw, dict[str, Any])
    assert_type(result.task_id, str)
    assert_type(result.urls, tuple[str, ...])
    assert_type(result.snapshot, TaskSnapshot)
    assert_type(result.model, str | None)
    assert_type(result.duration, float | None)
    usage = result.usage
    assert_type(usage.credits_reserved, float | None)
    assert_type(usage.credits_used, float | None)
    assert_type(usage.billing_rule, str | None)
    return usage


async def handling(session: Session) -> Task | None:
    try:
        await session.generate("A lake")
    except RequestValidationError as error:
        assert_type((error.field, error.allowed), tuple[str, str])
        assert_type(error.value, object)
    except (ConfigurationError, ValueError) as error:
        print(error)  # noqa: T201 - never run
    except SubmitUncertainError as error:
        return await session.submit(error.request, idempotency_key=error.idempotency_key)
    except TaskFailedError as error:
        assert_type((error.code, error.reason, error.retryable), tuple[str, str, bool])
    except TaskTimeoutError as error:
        timeout: TimeoutError = error
        print(timeout)  # noqa: T201 - never run
        return session.task(error.task_id)
    except (TaskCancelledError, TaskError) as error:
        assert_type(error.snapshot, TaskSnapshot | None)
    except (RateLimitError, ServerError) as error:
        assert_type(error.retry_after, float | None)
    except (AuthenticationError, InsufficientCreditsError, PermissionDeniedError) as error:
        assert_type(error.code, str | None)
    except (InvalidRequestError, NotFoundError, RequestTooLargeError) as error:
        assert_type((error.type, error.param), tuple[str | None, str | None])
    except APIStatusError as error:
        assert_type((error.status, error.request_id), tuple[int, str | None])
        assert_type((error.from_api, error.replayed), tuple[bool, bool])
        assert_type(error.suggestion, str | None)
    except (APITimeoutError, APIConnectionError) as error:
        assert_type(error.sent, bool)
    except InvalidResponseError as error:
        assert_type((error.status, error.head), tuple[int | None, str])
    except SessionClosedError as error:
        assert_type(error.task_id, str | None)
    except DownloadError as error:
        assert_type((error.url, error.path), tuple[str, Path | None])
        assert_type((error.status, error.expired), tuple[int | None, bool])
    except LedgerError as error:
        assert_type(error.path, Path)
    except EvolinkError as error:
        print(error)  # noqa: T201 - never run
    return None
