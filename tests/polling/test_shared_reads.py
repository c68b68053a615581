"""Many tasks, few reads: shared polls, their fallbacks, cool-downs, rate and push."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import Counter
from collections.abc import AsyncIterator
from itertools import pairwise
from typing import Any

import pytest
import tenacity
from hostile import HostileServer, Received, Wire, answer, error, http, snapshot

from evolink_async import (
    APIConnectionError,
    ConfigurationError,
    EvolinkError,
    InvalidResponseError,
    NotFoundError,
    PollPolicy,
    RetryPolicy,
    Session,
    Task,
    TaskSnapshot,
    TaskTimeoutError,
    Timeout,
)
from evolink_async._clock import LoopClock
from evolink_async._http.protocol import read_tasks
from evolink_async._polling.watcher import Watcher
from evolink_async.emulator import Emulator, ManualClock, faults


def connect(emulator: Emulator, **settings: Any) -> Session:
    settings.setdefault("clock", emulator.clock)
    return Session(emulator.api_key, base_url=emulator.base_url, **settings)


@pytest.fixture
async def many(clock: ManualClock) -> AsyncIterator[Emulator]:
    """An emulator for many tasks of about 25 s."""
    async with Emulator(
        clock=clock, duration=(15, 40), pictures="tiny", credits=100_000
    ) as emulator:
        yield emulator


async def test_many_tasks_share_reads(many: Emulator) -> None:
    """Five hundred tasks at once cost less than a read each, and are noticed within seconds."""
    async with connect(many, max_in_flight=500) as session:
        tasks = await asyncio.gather(*(session.submit(f"lake {i}") for i in range(500)))
        noticed = {}

        async def wait(task: Any) -> None:
            await task
            noticed[task.id] = many.clock.now()

        await asyncio.gather(*map(wait, tasks))
        assert session.stats.reads < 500
        assert session.stats.ids_read > 10 * session.stats.reads
        (kind,) = session.stats.typical
        assert kind == "/v1/images/generations wan2.5-text-to-image"
        assert 15 < session.stats.typical[kind] < 40
    delays = [noticed[record.id] - record.ends_at for record in many.books.tasks()]
    assert min(delays) >= 0
    assert sum(delays) / len(delays) < 1.0
    assert max(len(r.task_ids) for r in many.books.requests("batch")) == 50


async def test_reads_that_follow_each_other_closely_go_out_together(many: Emulator) -> None:
    """Where one request is not enough they go out in bursts; one at a time they keep their time."""
    async with connect(many, max_in_flight=1000) as session:
        await asyncio.gather(*(session.submit(f"lake {i}") for i in range(1000)))
        await asyncio.gather(*session.tasks)
    sent = Counter(record.time for record in many.books.requests("batch"))
    middle = sorted(sent)[len(sent) // 4 : -len(sent) // 4]
    assert sum(sent[time] for time in middle) > 3 * len(middle)
    assert min(b - a for a, b in pairwise(middle)) > 0.2


async def test_many_tasks_are_seen_as_they_are(many: Emulator) -> None:
    """Status and progress of tasks that go on are the server's, asked for or watched."""
    async with connect(many, max_in_flight=120) as session:
        tasks = await asyncio.gather(*(session.submit(f"lake {i}") for i in range(120)))
        seen = [snapshot async for snapshot in tasks[60].updates()]
        read = {i: record.time for record in many.books.reads() for i in record.task_ids}
        assert len(seen) > 5
        assert seen[-1].status == "completed"
        assert [s.progress for s in seen] == sorted(s.progress or 0 for s in seen)
        running = [task for task in tasks if not task.done()]
        assert len(running) > 10
        for task in running:
            record = many.books.task(task.id)
            part = (read[task.id] - record.accepted_at) / (record.ends_at - record.accepted_at)
            assert task.status == "processing"
            assert task.progress == pytest.approx(100 * part, abs=6)
            assert task.snapshot is not None
            assert task.snapshot.raw["progress"] == task.progress
        await asyncio.gather(*tasks)


async def test_polling_one_of_many_leaves_the_others(many: Emulator) -> None:
    """A task read out of turn is neither lost nor read twice with those it was submitted with."""
    async with connect(many, max_in_flight=200) as session:
        tasks = await asyncio.gather(*(session.submit(f"lake {i}") for i in range(200)))
        for task in tasks[::7]:
            await task.refresh()
        await asyncio.gather(*tasks)
    for record in many.books.reads():
        assert len(set(record.task_ids)) == len(record.task_ids)
    assert {record.status for record in many.books.tasks()} == {"completed"}


async def test_many_tasks_are_given_up_one_by_one(clock: ManualClock) -> None:
    """Each of many tasks is given up at its own deadline, and read until shortly before."""
    async with Emulator(
        clock=clock, duration=(900, 900), pictures="tiny", credits=1000
    ) as emulator:
        poll = PollPolicy(deadline=60)
        async with connect(emulator, max_in_flight=100, poll=poll) as session:
            tasks = await asyncio.gather(*(session.submit(f"lake {i}") for i in range(100)))
            failures = await asyncio.gather(*tasks, return_exceptions=True)
            assert all(isinstance(failure, TaskTimeoutError) for failure in failures)
            assert session.stats.running == 0
        assert clock.now() - emulator.books.tasks()[0].accepted_at == pytest.approx(60, abs=0.01)
        for record in emulator.books.tasks():
            assert 59.5 < emulator.books.reads(record.id)[-1].time - record.accepted_at < 60


