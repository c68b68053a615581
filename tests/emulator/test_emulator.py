"""The emulated API, endpoint by endpoint, over real HTTP."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import io
import json
import random
from collections.abc import AsyncIterator
from typing import Any

import pytest
from emulator_caller import IMAGES, ORDER, Caller, calling

from evolink_async.emulator import FEATURES, Emulator, ManualClock, RealClock, serve
from evolink_async.emulator.__main__ import main, parser

DAY = 24 * 3600


@pytest.fixture
def clock() -> ManualClock:
    """Time that only the test moves."""
    return ManualClock(autoadvance=False)


@pytest.fixture
async def emulator(clock: ManualClock) -> AsyncIterator[Emulator]:
    """An emulator with generations of 100 s."""
    async with Emulator(clock=clock, pictures="tiny", duration=100, credits=10) as emulator:
        yield emulator


@pytest.fixture
async def api(emulator: Emulator) -> AsyncIterator[Caller]:
    """A caller of that emulator."""
    async with calling(emulator) as caller:
        yield caller


# Submit


async def test_a_submit_is_answered_as_on_the_page(api: Caller) -> None:
    """The answer to a submit has the page's fields, and a request id."""
    answer = await api.submit(n=2)
    body = answer.json
    assert answer.status == 200
    assert answer.headers["X-Request-ID"] == "req-00000001"
    name = body.pop("id")
    assert name.startswith("task-unified-1757156493-")
    assert body == {
        "created": 1757156493,
        "model": "wan2.5-text-to-image",
        "object": "image.generation.task",
        "progress": 0,
        "status": "pending",
        "task_info": {"can_cancel": True, "estimated_time": 100},
        "type": "image",
        "usage": {"billing_rule": "per_call", "credits_reserved": 2, "user_group": "default"},
    }


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"model": None}, 400, "model"),
        ({"model": "no-such-model"}, 404, "model"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": 7}, 400, "prompt"),
        ({"prompt": "x" * 2001}, 400, "prompt"),
        ({"prompt": "\N{FOX FACE}" * 1501}, 400, "prompt"),
        ({"size": "1280"}, 400, "size"),
        ({"size": 1280}, 400, "size"),
        ({"size": "767x768"}, 400, "size"),
        ({"size": "1440x1441"}, 400, "size"),
        ({"size": "383x1540"}, 400, "size"),
        ({"size": "1540x383"}, 400, "size"),
        ({"size": "01280x1280"}, 400, "size"),
        ({"n": 3}, 400, "n"),
        ({"n": True}, 400, "n"),
        ({"n": "1"}, 400, "n"),
        ({"n": [1]}, 400, "n"),
        ({"prompt_extend": "yes"}, 400, "prompt_extend"),
        ({"callback_url": "http://example.com/"}, 400, "callback_url"),
        ({"callback_url": "https:///x"}, 400, "callback_url"),
        ({"callback_url": "https://[::1"}, 400, "callback_url"),
        ({"callback_url": "https://example.com/" + "x" * 2029}, 400, "callback_url"),
        ({"callback_url": "https://127.0.0.1/"}, 400, "callback_url"),
        ({"callback_url": "https://127.1/"}, 400, "callback_url"),
        ({"callback_url": "https://10.1.2.3/"}, 400, "callback_url"),
        ({"callback_url": "https://100.64.0.1/"}, 400, "callback_url"),
        ({"callback_url": "https://[::ffff:192.168.0.1]/"}, 400, "callback_url"),
        ({"callback_url": "https://[2002:7f00:1::]/"}, 400, "callback_url"),
        ({"callback_url": "https://[64:ff9b::a00:1]/"}, 400, "callback_url"),
        ({"callback_url": "https://224.0.0.1/"}, 400, "callback_url"),
        ({"callback_url": "https://a.localhost./"}, 400, "callback_url"),
    ],
)
async def test_a_submit_that_breaks_a_rule_is_refused(
    api: Caller, emulator: Emulator, fields: dict[str, Any], status: int, param: str
) -> None:
    """Each rule of the page has its refusal, naming the field; nothing is charged."""
    answer = await api.submit(**fields)
    assert (answer.status, answer.error["param"], answer.error["code"]) == (status, param, status)
    assert answer.error["type"] in {"invalid_request_error", "not_found_error"}
    assert (emulator.books.accepted, emulator.books.remaining) == (0, 10)


