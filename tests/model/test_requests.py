"""Requests, checked to the exact boundaries of the API's page."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import attrs
import pytest
from strategies import nested

from evolink_async import ImageRequest, RawRequest, RequestValidationError
from evolink_async._model.requests import as_request, check_task_id

HUGE = pytest.param(10**5000, id="huge")  # Python refuses to show it

HUGE = pytest.param(10**5000, id="huge")  # Python refuses to show it


def refused(field: str, make: Callable[[], object]) -> RequestValidationError:
    """The error of *make*, which must be about *field*."""
    with pytest.raises(RequestValidationError) as caught:
        make()
    assert caught.value.field == field
    assert caught.value.allowed
    assert field in str(caught.value)
    return caught.value


# -- the contract ------------------------------------------------------------------------------


def test_fields_left_out_are_not_sent() -> None:
    """A prompt alone sends the prompt and the default model."""
    request = ImageRequest("A serene lake")
    assert request.body() == {"model": "wan2.5-text-to-image", "prompt": "A serene lake"}
    assert request.path == "/v1/images/generations"


def test_every_field_is_sent_as_given() -> None:
    """All six fields of the page, and what it does not know yet, reach the body."""
    request = ImageRequest(
        "A lake",
        model="wan2.5-text-to-image",
        size="1280x1280",
        n=4,
        prompt_extend=False,
        callback_url="https://example.com/done",
        extra={"seed": 7},
    )
    assert request.body() == {
        "model": "wan2.5-text-to-image",
        "prompt": "A lake",
        "size": "1280x1280",
        "n": 4,
        "prompt_extend": False,
        "callback_url": "https://example.com/done",
        "seed": 7,
    }


@pytest.mark.parametrize("prompt", ["x", "x" * 2000, "호" * 2000, "🌅" * 2000, " a "])
def test_prompts_within_the_limit(prompt: str) -> None:
    """1 to 2000 characters are taken, whatever they are made of."""
    assert ImageRequest(prompt).prompt == prompt


@pytest.mark.parametrize(
    "prompt", ["", " ", "\n\t", "x" * 2001, "호" * 2001, None, 5, b"x", "\ud800"]
)
def test_prompts_outside_the_limit(prompt: Any) -> None:
    """An empty prompt, one of 2001 characters, or one that is no text is refused."""
    refused("prompt", lambda: ImageRequest(prompt))


def test_a_long_prompt_says_how_long_it_is() -> None:
    """The message names the limit, the length, and the way past the check."""
    error = refused("prompt", lambda: ImageRequest("x" * 2001))
    assert "at most 2000 characters, this has 2001" in str(error)
    assert "validate=False" in str(error)
    assert error.value == "x" * 2001
    assert len(str(error)) < 300


@pytest.mark.parametrize(
    "size",
    [
        "768x768",
        "1440x1440",
        "1280x1280",
        "384x1536",  # 768*768 pixels, 1/4
        "1536x384",
        "720x2880",  # 1440*1440 pixels, 1/4
        "2880x720",
        "589x1002",  # 590 178 pixels
    ],
)
def test_sizes_on_the_boundary(size: str) -> None:
    """768x768 to 1440x1440 pixels in total, ratio 1/4 to 4, both ends included."""
    assert ImageRequest("x", size=size).body()["size"] == size


@pytest.mark.parametrize(
    "size",
    [
        "768x767",
        "767x768",
        "1440x1441",
        "1441x1440",
        "383x1540",  # ratio just below 1/4, pixels fine
        "1540x384",
        "719x2881",
        "1x589824",
        "0x0",
        "0768x768",
        "768X768",
        "768*768",
        "768x768 ",
        "768x768\n",
        "-768x-768",
        "\uff17\uff16\uff18x768",
        "1e3x1e3",
        "9999999999x1",
        "768",
        "",
        1280,
        ["768x768"],
    ],
)
def test_sizes_beyond_the_boundary(size: Any) -> None:
    """One pixel beyond the total or the ratio, or another spelling, is refused."""
    refused("size", lambda: ImageRequest("x", size=size))


@pytest.mark.parametrize("n", [1, 2, 4])
def test_numbers_of_pictures(n: int) -> None:
    """1, 2 and 4 pictures can be asked for."""
    assert ImageRequest("x", n=n).body()["n"] == n


@pytest.mark.parametrize("n", [0, 3, 5, -1, True, False, 1.0, 2.5, "1", [1], {}, HUGE])
def test_other_numbers_of_pictures(n: Any) -> None:
    """3, other numbers and other types are refused."""
    refused("n", lambda: ImageRequest("x", n=n))


@pytest.mark.parametrize("value", [0, 1, "true", [], "False"])
def test_prompt_extend_is_a_boolean(value: Any) -> None:
    """Only True and False are taken for prompt_extend."""
    refused("prompt_extend", lambda: ImageRequest("x", prompt_extend=value))


@pytest.mark.parametrize("model", ["wan2.5-image-to-image", "", None, 5, "WAN2.5-TEXT-TO-IMAGE"])
def test_other_models_need_the_way_past(model: Any) -> None:
    """A model whose rules are not on the page is refused, unless the check is switched off."""
    refused("model", lambda: ImageRequest("x", model=model))
    assert ImageRequest("x", model=model, validate=False).model == model


def callback(length: int) -> str:
    return "https://example.com/".ljust(length, "x")


@pytest.mark.parametrize(
    "url", ["https://example.com/done?id=1", "https://example.com:8443/", callback(2048)]
)
def test_callback_urls(url: str) -> None:
    """URLs with https, of at most 2048 characters on public hosts are taken."""
    assert ImageRequest("x", callback_url=url).callback_url == url


@pytest.mark.parametrize(
    "url",
    [
        callback(2049),
        "http://example.com/",
        "https://127.0.0.1/",
        "https://10.0.0.1/",
        "https://172.16.0.1/",
        "https://172.31.255.255/",
        "https://192.168.0.1/",
        "https://localhost/",
        "https://2130706433/",
        "https://[::ffff:10.0.0.1]/",
        "https://user@example.com/",
        "example.com",
        "",
        5,
    ],
)
def test_callback_urls_the_page_forbids(url: Any) -> None:
    """Other schemes, internal hosts and longer URLs are refused."""
    refused("callback_url", lambda: ImageRequest("x", callback_url=url))


def test_validate_false_lets_the_api_decide() -> None:
    """Unchecked, what JSON can say is sent as it is."""
    request = ImageRequest("x" * 3000, size="9x9", n=3, model="other", validate=False)
    assert request.body() == {"model": "other", "prompt": "x" * 3000, "size": "9x9", "n": 3}


@pytest.mark.parametrize("validate", [0, 1, "false", None])
def test_validate_is_a_boolean(validate: Any) -> None:
    """A word or number where True or False belongs does not switch the check off."""
    refused("validate", lambda: ImageRequest("x", validate=validate))


@pytest.mark.parametrize(
    "extra",
    [
        {"a": math.nan},
        {"a": math.inf},
        {"a": {1, 2}},
        {"a": b"x"},
        {"a": "\udfff"},
        {"\udfff": 1},
        {"a": 10**5000},
        {"a": nested(5000, objects=True)},
        {"a": nested(500, objects=False)},
        {1: 2},
        {"prompt": "twice"},
        {"model": "twice"},
        [("a", 1)],
        None,
        "a",
    ],
    ids=range(15),
)
def test_extra_is_a_json_object_of_other_fields(extra: Any) -> None:
    """What JSON or UTF-8 cannot say, and a field of the page, has no place in extra."""
    refused("extra", lambda: ImageRequest("x", extra=extra))


@pytest.mark.parametrize("value", [math.nan, {1}, HUGE, nested(500, objects=False), object()])
def test_unchecked_fields_must_still_be_json(value: Any) -> None:
    """validate=False does not send what JSON cannot say."""
    refused("n", lambda: ImageRequest("x", n=value, validate=False))


def test_a_request_keeps_its_own_copy() -> None:
    """Changing what a request was made of does not change the request."""
    inner = {"weight": 1}
    request, raw = ImageRequest("x", extra={"lora": inner}), RawRequest("/v1/x", body={"a": inner})
    inner["weight"] = 2
    assert request.body()["lora"] == {"weight": 1}
    assert raw.body() == {"a": {"weight": 1}}


def test_requests_are_values() -> None:
    """Requests are frozen, compared and hashed by content, and survive pickling."""
    request, raw = ImageRequest("x", n=2, extra={"a": [1]}), RawRequest("/v1/x", body={"a": 1})
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        request.n = 4  # type: ignore[misc]  # what is being tested
    for value in (request, raw):
        assert pickle.loads(pickle.dumps(value)) == value  # noqa: S301 - just made here
        assert copy.deepcopy(value) == value
        assert hash(copy.copy(value)) == hash(value)
    assert request != ImageRequest("x", n=2)
    assert raw != RawRequest("/v1/x", body={"a": 2})


# -- what users write --------------------------------------------------------------------------


def test_a_request_from_what_users_write() -> None:
    """A prompt with fields, a mapping and a request all make the same request."""
    expected = ImageRequest("A lake", n=2)
    assert as_request("A lake", n=2) == expected
    assert as_request({"prompt": "A lake", "n": 2}) == expected
    assert as_request({"prompt": "A lake"}, n=2) == expected
    assert as_request(expected) is expected


def test_a_mapping_with_a_path_is_a_raw_request() -> None:
    """A path says that the mapping is a request to another endpoint."""
    request = as_request({"path": "/v1/videos/generations", "body": {"model": "m", "prompt": "p"}})
    assert isinstance(request, RawRequest)
    assert (request.model, request.prompt, request.callback_url) == ("m", "p", None)
    assert request.body() == {"model": "m", "prompt": "p"}


def test_a_raw_request_tells_what_its_body_says() -> None:
    """Model, prompt and callback of a body of other types read as absent."""
    odd = RawRequest("/v1/x", body={"model": 1, "prompt": None, "callback_url": []})
    assert (odd.model, odd.prompt, odd.callback_url) == ("", "", None)
    assert RawRequest("/v1/x", body={"callback_url": "https://a.b/"}).callback_url == "https://a.b/"


@pytest.mark.parametrize(
    ("field", "request_", "fields"),
    [
        ("request", 5, {}),
        ("request", None, {}),
        ("request", b"x", {}),
        ("request", ["x"], {}),
        ("request", nested(5000, objects=False), {}),
        ("request", ImageRequest("x"), {"n": 2}),
        ("request", {"path": "/v1/x"}, {}),
        ("request", {"path": "/v1/x", "body": {}, "n": 1}, {}),
        ("prompt", {}, {}),
        ("prompt", {"prompt": None}, {}),
        ("aspect_ratio", "x", {"aspect_ratio": "1:1"}),
        ("path", "x", {"path": "/v1/x"}),
        ("1", {1: 2}, {}),
    ],
    ids=range(13),
)
def test_what_is_not_a_request(field: str, request_: object, fields: dict[str, Any]) -> None:
    """Anything else is refused by the name of what is wrong."""
    refused(field, lambda: as_request(request_, **fields))


def test_an_unknown_field_says_where_new_fields_go() -> None:
    """The message lists the fields there are and names extra."""
    error = refused("aspect_ratio", lambda: as_request("x", aspect_ratio="1:1"))
    assert "prompt_extend" in str(error)
    assert "extra={...}" in str(error)
    assert error.value == "1:1"


@pytest.mark.parametrize(
    "path",
    [
        "/v1/videos/generations",
        "/v1/audios/generations",
        "/v1/images/generations",
        "/v2/a.b_c~d-e/x",
        "/a",
    ],
)
def test_paths_of_other_endpoints(path: str) -> None:
    """An absolute path is sent as it is."""
    assert RawRequest(path, body={}).path == path


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "v1/x",
        "//evil.example/x",
        "///evil.example/x",
        "/v1//x",
        "/v1/x/",
        "/\\evil.example/x",
        "https://evil.example/x",
        "/https://evil.example",
        "/v1/../x",
        "/..",
        "/v1/./x",
        "/.well-known",
        "/v1/x?y",
        "/v1/x#y",
        "/v1/%2e%2e/x",
        "/v1/x y",
        "/v1/x\n",
        "/v1/x\t",
        "\n/v1/x",
        "/@evil.example",
        "/v1/\u2179",
        ":80/x",
        b"/v1/x",
        None,
    ],
)
def test_paths_that_could_lead_elsewhere(path: Any) -> None:
    """A path with a host, scheme, query, dot segment or an escape is refused."""
    refused("path", lambda: RawRequest(path, body={}))


@pytest.mark.parametrize("body", [[], None, "x", {1: 2}, {"a": math.nan}, {"a": b""}])
def test_a_raw_body_is_a_json_object(body: Any) -> None:
    """Anything but a JSON object is refused as a body."""
    refused("body", lambda: RawRequest("/v1/x", body=body))


@pytest.mark.parametrize("value", [5, None, "path", [{}], {"path": "/v1/x"}, {"body": {}}])
def test_a_raw_request_is_read_from_both_its_fields(value: Any) -> None:
    """Only a mapping of exactly path and body is read back."""
    refused("request", lambda: RawRequest.from_json(value))


# -- task ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task_id", ["abcd", "x" * 128, "task-unified-1757156493-imcg5zqt", "a:b.c_d-e", "...a"]
)
def test_task_ids(task_id: str) -> None:
    """4 to 128 characters of the documented alphabet are a task id."""
    assert check_task_id(task_id) == task_id


@pytest.mark.parametrize(
    "task_id",
    [
        *("abc", "x" * 129, "", "....", "a/b/c", "../..", "abc%2f", "abcd\n", "ab d"),
        *("таск-1", "task-\u0661", None, 12345, b"abcd", 10**5000),
    ],
    ids=range(15),
)
def test_what_is_not_a_task_id(task_id: Any) -> None:
    """Other lengths and characters, and dots alone, are refused."""
    refused("task_id", lambda: check_task_id(task_id))