async def test_one_task_alone_is_read_singly(many: Emulator) -> None:
    """There is nothing to share: the documented endpoint is enough."""
    async with connect(many) as session:
        await session.generate("A lake")
    assert many.books.requests("batch") == ()
    assert many.books.requests("read")


async def test_without_the_batch_endpoint(clock: ManualClock) -> None:
    """A server that does not have it is read singly for good, at the cost of lone tasks."""
    async with Emulator(
        clock=clock, duration=(15, 40), pictures="tiny", without=("batch",), credits=1000
    ) as emulator:
        async with connect(emulator, max_in_flight=100) as session:
            await asyncio.gather(*(session.generate(f"lake {i}") for i in range(100)))
            reads = len(emulator.books.requests("read"))
        # The simulated cost of one task alone is about five reads.
        assert reads < 800
        unknown = [r for r in emulator.books.requests() if r.path == "/v1/tasks/batch"]
        assert 1 <= len(unknown) <= 16
        assert len(emulator.books.tasks(status="completed")) == 100


@pytest.mark.parametrize("status", [400, 403, 413])
async def test_a_batch_endpoint_that_refuses_is_left_alone_for_a_while(
    many: Emulator, status: int
) -> None:
    """After another refusal tasks are read singly, and the endpoint is tried again later."""
    many.faults.add(faults.Status(status, route="batch", times=1))
    async with connect(many, max_in_flight=20) as session:
        await asyncio.gather(*(session.generate(f"lake {i}") for i in range(20)))
        assert len(many.books.requests("batch")) == 1
        await many.clock.sleep_until(many.clock.now() + 400)
        await asyncio.gather(*(session.generate(f"pond {i}") for i in range(20)))
        assert len(many.books.requests("batch")) > 1


async def test_nonsense_from_the_batch_endpoint_does_no_harm(many: Emulator) -> None:
    """A 200 that is no list of tasks means single reads."""
    many.faults.add(faults.Garbled("<html>", route="batch"))
    async with connect(many, max_in_flight=20) as session:
        await asyncio.gather(*(session.generate(f"lake {i}") for i in range(20)))
    assert len(many.books.tasks(status="completed")) == 20


async def test_order_duplicates_and_strangers_do_no_harm(clock: ManualClock) -> None:
    """A batch answer is read by id: another order, repeats and other tasks change nothing."""
    served = Counter[str]()

    async def shuffled(request: Received, wire: Wire) -> None:
        if request.method == "GET":
            ids = [request.path.rsplit("/", 1)[1]]
        else:
            ids = request.json["task_ids"]
        served.update(ids)
        tasks = [
            snapshot(id=i, status="completed" if served[i] > 3 else "processing")
            for i in reversed(ids)
        ]
        if request.method == "GET":
            await wire.send(http(200, json.dumps(tasks[0]).encode()))
            return
        strangers: list[Any] = [snapshot(id="task-of-a-stranger", status="failed"), None, 5, []]
        data = [*strangers, *tasks, *tasks]
        await wire.send(http(200, json.dumps({"more": 1, "data": data}).encode()))

    async with HostileServer(script=[], reads=[shuffled]) as server:
        server.script = [answer(200, snapshot(id=f"task-{i:04}")) for i in range(12)]
        server.script.append(answer(500, b""))
        async with Session("k" * 20, base_url=server.base_url, clock=clock) as session:
            tasks = [await session.submit(f"lake {i}") for i in range(12)]
            results = await asyncio.gather(*tasks)
    assert sorted(r.task_id for r in results) == [f"task-{i:04}" for i in range(12)]
    assert any(r.path == "/v1/tasks/batch" for r in server.received)


async def test_ids_missing_from_a_batch_answer_are_read_singly(clock: ManualClock) -> None:
    """Being left out of a batch answer proves nothing: the documented read decides."""
    reads = Counter[str]()
    hidden = "task-0003"

    async def leave_out(request: Received, wire: Wire) -> None:
        if request.method == "GET":
            task_id = request.path.rsplit("/", 1)[1]
            reads[task_id] += 1
            status = "completed" if reads[task_id] > 2 else "processing"
            await wire.send(http(200, json.dumps(snapshot(id=task_id, status=status)).encode()))
            return
        reads["batch"] += 1
        status = "completed" if reads["batch"] > 5 else "processing"
        data = [snapshot(id=i, status=status) for i in request.json["task_ids"] if i != hidden]
        await wire.send(http(200, json.dumps({"data": data}).encode()))

    async with HostileServer(reads=[leave_out]) as server:
        server.script = [answer(200, snapshot(id=f"task-{i:04}")) for i in range(6)]
        server.script.append(answer(500, b""))
        async with Session("k" * 20, base_url=server.base_url, clock=clock) as session:
            tasks = [await session.submit(f"lake {i}") for i in range(6)]
            await asyncio.gather(*tasks)
    assert reads[hidden] == 3
    asked = [r.json["task_ids"] for r in server.received if r.path == "/v1/tasks/batch"]
    # Four times before it is read singly, and once before each further single read.
    assert sum(hidden in ids for ids in asked) == 6