@pytest.mark.parametrize(
    "fields",
    [
        {"size": "768x768"},
        {"size": "1440x1440"},
        {"size": "384x1536"},
        {"size": "1536x384"},
        {"n": 4},
        {"n": 2.0},
        {"prompt": "x" * 2000},
        {"prompt_extend": False},
        {"callback_url": "https://example.com/hook?x=1"},
        {"callback_url": "https://93.184.216.34:8443/"},
        {"a_field_of_tomorrow": 1},
        {"model": "wan2.5-image-to-image", "image_urls": ["https://example.com/a.png"], "n": 3},
    ],
)
async def test_a_submit_within_the_rules_is_accepted(api: Caller, fields: dict[str, Any]) -> None:
    """Bounds are inclusive, and unknown fields are ignored."""
    assert (await api.submit(**fields)).status == 200


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"7", b"\xff", b"[" * 100_000])
async def test_a_body_that_is_no_json_object_is_refused(api: Caller, body: bytes) -> None:
    """A body that is not a JSON object is a 400."""
    answer = await api.call("POST", IMAGES, data=body)
    assert (answer.status, answer.error["type"]) == (400, "invalid_request_error")


async def test_a_body_that_is_too_large_is_refused(api: Caller) -> None:
    """A megabyte and more is a 413."""
    answer = await api.call("POST", IMAGES, data=io.BytesIO(b" " * ((1 << 20) + 1)))
    assert (answer.status, answer.error["type"]) == (413, "request_too_large_error")


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer wrong", "Basic emulator-key"])
@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", IMAGES), ("GET", "/v1/tasks/task-1"), ("GET", "/v1/credits"), ("GET", "/v1/tasks")],
)
async def test_without_the_key_nothing_goes(
    api: Caller, header: str, method: str, path: str
) -> None:
    """Every endpoint asks for the key."""
    answer = await api.call(method, path, headers={"Authorization": header}, json=ORDER)
    assert (answer.status, answer.error["type"]) == (401, "authentication_error")


async def test_other_endpoints_and_methods_are_refused_in_json(
    api: Caller, emulator: Emulator
) -> None:
    """An unknown path is a 404, a wrong method a 405 that says what is allowed."""
    unknown = await api.get("/v1/nothing")
    wrong = await api.get(IMAGES)
    batch = await api.get("/v1/tasks/batch")
    assert (unknown.status, unknown.error["code"]) == (404, 404)
    assert (wrong.status, wrong.headers["Allow"]) == (405, "POST")
    assert (batch.status, batch.headers["Allow"]) == (405, "POST")
    assert [entry.route for entry in emulator.books.requests()] == ["other"] * 3


async def test_codes_may_be_words() -> None:
    """The newer form of errors has words for codes."""
    async with (
        Emulator(pictures="tiny", string_codes=True, credits=0) as emulator,
        calling(emulator) as api,
    ):
        assert (await api.get("/v1/tasks/task-1")).error["code"] == "not_found"
        assert (await api.submit()).error["code"] == "insufficient_quota"


# Life of a task


async def test_a_task_goes_from_pending_to_completed(api: Caller, clock: ManualClock) -> None:
    """A task is pending, processes with growing progress, and completes with its results."""
    name = await api.task(n=4)
    seen = []
    for _ in range(5):
        body = await api.read(name)
        seen.append((body["status"], body["progress"], body["task_info"]["estimated_time"]))
        assert "results" not in body
        clock.advance(19.9)
    assert seen == [
        ("pending", 0, 100),
        ("processing", 18, 80),
        ("processing", 38, 60),
        ("processing", 58, 40),
        ("processing", 79, 20),
    ]
    clock.advance(0.5)
    body = await api.read(name)
    assert (body["status"], body["progress"], body["duration"]) == ("completed", 100, 100)
    assert body["usage"]["credits_used"] == 4
    assert body["task_info"] == {"can_cancel": False, "estimated_time": 0}
    assert len(set(body["results"])) == 4
    assert [each["image_url"] for each in body["result_data"]] == body["results"]


