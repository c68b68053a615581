"""The emulator does what its OpenAPI document says, in cases generated from the document.

``EVOLINK_TEST_EXAMPLES=200`` generates that many cases per operation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
from emulator_caller import calling
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evolink_async.emulator import FEATURES, Emulator, ManualClock
from evolink_async.emulator._contract import MODEL, OTHER_IMAGE_MODELS
from evolink_async.emulator._control import document

schemathesis = pytest.importorskip("schemathesis")

EXAMPLES = int(os.environ.get("EVOLINK_TEST_EXAMPLES", "25"))


def keeps_the_rules(size: tuple[int, int]) -> bool:
    width, height = size
    pixels = width * height
    return 768 * 768 <= pixels <= 1440 * 1440 and max(size) <= 4 * min(size)


sides = st.integers(384, 2880)
schemathesis.openapi.format(
    "evolink-size", st.tuples(sides, sides).filter(keeps_the_rules).map("{0[0]}x{0[1]}".format)
)
schemathesis.openapi.format(
    "evolink-callback-url",
    st.from_regex(r"https://[a-z]{1,20}\.example\.com(/[a-z0-9?=]{0,40})?", fullmatch=True),
)


@pytest.fixture(scope="module")
def emulator() -> Iterator[Emulator]:
    """An emulator in its own thread, with more credits than can be spent."""
    with Emulator(clock=ManualClock(), pictures="tiny", credits=10**9) as emulator:
        yield emulator


@pytest.fixture(scope="module")
def schemas(emulator: Emulator) -> dict[str, Any]:
    """The document it serves, as schemathesis reads it, for good and for bad requests.

    The one for bad requests has no security, so that they are sent with a good key.
    """
    url = f"{emulator.base_url}/openapi.json"
    open_to_all = document(emulator.base_url, frozenset())
    del open_to_all["security"]
    return {
        "POSITIVE": schemathesis.openapi.from_url(url),
        "NEGATIVE": schemathesis.openapi.from_dict(open_to_all),
    }


OPERATIONS = [
    (path, method, mode)
    for path, operations in document("", frozenset())["paths"].items()
    for method in operations
    for mode in ("POSITIVE", "NEGATIVE")
    if (path, mode) != ("/v1/credits", "NEGATIVE")  # it has no parameters to be wrong
]


@pytest.mark.parametrize(("path", "method", "mode"), OPERATIONS)
def test_any_request_is_answered_as_documented(
    schemas: dict[str, Any], emulator: Emulator, path: str, method: str, mode: str
) -> None:
    """Good requests are accepted, bad ones refused, and every answer is in the document."""
    generation_mode = schemathesis.GenerationMode[mode]
    cases = schemas[mode][path][method].as_strategy(generation_mode=generation_mode)

    @settings(
        max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), database=None
    )
    @given(case=cases)
    def check(case: Any) -> None:
        headers = {"Authorization": f"Bearer {emulator.api_key}"}
        case.call_and_validate(base_url=emulator.base_url, headers=headers)

    before = len(emulator.books.requests())
    check()
    answered = emulator.books.requests()[before:]
    assert len(answered) >= EXAMPLES
    assert all(each.status is not None and each.status < 500 for each in answered)


async def test_the_document_leaves_out_what_is_switched_off() -> None:
    """Without batch and list the document has neither."""
    async with (
        Emulator(clock=ManualClock(), pictures="tiny", without=FEATURES) as emulator,
        calling(emulator) as api,
    ):
        served = (await api.get("/openapi.json", headers={"Authorization": ""})).json
    assert served == document(emulator.base_url, frozenset(FEATURES))
    assert served["servers"] == [{"url": emulator.base_url}]
    assert sorted(served["paths"]) == [
        "/v1/audios/generations",
        "/v1/credits",
        "/v1/images/generations",
        "/v1/tasks/{task_id}",
        "/v1/videos/generations",
    ]


def test_the_document_names_the_models_of_the_contract() -> None:
    """The models in the data file are those that submits are checked against."""
    schemas = document("http://127.0.0.1", frozenset())["components"]["schemas"]
    strict, other = schemas["ImageRequest"]["oneOf"]
    assert strict["properties"]["model"] == {"const": MODEL}
    assert other["properties"]["model"] == {"enum": list(OTHER_IMAGE_MODELS)}