@pytest.mark.parametrize("spoil", ["500", "reset", "empty"])
async def test_a_batch_endpoint_that_fails_is_left_for_a_while(many: Emulator, spoil: str) -> None:
    """Where only batch reads fail, tasks are read singly, and the endpoint is tried again."""
    many.faults.add(
        {
            "500": faults.Status(500, route="batch", times=20),
            "reset": faults.Reset(route="batch", times=20),
            "empty": faults.Garbled('{"data": []}', route="batch", times=20),
        }[spoil]
    )
    poll = PollPolicy(deadline=600)
    async with connect(many, max_in_flight=60, poll=poll) as session:
        results = await asyncio.gather(*(session.generate(f"lake {i}") for i in range(60)))
        assert len(results) == 60
    routes = Counter(r.route for r in many.books.requests())
    assert routes["read"] >= 60
    assert routes["batch"] <= 8


async def test_a_batch_endpoint_that_fails_is_tried_by_one_read_now_and_then(
    clock: ManualClock,
) -> None:
    """After 30 s, after a minute more, then two; the tasks are read singly meanwhile."""
    async with Emulator(
        clock=clock, duration=(250, 260), pictures="tiny", credits=1000
    ) as emulator:
        emulator.faults.add(faults.Status(500, route="batch"))
        async with connect(
            emulator, max_in_flight=200, poll=PollPolicy(max_interval=10)
        ) as session:
            await asyncio.gather(*(session.generate(f"lake {i}") for i in range(200)))
        tries = [r.time for r in emulator.books.requests("batch")]
    first = [time for time in tries if time < tries[0] + 25]
    gaps = [b - a for a, b in pairwise([first[-1], *tries[len(first) :]])]
    assert len(first) <= 16
    assert [round(gap / 30) for gap in gaps] == [1, 2, 4]


@pytest.mark.parametrize("tasks", [2, 50, 300])
async def test_a_batch_endpoint_that_alone_asks_to_wait(many: Emulator, tasks: int) -> None:
    """Single reads take over before tasks are late for long, and go on."""
    many.faults.add(faults.Status(503, route="batch"))
    late: list[float] = []

    async def one(prompt: str) -> None:
        task = await session.submit(prompt)
        await task
        late.append(many.clock.now())

    async with connect(many, max_in_flight=tasks) as session:
        await asyncio.gather(*(one(f"lake {i}") for i in range(tasks)))
    ends = sorted(task.ends_at for task in many.books.tasks())
    assert sum(late) / tasks - sum(ends) / tasks < 40
    assert len(many.books.requests("batch")) <= 25


@pytest.mark.parametrize("retry_after", [60, 300])
@pytest.mark.parametrize("tasks", [2, 10, 300])
async def test_a_batch_endpoint_that_alone_asks_to_wait_long(
    many: Emulator, tasks: int, retry_after: int
) -> None:
    """Twice everybody waits as long as it asks for, no more."""
    many.faults.add(faults.Status(429, route="batch", retry_after=retry_after))
    async with connect(many, max_in_flight=tasks) as session:
        await asyncio.gather(*(session.generate(f"lake {i}") for i in range(tasks)))
        assert session.stats.cool_downs <= 2
    ends = max(task.ends_at for task in many.books.tasks())
    assert many.clock.now() - ends < 2.3 * retry_after


async def test_a_proxy_that_loses_its_way_once_is_not_the_batch_endpoint(many: Emulator) -> None:
    """A 404 that is not the API's says nothing of an endpoint that has worked."""
    many.faults.add(faults.Status(404, body="<html>no upstream</html>", route="batch", nth=5))
    async with connect(many, max_in_flight=100) as session:
        await asyncio.gather(*(session.generate(f"lake {i}") for i in range(100)))
        assert session._transport.read_limit == 50
    routes = Counter(r.route for r in many.books.requests())
    assert routes["batch"] > 20
    assert routes["read"] <= 20


async def test_a_refusal_is_not_cut_short_by_a_failure(many: Emulator) -> None:
    """A batch endpoint that refuses again after it was left alone is so for as long again."""
    async with connect(many, max_in_flight=4) as session:
        ids = tuple(task.id for task in [await session.submit(f"lake {i}") for i in range(4)])
        fetch, clock = session._transport.fetch, many.clock
        many.faults.add(faults.Status(403, route="batch"))
        await asyncio.gather(*(fetch(ids) for _ in range(4)))
        await fetch(ids[:1])
        await clock.sleep_until(clock.now() + 301)
        await fetch(ids)
        await clock.sleep_until(clock.now() + 200)
        assert session._transport.read_limit == 1
        await session.aclose()


