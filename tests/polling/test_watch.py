"""The queue of watches: each is due once, and what no longer counts is dropped."""

from __future__ import annotations

import gc
import weakref

from evolink_async import PollPolicy, ServerError
from evolink_async._polling.failures import Failures
from evolink_async._polling.policy import Backoff
from evolink_async._polling.watch import IN_FLIGHT, DueQueue, Kind, Watch

SCHEDULE = Backoff(PollPolicy())


def make(task_id: str) -> Watch:
    return Watch(task_id, started=0.0, kind=Kind.POLLED, schedule=SCHEDULE)


def test_a_watch_is_due_once() -> None:
    """Pushed anew it is due only then, whichever way it was moved."""
    queue = DueQueue()
    early, late = make("task-0001"), make("task-0002")
    queue.push(late, 2.0)
    queue.push(early, 1.0)
    queue.push(early, 3.0)
    assert queue.first() is late
    assert queue.pop() is late
    assert late.due == IN_FLIGHT
    queue.push(early, 0.5)
    assert queue.first_due() == 0.5
    assert queue.pop() is early
    assert queue.first() is None


def test_watches_polled_singly_have_a_queue_of_their_own() -> None:
    """They are not in the way of those that share a poll."""
    queue = DueQueue()
    alone, shared = make("task-0001"), make("task-0002")
    alone.failures = Failures(error=ServerError("down", status=500), single=True)
    queue.push(alone, 1.0)
    queue.push(shared, 2.0)
    assert queue.first() is shared
    assert queue.pop(single=True) is alone
    assert queue.first(single=True) is None


def test_entries_that_no_longer_count_are_dropped() -> None:
    """Watches that are moved to an earlier time and end do not stay in memory."""
    queue = DueQueue()
    ghosts = []
    for k in range(1000):
        watch = make(f"task-{k:04}")
        queue.push(watch, 1e6)
        queue.push(watch, float(k))
        queue.pop()
        ghosts.append(weakref.ref(watch))
    del watch
    gc.collect()
    assert len(queue) <= 65
    assert sum(ghost() is not None for ghost in ghosts) <= 65