async def test_a_task_can_be_made_to_fail_or_be_cancelled(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """A test can end a running task as it likes; one that has ended stays as it is."""
    failed, cancelled, completed = [await api.task() for _ in range(3)]
    emulator.fail(failed, "content_policy_violation", "not that")
    emulator.cancel(cancelled)
    emulator.complete(completed)
    emulator.fail(completed)
    error = (await api.read(failed))["error"]
    assert (error["code"], error["message"]) == ("content_policy_violation", "not that")
    assert [(await api.read(name))["status"] for name in (failed, cancelled, completed)] == [
        "failed",
        "cancelled",
        "completed",
    ]
    assert [task.charged for task in emulator.books.tasks()] == [0, 0, 1]
    clock.advance(200)
    assert [task.refunded for task in emulator.books.tasks()] == [1, 1, 0]
    assert emulator.books.summary()["running"] == 0
    with pytest.raises(KeyError):
        emulator.fail("task-unknown")


async def test_an_unknown_or_malformed_id_is_refused(api: Caller) -> None:
    """An unknown id is a 404 of the API's own, a malformed one a 400."""
    unknown = await api.get("/v1/tasks/task-unified-1-x")
    malformed = await api.get("/v1/tasks/%20x")
    assert (unknown.status, unknown.error["type"]) == (404, "not_found_error")
    assert (malformed.status, malformed.error["param"]) == (400, "task_id")


async def test_a_batch_read_answers_what_it_knows(api: Caller, emulator: Emulator) -> None:
    """A batch read answers each known id once, and leaves unknown ones out."""
    names = [await api.task() for _ in range(2)]
    answer = await api.post("/v1/tasks/batch", {"task_ids": [*names, names[0], "task-unknown"]})
    assert [each["id"] for each in answer.json["data"]] == names
    assert answer.json["data"][0] == await api.read(names[0])
    assert emulator.books.task(names[0]).reads == 2


@pytest.mark.parametrize(
    "body",
    [{}, {"task_ids": "task-1"}, {"task_ids": []}, {"task_ids": [1]}, {"task_ids": ["t"] * 51}],
)
async def test_a_batch_read_has_rules(api: Caller, body: Any) -> None:
    """A batch read takes a list of 1 to 50 strings."""
    answer = await api.post("/v1/tasks/batch", body)
    assert (answer.status, answer.error["param"]) == (400, "task_ids")


async def test_durations_and_ids_follow_from_the_seed() -> None:
    """The same seed gives the same ids and durations, whatever the order of the submits."""

    async def run(seed: int, prompts: list[str]) -> dict[str, tuple[str, float]]:
        async with (
            Emulator(clock=ManualClock(), pictures="tiny", seed=seed, duration=(5, 60)) as emulator,
            calling(emulator) as api,
        ):
            for prompt in prompts:
                await api.submit(prompt=prompt)
            return {task.prompt: (task.id, task.ends_at) for task in emulator.books.tasks()}

    one = await run(1, ["a", "b"])
    assert one == await run(1, ["b", "a"])
    assert one != await run(2, ["a", "b"])


async def test_a_duration_may_be_a_function() -> None:
    """A function of prompt and random generator sets each duration; the estimate can be fixed."""

    def law(prompt: str, chance: random.Random) -> float:
        return len(prompt) + chance.random()

    async with (
        Emulator(clock=ManualClock(), pictures="tiny", duration=law, estimate=30) as emulator,
        calling(emulator) as api,
    ):
        answer = await api.submit(prompt="x" * 50)
        (task,) = emulator.books.tasks()
    assert answer.json["task_info"]["estimated_time"] == 30
    assert 50 <= task.ends_at - task.accepted_at < 51


async def test_equal_tails_do_not_make_equal_ids(
    api: Caller, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An id that is taken is not given again."""
    tails = iter(["aaaaaaaa", "aaaaaaaa", "bbbbbbbb"])
    monkeypatch.setattr(random.Random, "choices", lambda *_, **__: next(tails))
    assert (await api.task())[-8:] == "aaaaaaaa"
    assert (await api.task())[-8:] == "bbbbbbbb"


# Idempotency


async def test_a_repeated_key_is_answered_with_the_first_answer(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """A repeat makes no second task and is marked as replayed."""
    first = await api.submit("key-of-sixteen-chars")
    clock.advance(50)
    again = await api.submit("key-of-sixteen-chars")
    assert again.json == first.json
    assert again.headers["Idempotency-Replayed"] == "true"
    assert "Idempotency-Replayed" not in first.headers
    assert emulator.books.accepted == 1
    assert [entry.replayed for entry in emulator.books.submits()] == [False, True]
    assert emulator.books.task(first.json["id"]).idempotency_key == "key-of-sixteen-chars"


async def test_a_refusal_is_replayed_too(api: Caller) -> None:
    """The first answer to a key stays, also when it was a refusal."""
    for replayed in (None, "true"):
        answer = await api.submit("key-of-sixteen-chars", n=3)
        assert answer.status == 400
        assert answer.headers.get("Idempotency-Replayed") == replayed


async def test_a_key_with_another_body_is_a_conflict(api: Caller) -> None:
    """A key that comes with another body is refused with a code of its own."""
    await api.submit("key-of-sixteen-chars")
    answer = await api.submit("key-of-sixteen-chars", prompt="another")
    assert (answer.status, answer.error["code"]) == (409, "idempotency_conflict")


async def test_a_malformed_key_is_refused(api: Caller) -> None:
    """A key has 16 to 96 characters of a small alphabet."""
    assert [
        (await api.submit(key)).status for key in ("short", "x" * 97, "with a blank in it")
    ] == [
        400,
        400,
        400,
    ]


# Credits


async def test_credits_are_reserved_charged_and_refunded(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """A running task holds its reservation; a completed one is charged, a failed one refunded."""
    names = [await api.task(n=4), await api.task(n=2)]
    books = emulator.books
    assert (books.remaining, books.reserved, books.charged) == (4, 6, 0)
    emulator.fail(names[1])
    clock.advance(100)
    assert (books.remaining, books.reserved, books.charged, books.refunded) == (6, 0, 4, 2)
    data = (await api.get("/v1/credits")).json["data"]
    assert data["user"] == {"remaining_credits": 6, "used_credits": 4}
    assert data["token"] == {**data["user"], "unlimited_credits": False}


async def test_without_credits_nothing_is_accepted(api: Caller, emulator: Emulator) -> None:
    """A submit that needs more than is left is a 402 and reserves nothing."""
    for _ in range(2):
        await api.submit(n=4)
    answer = await api.submit(n=4)
    assert (answer.status, answer.error["type"]) == (402, "insufficient_quota_error")
    assert emulator.books.remaining == 2


async def test_prices_may_be_fractions() -> None:
    """Fractions of credits add up without rounding errors."""
    async with (
        Emulator(clock=ManualClock(), pictures="tiny", price=0.1, credits=1) as emulator,
        calling(emulator) as api,
    ):
        for _ in range(10):
            assert (await api.submit()).json["usage"]["credits_reserved"] == 0.1
        assert (emulator.books.remaining, emulator.books.reserved) == (0, 1)


# List


async def test_the_list_is_newest_first_filtered_and_paged(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """The list filters by status, type and model, and comes in pages."""
    video = (await api.post("/v1/videos/generations", {"model": "any-video"})).json["id"]
    images = [await api.task() for _ in range(3)]
    emulator.fail(images[0])

    async def listed(query: str) -> list[str]:
        answer = (await api.get(f"/v1/tasks?{query}")).json
        return [each["id"] for each in answer["data"]]

    assert await listed("") == [*reversed(images), video]
    assert await listed("status=processing&type=image") == [images[2], images[1]]
    assert await listed("status=failed") == [images[0]]
    assert await listed("model=any-video") == [video]
    assert await listed("page=2&page_size=3") == [video]
    clock.advance(100)
    body = (await api.get("/v1/tasks?page_size=1")).json
    assert (body["total"], body["page"], body["page_size"]) == (4, 1, 1)
    assert body["data"] == [
        {
            "id": images[2],
            "model": "wan2.5-text-to-image",
            "type": "image",
            "status": "completed",
            "progress": 100,
            "created_at": 1757156493,
            "duration": 100,
            "has_results": True,
            "result_count": 1,
            "has_error": False,
            "credits_used": 1,
        }
    ]


@pytest.mark.parametrize(
    "query", ["status=pending", "type=picture", "page=0", "page=x", "page_size=51", "page=9" * 9]
)
async def test_the_list_refuses_what_cannot_be(api: Caller, query: str) -> None:
    """Filters are words of a list, pages are numbers."""
    assert (await api.get(f"/v1/tasks?{query}")).status == 400


# Results


async def test_results_are_pictures_of_the_size_asked_for(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """Each result is a picture of the right size, and no two are the same."""
    name = await api.task(n=4, size="1024x768")
    clock.advance(100)
    urls = (await api.read(name))["results"]
    bodies = [(await api.get(url)).body for url in urls]
    image = pytest.importorskip("PIL.Image")
    assert [image.open(io.BytesIO(body)).size for body in bodies] == [(1024, 768)] * 4
    assert len(set(bodies)) == 4
    assert (emulator.books.delivered, emulator.books.task(name).delivered) == (4, 4)
    assert emulator.books.task(name).result_urls == tuple(urls)


async def test_result_links_expire_after_a_day(api: Caller, clock: ManualClock) -> None:
    """A link works for 24 hours of emulated time and says afterwards that it has expired."""
    name = await api.task()
    clock.advance(100)
    (url,) = (await api.read(name))["results"]
    clock.advance(DAY)
    assert (await api.get(url)).status == 200
    clock.advance(1)
    answer = await api.get(url)
    assert (answer.status, b"expired" in answer.body) == (403, True)


async def test_a_result_is_found_under_its_own_link_only(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """No result is served before the task completes, nor at a guessed path."""
    name = await api.task()
    (url,) = emulator._service.tasks[name].result_paths()
    assert (await api.get(url)).status == 404
    clock.advance(100)
    assert (await api.get(url)).status == 200
    assert (await api.get(f"/results/guess/{name}-1.png")).status == 404
    assert (await api.get("/results/guess/nothing")).status == 404


async def test_only_the_last_results_are_kept(api: Caller, emulator: Emulator) -> None:
    """Results are made when they are requested, and only the last few are kept."""
    emulator._service.account.remaining = 100
    for _ in range(10):
        name = await api.task(n=4)
        emulator.complete(name)
        for url in emulator.books.task(name).result_urls:
            await api.get(url)
    assert len(emulator._endpoints.results._cache) == 32
    assert (await api.get(emulator.books.task(name).result_urls[0])).status == 200


@pytest.mark.parametrize(
    ("kind", "head", "content_type"),
    [("video", b"\0\0\0\x1cftyp", "video/mp4"), ("audio", b"RIFF", "audio/wav")],
)
async def test_other_generations_share_the_life_cycle(
    api: Caller, clock: ManualClock, kind: str, head: bytes, content_type: str
) -> None:
    """Videos and audios are tasks like any other, with results of their own type."""
    answer = await api.post(f"/v1/{kind}s/generations", {"model": "any", "prompt": "rain"})
    assert (answer.json["type"], answer.json["object"]) == (kind, f"{kind}.generation.task")
    clock.advance(100)
    body = await api.read(answer.json["id"])
    assert body["result_data"] == [{f"{kind}_url": body["results"][0]}]
    result = await api.get(body["results"][0])
    assert result.headers["Content-Type"] == content_type
    assert result.body.startswith(head)


# Books


async def test_the_books_know_who_ran_when(
    api: Caller, emulator: Emulator, clock: ManualClock
) -> None:
    """The peak counts tasks from acceptance to end, and an end makes room at that instant."""
    emulator._service.account.remaining = 100
    for _ in range(3):
        await api.submit()
        clock.advance(50)
    assert (emulator.books.running, emulator.books.peak_running) == (1, 2)


async def test_the_books_can_be_searched(api: Caller, emulator: Emulator) -> None:
    """Requests are found by route, status, task and prompt; totals are there, too."""
    name = await api.task(prompt="one")
    await api.submit(prompt="two", n=3)
    await api.read(name)
    await api.post("/v1/tasks/batch", {"task_ids": [name]})
    books = emulator.books
    assert [entry.status for entry in books.submits()] == [200, 400]
    assert [entry.task_ids for entry in books.submits(prompt="one")] == [(name,)]
    assert [entry.route for entry in books.reads(name)] == ["read", "batch"]
    assert [entry.prompt for entry in books.requests(status=400)] == ["two"]
    assert [task.id for task in books.tasks("one", status="pending")] == [name]
    assert books.tasks(status="completed") == ()
    assert all(entry.authorized for entry in books.requests())
    assert books.summary() == {
        "requests": 4,
        "submits": 2,
        "accepted": 1,
        "running": 1,
        "peak_running": 1,
        "remaining": 9,
        "reserved": 1,
        "charged": 0,
        "refunded": 0,
        "reads": 2,
        "delivered": 0,
        "callbacks": 0,
    }
    assert repr(books) == "Books(4 requests, 1 tasks)"


# Undocumented features


async def test_undocumented_features_can_be_switched_off() -> None:
    """Without its undocumented features the emulator is what the documents promise."""
    clock = ManualClock(autoadvance=False)
    async with (
        Emulator(clock=clock, pictures="tiny", duration=100, without=FEATURES) as emulator,
        calling(emulator) as api,
    ):
        answers = [await api.submit("key-of-sixteen-chars") for _ in range(2)]
        names = [answer.json["id"] for answer in answers]
        assert names[0] != names[1]
        assert "X-Request-ID" not in answers[0].headers
        assert (await api.post("/v1/tasks/batch", {"task_ids": names})).status == 405
        assert (await api.get("/v1/tasks")).status == 404
        clock.advance(60)
        assert (await api.read(names[0]))["task_info"]["estimated_time"] == 100
        emulator.fail(names[1])
        clock.advance(40)
        body = await api.read(names[0])
        assert {"result_data", "duration"}.isdisjoint(body)
        assert "credits_used" not in body["usage"]
        assert set((await api.read(names[1]))["error"]) == {"code", "message"}


# The emulator itself


def test_full_pictures_need_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without pillow the emulator says what to install, and still makes tiny pictures."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ImportError, match=r"pip install 'evolink-async\[emulator\]'"):
        Emulator()
    Emulator(pictures="tiny")


async def test_an_emulator_starts_once_and_stops_twice() -> None:
    """Starting twice is an error, stopping twice is not; a taken port is an error."""
    emulator = Emulator(pictures="tiny")
    assert repr(emulator).startswith("Emulator(not running")
    async with emulator:
        assert emulator.base_url == f"http://127.0.0.1:{emulator.port}"
        assert emulator.base_url in repr(emulator)
        with pytest.raises(RuntimeError, match="running already"):
            await emulator.start()
        with pytest.raises(OSError, match="address already in use"):
            await Emulator(pictures="tiny", port=emulator.port).start()
    await emulator.aclose()


async def test_the_time_scale_is_the_clocks() -> None:
    """With a time scale the emulator's clock runs faster."""
    emulator = Emulator(pictures="tiny", time_scale=60)
    assert isinstance(emulator.clock, RealClock)
    assert emulator.clock.scale == 60


async def test_serving_says_where() -> None:
    """`serve` prints what a client's environment needs, and serves until cancelled."""
    out = io.StringIO()
    emulator = Emulator(pictures="tiny")
    serving = asyncio.create_task(serve(emulator, out=out))
    while "KEY" not in out.getvalue():  # noqa: ASYNC110 - a file tells nobody that it grows
        await asyncio.sleep(0.001)
    settings = dict(line.split("=") for line in out.getvalue().splitlines())
    assert settings == {
        "EVOLINK_BASE_URL": emulator.base_url,
        "EVOLINK_API_KEY": emulator.api_key,
    }
    async with calling(emulator) as api:
        assert (await api.get("/v1/credits")).status == 200
    serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await serving


def test_the_command_serves_until_interrupted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command passes its options on and ends with 0 when interrupted."""
    made: list[Emulator] = []

    async def interrupted(emulator: Emulator) -> None:
        made.append(emulator)
        raise KeyboardInterrupt

    monkeypatch.setattr("evolink_async.emulator.__main__.serve", interrupted)
    arguments = (
        "--port 0 --api-key k --credits 5 --duration 1 2 --time-scale 3 --pictures tiny "
        "--string-codes --without list --without batch --model wan9 --price 2 --max-body 500 "
        "--callback-origin http://127.0.0.1:9 --estimate 7 --seed 3 --host 127.0.0.2"
    )
    assert main(arguments.split()) == 0
    (emulator,) = made
    assert (emulator.port, emulator.api_key, emulator.books.remaining) == (0, "k", 5)
    assert (emulator.host, emulator.callback_origin) == ("127.0.0.2", "http://127.0.0.1:9")
    assert emulator.without == {"list", "batch"}


async def test_the_command_makes_the_emulator_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The options that switch something on or off take effect when it serves."""
    made: list[Emulator] = []

    async def kept(emulator: Emulator) -> None:
        made.append(emulator)

    monkeypatch.setattr("evolink_async.emulator.__main__.serve", kept)
    arguments = "--port 0 --pictures tiny --string-codes --without list --model wan9 --price 2"
    assert await asyncio.to_thread(main, arguments.split()) == 0
    async with made[0] as emulator, calling(emulator) as api:
        refused = await api.get("/v1/tasks/task-unknown")
        assert refused.error["code"] == "not_found"
        assert (await api.get("/v1/tasks")).status == 404
        accepted = await api.submit(model="wan9")
        assert accepted.json["usage"]["credits_reserved"] == 2


def test_the_command_has_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    """Each setting that is not a Python object has an option, and `--help` names all of them."""
    options = vars(parser().parse_args([]))
    settings = set(inspect.signature(Emulator).parameters)
    assert set(options) == settings - {"clock", "faults"}
    with pytest.raises(SystemExit) as info:
        main(["--help"])
    assert info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert all(feature in text for feature in FEATURES)
    assert "--callback-origin URL" in text


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--port 70000", "port must be a whole number from 0 to 65535, not 70000"),
        ("--port x", "argument --port: invalid int value: 'x'"),
        ("--without everything", "without must be a tuple, each one of batch"),
        ("--callback-origin here", "callback_origin must be an origin such as http://127.0.0.1:"),
        ("--duration 5 2", "duration must be a number from 0"),
        ("--duration nan 2", "duration must be a number from 0"),
        ("--credits -1", "credits must be a number from 0"),
        ("--colour red", "unrecognized arguments: --colour red"),
        ("--pictures large", "argument --pictures: invalid choice: 'large'"),
    ],
)
def test_the_command_refuses_in_one_line(
    arguments: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A wrong option or value is one line that says what is allowed, and exit code 2."""
    try:
        code: Any = main(["--pictures", "tiny", *arguments.split()])
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert (code, error.count("\n")) == (2, 1)
    assert error.startswith(f"error: {words}")


async def test_the_command_reports_a_taken_port(capsys: pytest.CaptureFixture[str]) -> None:
    """A port that is taken is one line and an exit code."""
    async with Emulator(pictures="tiny") as emulator:
        arguments = ["--port", str(emulator.port), "--pictures", "tiny"]
        assert await asyncio.to_thread(main, arguments) == 3
    assert f"cannot listen on 127.0.0.1 port {emulator.port}" in capsys.readouterr().err


async def test_the_key_may_hold_any_character() -> None:
    """Keys are compared as bytes, whatever is sent."""
    async with Emulator(pictures="tiny") as emulator, calling(emulator) as api:
        reader, writer = await asyncio.open_connection("127.0.0.1", emulator.port)
        writer.write(
            b"GET /v1/credits HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer \xff\xfe\r\n"
            b"Connection: close\r\n\r\n"
        )
        answer = await reader.read()
        writer.close()
        assert answer.startswith(b"HTTP/1.1 401 ")
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == 401
        assert (await api.get("/v1/credits")).status == 200