async def test_an_outage_is_not_taken_for_the_batch_endpoint(many: Emulator) -> None:
    """When everything failed for a while, tasks go on to be read together afterwards."""
    async with connect(many, max_in_flight=300) as session:
        await asyncio.gather(*(session.submit(f"lake {i}") for i in range(300)))
        many.faults.add(faults.Outage(0, 20, status=502))
        await asyncio.gather(*session.tasks)
        assert session._transport.read_limit == 50
    routes = Counter(r.route for r in many.books.requests() if r.status == 200)
    assert routes["read"] <= 20, routes


async def test_a_replica_that_lags_costs_few_single_reads(clock: ManualClock) -> None:
    """Tasks left out right after their submit are asked for together once more."""
    async with Emulator(clock=clock, duration=(5, 8), pictures="tiny", credits=1000) as emulator:
        emulator.faults.add(faults.TaskLags(4))
        async with connect(emulator, max_in_flight=100) as session:
            await asyncio.gather(*(session.generate(f"lake {i}") for i in range(100)))
        routes = Counter(r.route for r in emulator.books.requests())
    assert routes["read"] <= 50, routes
    assert routes["batch"] <= 100, routes


async def test_an_unknown_id_among_many(many: Emulator) -> None:
    """An id the API does not know ends with NotFoundError, the others with their pictures."""
    async with connect(many, max_in_flight=10) as session:
        tasks = [await session.submit(f"lake {i}") for i in range(10)]
        waiter = asyncio.create_task(session.task("task-that-never-was").wait())
        await asyncio.gather(*tasks)
        with pytest.raises(NotFoundError):
            await waiter
    assert len(many.books.requests("read", task="task-that-never-was")) >= 2


@pytest.mark.parametrize("spoil", ["500", "reset", "garbled"])
async def test_a_task_that_spoils_batch_reads_among_many(many: Emulator, spoil: str) -> None:
    """It is told from the others soon and read singly, and they go on to be read together."""

    async def noticed(task: Task) -> float:
        await task
        return many.clock.now()

    async with connect(many, max_in_flight=500) as session:
        tasks = await asyncio.gather(*(session.submit(f"lake {i}") for i in range(500)))
        odd = tasks[0].id
        many.faults.add(
            {
                "500": faults.Status(500, route="batch", task=odd),
                "reset": faults.Reset("after", route="batch", task=odd),
                "garbled": faults.Garbled("garbage", route="batch", task=odd),
            }[spoil]
        )
        times = await asyncio.gather(*map(noticed, tasks))
    ends = {task.id: task.ends_at for task in many.books.tasks()}
    late = [time - ends[task.id] for task, time in zip(tasks, times, strict=True)]
    assert sum(late[1:]) / 499 <= 0.6
    assert sum(seconds > 5 for seconds in late[1:]) <= 5
    assert late[0] <= 15
    assert len(many.books.requests("read")) < 500


async def test_a_gateway_that_often_fails_is_not_blamed_on_tasks(clock: ManualClock) -> None:
    """Where three in ten reads fail by chance, hardly any task is suspected of it."""
    async with Emulator(
        clock=clock, duration=(15, 40), pictures="tiny", credits=100_000, seed=3
    ) as emulator:
        emulator.faults.add(faults.Status(502, route="batch", rate=0.3))
        async with connect(emulator, max_in_flight=500) as session:
            await asyncio.gather(*(session.generate(f"lake {i}") for i in range(500)))
        routes = Counter(r.route for r in emulator.books.requests())
    assert routes["read"] <= 60, routes


async def test_a_task_nested_too_deep_among_many(clock: ManualClock) -> None:
    """While nobody can read an answer with it, the others are; and so is it once it can be."""
    served = Counter[str]()
    odd = "task-0003"

    def text_of(task_id: str) -> str:
        served[task_id] += 1
        status = "completed" if served[task_id] > 6 else "processing"
        text = json.dumps(snapshot(id=task_id, status=status))
        deep = task_id == odd and served[odd] < 12
        return text[:-1] + ', "x": ' + "[" * 50_000 + "]" * 50_000 + "}" if deep else text

    async def serve(request: Received, wire: Wire) -> None:
        if request.method == "GET":
            text = text_of(request.path.rsplit("/", 1)[1])
        else:
            text = f'{{"data": [{",".join(map(text_of, request.json["task_ids"]))}]}}'
        await wire.send(http(200, text.encode()))

    async with HostileServer(reads=[serve]) as server:
        server.script = [answer(200, snapshot(id=f"task-{i:04}")) for i in range(12)]
        server.script.append(answer(500, b""))
        async with Session("k" * 20, base_url=server.base_url, clock=clock) as session:
            tasks = [await session.submit(f"lake {i}") for i in range(12)]
            results = await asyncio.gather(*tasks)
    assert [r.task_id for r in results] == [f"task-{i:04}" for i in range(12)]
    assert served[odd] == 12


