"""The account's recent tasks, page by page: `Session.list`."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any, Final

from evolink_async._checks import whole
from evolink_async._http.protocol import TASKS_PATH
from evolink_async._model.snapshots import TaskSummary
from evolink_async.errors import InvalidResponseError

__all__ = ["list_tasks"]

logger = logging.getLogger(__name__)

_PAGE_SIZE: Final = 50


async def list_tasks(
    get: Callable[[str, Mapping[str, str]], Awaitable[Any]],
    filters: Mapping[str, str | None],
    limit: int | None,
) -> AsyncGenerator[TaskSummary, None]:
    """Implements `Session.list`; *get* sends one request."""
    if limit is not None:
        whole("limit", limit)
    given = {name: value for name, value in filters.items() if value is not None}
    seen: set[str] = set()
    page = walked = 0
    while limit is None or len(seen) < limit:
        page += 1
        paging = {"page": str(page), "page_size": str(_PAGE_SIZE)}
        rows, count, total = _read_page(await get(TASKS_PATH, given | paging))
        fresh = [row for row in rows if row.id not in seen]  # new tasks shift the pages
        for row in fresh[: None if limit is None else limit - len(seen)]:
            seen.add(row.id)
            yield row
        walked += count
        if not count or walked >= total:
            return


def _read_page(answer: Any) -> tuple[list[TaskSummary], int, int]:
    """The tasks of one page, how many rows it has, and how many there are in all."""
    data = answer.get("data") if isinstance(answer, dict) else None
    if not isinstance(data, list):
        raise InvalidResponseError("the task list has no list named data")
    total = answer.get("total")
    rows = []
    for row in data:
        try:
            rows.append(TaskSummary.from_json(row))
        except InvalidResponseError as exc:  # the other rows are still of use
            logger.warning("a row of the task list was left out: %s", exc)
    return rows, len(data), total if isinstance(total, int) else 10**9
