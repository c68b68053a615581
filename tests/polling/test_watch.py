"""Groups of tasks that are polled at together: each task's newest answer, and no other's."""

from __future__ import annotations

import json

import pytest

from evolink_async import PollPolicy
from evolink_async._http.protocol import read_tasks
from evolink_async._model.snapshots import Page
from evolink_async._polling.policy import Backoff
from evolink_async._polling.watch import Cohort, DueQueue, Group, Watch

IDS = ("task-0001", "task-0002", "task-0003", "task-0004")


def page(progress: int) -> Page:
    """An answer that all of `IDS` go on."""
    tasks = [{"id": task_id, "status": "processing", "progress": progress} for task_id in IDS]
    found, others = read_tasks(json.dumps({"data": tasks}).encode(), IDS)
    assert found is not None
    assert not others
    return found


def make(*ids: str, polled: float = 0.0) -> Group:
    """A group of a cohort of its own."""
    group = Group(Cohort(Backoff(PollPolicy()), 0.0, 3600.0), polled)
    for task_id in ids:
        group.watches.append(Watch(task_id, started=0.0, deadline=3600.0, group=group))
    group.cohort.unread = group
    return group


def progress(watch: Watch) -> int | None:
    assert watch.snapshot is not None
    return watch.snapshot.progress


def test_a_snapshot_is_the_newest_answer() -> None:
    """Also of a task that was polled at in between, which had its own until then."""
    group = make(*IDS[:2])
    first, second = group.watches
    assert first.snapshot is None
    for told in (10, 20, 30):
        group.saw(page(told), float(told))
        assert progress(first) == told
        assert first.snapshot is first.snapshot
    assert progress(second) == 30
    assert (group.polled, group.polls) == (30.0, 3)


def test_groups_that_join_are_told_together() -> None:
    """Whichever of them had a snapshot of its own."""
    group, other = make(*IDS[:2]), make(*IDS[2:])
    late = other.watches[0]
    group.saw(page(10), 1.0)
    other.saw(page(20), 1.0)
    assert progress(late) == 20
    group.join(other)
    assert other.watches == []
    assert [watch.id for watch in group.watches] == list(IDS)
    group.saw(page(30), 2.0)
    assert [progress(watch) for watch in group.watches] == [30] * 4


def test_groups_that_split_are_told_apart() -> None:
    """Those that fit no more into a read keep what the last one said of them."""
    group = make(*IDS)
    group.saw(page(10), 1.0)
    watches = list(group.watches)
    assert progress(watches[3]) == 10
    rest = group.split(1)
    assert (rest.polled, rest.polls, rest.plain) == (1.0, 1, True)
    assert progress(watches[1]) == 10
    rest.saw(page(20), 2.0)
    assert [progress(watch) for watch in watches] == [10, 20, 20, 20]
    group.saw(page(30), 3.0)
    assert [progress(watch) for watch in watches] == [30, 20, 20, 20]


@pytest.mark.parametrize("looked_at", [False, True])
def test_who_leaves_takes_its_answer_along(*, looked_at: bool) -> None:
    """And the others are told on without it."""
    group = make(*IDS[:3])
    group.saw(page(10), 1.0)
    leaver = group.watches[1]
    if looked_at:
        assert progress(leaver) == 10
    own = leaver.leave()
    assert own is leaver.group is not group
    assert own.watches == [leaver]
    assert group.cohort.unread is None
    assert [watch.id for watch in group.watches] == [IDS[0], IDS[2]]
    group.saw(page(20), 2.0)
    assert progress(leaver) == 10
    own.saw(page(30), 3.0)
    assert progress(leaver) == 30
    assert [progress(watch) for watch in group.watches] == [20, 20]


def test_who_ends_is_kept_by_nobody() -> None:
    """An ended task, which a user may hold for long, holds none of the others."""
    group = make(*IDS[:2])
    first, second = group.watches
    first.end()
    assert first.ended
    assert first.group.watches == []
    assert group.watches == [second]
    second.end()
    assert group.watches == []


def test_a_group_is_due_once() -> None:
    """Queued anew it is due then only, emptied never."""
    queue = DueQueue()
    early, late = make(IDS[0]), make(IDS[1])
    queue.push(late, 2.0)
    queue.push(early, 1.0)
    queue.push(early, 3.0)
    assert queue.first() is late
    assert list(queue) in ([early, late], [late, early])
    late.watches[0].end()
    assert queue.first() is early
    queue.compact()
    assert len(queue) == 1
    assert queue.pop() is early
    assert queue.first() is None