async def test_strange_tasks_among_many_are_not_noticed_by_the_others(many: Emulator) -> None:
    """One id that is gone, one that never ends, garbage between: 497 others end in time."""
    many.faults.add(faults.TaskVanishes(prompt="gone"))
    many.faults.add(faults.TaskHangs(prompt="endless"))
    policy = PollPolicy(deadline=200)
    async with connect(many, max_in_flight=500, poll=policy) as session:
        strange = [await session.submit(p) for p in ("gone", "endless")]
        many.faults.add(faults.Garbled("garbage", route="read", task=strange[0].id, times=5))
        others = await asyncio.gather(*(session.submit(f"lake {i}") for i in range(497)))
        start = many.clock.now()
        await asyncio.gather(*others)
        assert many.clock.now() - start < 60
        with pytest.raises(EvolinkError):
            await strange[0]
        with pytest.raises(TaskTimeoutError):
            await strange[1]
        assert session.stats.reads < 1.2 * 500


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"null",
        b'{"data": null}',
        b'{"data": {}}',
        b'{"data": [' + b"[" * 100_000,
        b'{"tasks": []}',
        b"\xff\xfe",
        b'{"data": [1, 2',
    ],
)
def test_a_batch_answer_that_is_none(body: bytes) -> None:
    """Anything but an object with a list named data is one error of ours."""
    with pytest.raises(EvolinkError):
        read_tasks(body, ("task-1234",))


def test_a_batch_answer_task_by_task() -> None:
    """Each task is what a single read would have given; a broken one breaks only itself."""
    tasks: list[Any] = [
        snapshot(id="task-good", progress=40),
        snapshot(id="task-done", status="completed", results=["https://example.com/1.png"]),
        snapshot(id="task-bad1", status=None),
        snapshot(id="task-bad2", status=["completed"]),
        snapshot(id="task-good", progress=99),
        snapshot(id="task-odd1", progress="half", status="upscaling"),
    ]
    body = json.dumps({"data": tasks}).encode()
    ids = ("task-good", "task-done", "task-bad1", "task-bad2", "task-odd1", "task-gone")
    read = read_tasks(body, ids)
    assert tuple(read) == ids
    for place, task_id in ((0, "task-good"), (1, "task-done"), (5, "task-odd1")):
        found = read[task_id]
        assert isinstance(found, TaskSnapshot)
        assert found == TaskSnapshot.from_json(tasks[place])
        assert found.raw == tasks[place]
        assert json.loads(found.body) == tasks[place]
    assert isinstance(read["task-bad1"], EvolinkError)
    assert isinstance(read["task-bad2"], EvolinkError)
    assert read["task-gone"] is None


@pytest.mark.parametrize("order", ["asked", "reversed", "with strangers"])
def test_tasks_of_a_batch_answer_are_told_apart_by_their_ids(order: str) -> None:
    """Whatever the order and whatever else is in the answer."""
    tasks: list[Any] = [
        snapshot(id=f"task-{k:04}", status="processing", progress=k) for k in range(50)
    ]
    ids = tuple(str(task["id"]) for task in tasks)
    strangers: list[Any] = [None, 7, "text", [], {}, {"id": 5}, snapshot(id="task-else")]
    data = {
        "asked": tasks,
        "reversed": tasks[::-1],
        "with strangers": [*strangers, *tasks, snapshot(id="task-0007", progress=99)],
    }[order]
    read = read_tasks(json.dumps({"data": data}).encode(), ids)
    assert read == {task_id: TaskSnapshot.from_json(tasks[k]) for k, task_id in enumerate(ids)}


def test_a_task_nested_too_deep_is_an_error_of_its_own() -> None:
    """The tasks beside it in the answer are read."""
    ids = ("task-0001", "task-0002")
    rows = [json.dumps(snapshot(id=task_id, status="processing")) for task_id in ids]
    rows[0] = rows[0][:-1] + ', "x": ' + "[" * 200 + "]" * 200 + "}"
    read = read_tasks(f'{{"data": [{",".join(rows)}]}}'.encode(), ids)
    assert isinstance(read["task-0001"], InvalidResponseError)
    assert isinstance(read["task-0002"], TaskSnapshot)


# -- cool-downs --------------------------------------------------------------------------------


async def test_a_cool_down_is_everybodys(many: Emulator) -> None:
    """After a 429 the server sees nothing but what was in flight, and no herd afterwards."""
    async with connect(many, max_in_flight=300) as session:
        tasks = await asyncio.gather(*(session.submit(f"lake {i}") for i in range(200)))
        start = many.clock.now()
        many.faults.add(faults.Status(429, route="batch", retry_after=60, nth=3))
        submits = [asyncio.create_task(session.submit(f"pond {i}")) for i in range(100)]
        await asyncio.gather(*tasks, *submits)
        await asyncio.gather(*session.tasks)
        assert session.stats.cool_downs == 1
    records = many.books.requests()
    refused = next(r for r in records if r.status == 429)
    assert refused.time >= start
    during = [r for r in records if refused.time < r.time < refused.time + 60]
    assert len(during) <= 16
    after = [r.time for r in records if r.time >= refused.time + 60]
    assert after[0] - refused.time <= 67
    first_second = [t for t in after if t < after[0] + 0.5]
    assert len(first_second) < 60


@pytest.mark.parametrize("told", [False, True])
async def test_a_server_that_limits_reads_is_asked_for_many_at_once(
    many: Emulator, *, told: bool
) -> None:
    """A 429 is no reason to read tasks singly, which would ask for more."""
    limit = faults.RateLimit(1, per=0.5, retry_after=told, route=("batch", "read"))
    async with connect(many, max_in_flight=500) as session:
        tasks = await asyncio.gather(*(session.submit(f"lake {i}") for i in range(500)))
        many.faults.add(limit)
        await asyncio.gather(*tasks)
    seen = Counter(r.route for r in many.books.requests() if r.route in {"batch", "read"})
    assert seen["read"] <= 20, seen


async def test_an_outage_is_not_answered_with_a_storm(many: Emulator) -> None:
    """A server answering 503 for a minute sees at most the permits and a probe per cool-down."""
    async with connect(many, max_in_flight=1000) as session:
        await asyncio.gather(*(session.submit(f"lake {i}") for i in range(1000)))
        start = many.clock.now()
        many.faults.add(faults.Outage(start - many.clock.now(), 60, status=503))
        await asyncio.gather(*session.tasks)
        assert all(task.done() for task in session.tasks)
    seen = [r for r in many.books.requests() if r.status == 503]
    # 16 permits, then one probe after 1, 2, 4, 8, 16 and 32 s.
    assert 1 <= len(seen) <= 16 + 7


async def test_the_request_rate_is_kept(many: Emulator) -> None:
    """Never more than the bucket and its refill in any stretch of time."""
    rate = 5.0
    async with connect(many, max_in_flight=200, max_requests_per_second=rate) as session:
        await asyncio.gather(*(session.generate(f"lake {i}") for i in range(100)))
    times = [r.time for r in many.books.requests() if r.route != "result"]
    for i, first in enumerate(times):
        for j in range(i, min(i + 60, len(times))):
            assert j - i + 1 <= rate + rate * (times[j] - first) + 1e-6


async def test_submits_leave_tokens_of_the_rate_to_reads(many: Emulator) -> None:
    """While hundreds wait to be submitted, those that run are polled at."""
    async with connect(many, max_in_flight=300, max_requests_per_second=2) as session:
        start = many.clock.now()
        tasks = [asyncio.create_task(session.generate(f"lake {i}")) for i in range(300)]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        assert many.clock.now() - start <= 60
        await asyncio.gather(*tasks)


async def test_a_request_rate_in_real_time() -> None:
    """Reads get their tokens by a clock that moves on while it is asked."""
    async with (
        Emulator(time_scale=100, duration=3, estimate=3, pictures="tiny") as emulator,
        connect(emulator, max_requests_per_second=10) as session,
    ):
        tasks = await asyncio.gather(*(session.submit(f"lake {i}") for i in range(3)))
        assert all([(await task.wait(timeout=600)).urls for task in tasks])
        assert session.stats.reads >= 1


async def test_a_poll_that_is_asked_for_does_not_wait_its_turn(clock: ManualClock) -> None:
    """However far a request rate has made the reads fall behind."""
    async with (
        Emulator(
            clock=clock, duration=10_000, pictures="tiny", credits=1000, without=("batch",)
        ) as emulator,
        connect(emulator, max_in_flight=50, max_requests_per_second=0.5) as session,
    ):
        tasks = await asyncio.gather(*(session.submit(f"lake {i}") for i in range(50)))
        await clock.sleep_until(clock.now() + 100)
        before = clock.now()
        await tasks[7].refresh()
        assert clock.now() - before <= 6


async def test_a_failed_read_of_many_is_paid_once(many: Emulator) -> None:
    """A request that fails takes 5 from the budget, whatever number of tasks it asked for."""
    async with connect(many, max_in_flight=50, retry=RetryPolicy(budget=9)) as session:
        tasks = await asyncio.gather(*(session.submit(f"lake {i}") for i in range(50)))
        ids = tuple(task.id for task in tasks)
        many.faults.add(faults.Reset(route="batch", times=2))
        await session._transport.fetch(ids)
        assert session._transport.retries.budget.level == 4
        assert session._transport.backoff(1) < 1.5
        await session._transport.fetch(ids)
        assert session._transport.backoff(1) == RetryPolicy().wait_max
        await session.aclose()


async def test_a_throttle_takes_nothing_from_the_budget(clock: ManualClock) -> None:
    """It has its price, the cool-down: a submit that meets one is sent again."""
    too_fast = error(429, Retry_After="1")
    async with HostileServer(script=[too_fast, answer(200, snapshot())]) as server:
        retry = RetryPolicy(budget=0)
        async with Session("k" * 20, base_url=server.base_url, clock=clock, retry=retry) as session:
            assert (await session.submit("A lake")).id == snapshot()["id"]


async def test_a_retry_budget_slows_failing_reads(clock: ManualClock) -> None:
    """With the budget spent, failed reads wait as long as any retry waits."""
    async with HostileServer(script=[answer(200, snapshot())], reads=[error(500)]) as server:
        retry = RetryPolicy(budget=10, wait_initial=0.1, wait_jitter=0)
        async with Session("k" * 20, base_url=server.base_url, clock=clock, retry=retry) as session:
            task = await session.submit("A lake")
            start = clock.now()
            with pytest.raises(TaskTimeoutError):
                await task.wait(timeout=200)
    assert start
    reads = [r for r in server.received if r.method == "GET"]
    assert 5 <= len(reads) <= 12


async def test_a_repeated_submit_is_polled_like_a_task_found_by_its_id(
    clock: ManualClock,
) -> None:
    """How old its task is nobody knows: it is read at once and teaches nothing."""
    async with Emulator(
        clock=clock, duration=300, estimate=300, pictures="tiny", without=("duration",)
    ) as emulator:
        keys = [f"key-of-the-submit-{k}" for k in range(5)]
        async with connect(emulator) as session:
            await asyncio.gather(*(session.generate("A lake", idempotency_key=k) for k in keys))
            (learned,) = session.stats.typical.values()
        assert 250 <= learned <= 350
        async with connect(emulator) as session:
            start = clock.now()
            for key in keys:
                await session.generate("A lake", idempotency_key=key)
            assert clock.now() - start < 1
            assert session.stats.typical == {}
    assert len(emulator.books.tasks()) == 5


# -- plain policies ----------------------------------------------------------------------------


async def test_plain_backoff(many: Emulator) -> None:
    """A tenacity wait strategy decides alone when to poll."""
    async with connect(many, poll=PollPolicy(wait=tenacity.wait_fixed(3))) as session:
        task = await session.submit("A lake")
        start = many.clock.now()
        await task
    times = [r.time - start for r in many.books.requests("read")]
    assert times[0] == pytest.approx(3, abs=0.01)
    assert all(b - a == pytest.approx(3, abs=0.01) for a, b in pairwise(times))


@pytest.mark.parametrize("without", [(), ("batch",)])
async def test_plain_backoff_of_many(clock: ManualClock, without: tuple[str, ...]) -> None:
    """Also where more tasks run than one read can ask for, and without the batch endpoint."""
    policy = PollPolicy(wait=tenacity.wait_fixed(5), min_interval=5, max_interval=5)
    async with (
        Emulator(clock=clock, duration=60, pictures="tiny", without=without, credits=1000) as many,
        connect(many, max_in_flight=60, poll=policy) as session,
    ):
        await asyncio.gather(*(session.generate(f"lake {i}") for i in range(60)))
    (first, *_) = many.books.requests("submit")
    reads = [*many.books.requests("read"), *many.books.requests("batch")]
    late = [(r.time - first.time) % 5 for r in reads]
    assert len(late) >= (1 if without == () else 60) * 11
    assert all(min(x, 5 - x) < 0.1 for x in late)


def test_wait_strategies_that_need_an_outcome_are_refused() -> None:
    """There is no outcome to see between two polls: refused at once."""
    with pytest.raises(ConfigurationError, match="wait"):
        PollPolicy(wait=tenacity.wait_exception(lambda _: 1.0))


# -- callbacks and nudges ----------------------------------------------------------------------


async def test_tasks_with_callbacks_are_hardly_polled(many: Emulator) -> None:
    """While nudges tell every end, a task costs its confirming read and little else."""
    async with connect(many, callback="https://example.com/hook") as session:
        total = 0
        for i in range(30):
            task = await session.submit(f"lake {i}")
            record = many.books.task(task.id)
            await many.clock.sleep_until(record.ends_at)
            session._watcher.nudge(task.id)
            before = many.clock.now()
            await task
            assert many.clock.now() - before < 0.3
            total += len(many.books.requests("read", task=task.id))
    assert total <= 1.5 * 30


async def test_lost_callbacks_degrade_to_plain_polling(many: Emulator) -> None:
    """When no callback ever comes, the polls soon are as frequent as without."""
    async with connect(many, callback="https://example.com/hook") as session:
        delays = []
        for i in range(20):
            task = await session.submit(f"lake {i}")
            await task
            delays.append(many.clock.now() - many.books.task(task.id).ends_at)
    assert sum(delays[-10:]) / 10 < 6


async def test_nudges_coalesce(many: Emulator) -> None:
    """A thousand nudges of a running task are one read per shortest interval."""
    async with connect(many, poll=PollPolicy(min_interval=1)) as session:
        task = await session.submit("A lake")
        start = many.clock.now()
        for _ in range(10):
            for _ in range(100):
                assert session._watcher.nudge(task.id)
            await many.clock.sleep_until(many.clock.now() + 0.5)
        reads = len(many.books.requests("read"))
        assert 1 <= reads <= many.clock.now() - start + 1
        await task
        assert not session._watcher.nudge(task.id)


# -- a machine that sleeps ---------------------------------------------------------------------


async def test_a_suspended_machine(clock: ManualClock, caplog: pytest.LogCaptureFixture) -> None:
    """After a suspension the first failed read is retried at once, and nothing is learned of it."""
    ahead = 0.0
    asked: list[float] = []
    failing = False

    class Network:
        read_limit = 1
        renewed = 0

        async def fetch(self, ids: tuple[str, ...]) -> Any:
            asked.append(clock.now())
            with clock.hold():
                await asyncio.sleep(0)
            nonlocal failing
            found: Any = TaskSnapshot.from_json(
                snapshot(id=ids[0], status="completed" if len(asked) > 4 else "processing")
            )
            if failing:
                failing, found = False, APIConnectionError("dead", sent=True)
            answers = {"sent_at": asked[-1], "received_at": clock.now(), "answers": {ids[0]: found}}
            return type("Polled", (), answers)

        def backoff(self, failures: int) -> float:
            raise AssertionError(failures)

        def renew(self) -> None:
            self.renewed += 1

    network = Network()
    watcher = Watcher(
        network,
        clock=clock,
        policy=PollPolicy(min_interval=1, max_interval=10),
        ready_at=lambda: 0.0,
        max_reads=4,
        wall=lambda: clock.now() + ahead,
    )
    watch = watcher.attach("task-1234")
    await watcher.until_changed(watch)
    ahead, failing = 3600.0, True
    watcher.notice_resume()
    await watcher.until_ended(watch)
    assert network.renewed == 1
    assert "suspended for about 3600 s" in caplog.text
    gaps = [b - a for a, b in pairwise(asked)]
    assert gaps.count(0.0) == 2  # at once, and again on the new connections
    await watcher.stop(EvolinkError)


async def test_a_suspension_means_new_connections(many: Emulator) -> None:
    """Those from before the machine slept are not used again, by reads or by submits."""
    async with connect(many, timeout=Timeout()) as session:
        await session.credits()
        transport = session._transport
        old = transport._read_http, transport._submit_http
        transport.renew()
        await session.credits()
        await session.submit("A lake")
        assert transport._read_http not in old
        assert transport._submit_http not in old
        assert not any(client.closed for client in old)
    assert all(client.closed for client in old)


async def test_a_submit_right_after_a_suspension(
    many: Emulator, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It does not go out on a connection from before, also if no task was polled at yet."""
    real, ahead = time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    async with connect(many, clock=LoopClock(), max_in_flight=2) as session:
        await session.submit("A lake")
        old = session._transport._submit_http
        ahead = 3600.0
        await session.submit("Another lake")
        assert session._transport._submit_http is not old
    assert "suspended for about 3600 s" in caplog.text


async def test_no_task_factory_hinders_new_connections(
    many: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clients of before a suspension are put away by tasks that none of them makes."""
    real, ahead = time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: real() + ahead)

    def factory(loop: asyncio.AbstractEventLoop, coroutine: Any) -> asyncio.Task[Any]:
        assert coroutine.__name__ != "_close_idle"
        return asyncio.Task(coroutine, loop=loop)

    loop = asyncio.get_running_loop()
    async with connect(many, clock=LoopClock(), max_in_flight=2, max_connections=1) as session:
        await session.submit("A lake")
        ahead = 3600.0
        loop.set_task_factory(factory)
        try:
            await session.submit("Another lake")
        finally:
            loop.set_task_factory(None)
        assert len(session._transport._own) == 4
    assert [task.prompt for task in many.books.tasks()] == ["A lake", "Another lake"]


async def test_old_connections_do_not_pile_up(many: Emulator) -> None:
    """A laptop that sleeps every night leaves no open clients behind in a session."""
    async with connect(many, timeout=Timeout(connect=0.01, submit=0.01, read=0.01)) as session:
        for _ in range(5):
            session._transport.renew()
        await asyncio.gather(*session._transport._closing_clients)
        assert len(session._transport._own) == 2  # one to submit, one to read
        assert not session._transport._read_http.closed


async def test_after_a_suspension_all_are_polled(
    many: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How old tasks are is not known then: a poll that was far away comes at once."""
    real, ahead = time.time, 0.0
    monkeypatch.setattr(time, "time", lambda: real() + ahead)
    async with connect(many, clock=LoopClock(), max_in_flight=60) as session:
        for i in range(60):
            await session.submit(f"lake {i}", callback="https://example.com/hook")
        assert session.stats.reads == 0
        ahead = 3600.0
        await session.tasks[0].refresh()
        assert session.stats.ids_read == 60


# -- why does it not poll? --------------------------------------------------------------------


async def test_a_failed_read_is_one_warning(
    many: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    """However many tasks a failed read was for, it is one line that says how many and why."""
    many.faults.add(faults.Status(500, route="batch", times=1))
    async with connect(many, max_in_flight=20) as session:
        await asyncio.gather(*(session.generate(f"lake {i}") for i in range(20)))
    (line,) = [record.getMessage() for record in caplog.records if "poll failed" in record.msg]
    assert "for 20 of 20 tasks: HTTP 500" in line


async def test_debug_logs_say_when_it_polls_next(
    many: Emulator, caplog: pytest.LogCaptureFixture
) -> None:
    """At DEBUG each poll is logged with the time of the next, each failure with its reason."""
    caplog.set_level(logging.DEBUG, logger="evolink_async")
    many.faults.add(faults.Status(500, route="read", nth=2))
    async with connect(many) as session:
        task = await session.submit("A lake")
        await task
    assert f"task {task.id} is processing" in caplog.text
    assert "next poll in" in caplog.text
    assert "failed, next poll in" in caplog.text
