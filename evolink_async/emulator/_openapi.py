"""The API as an OpenAPI 3.1 document, true to the contract page.

What a schema cannot say, such as the number of pixels in a size, is in formats of our own:
``evolink-size``, ``evolink-callback-url``.
"""

from __future__ import annotations

from typing import Any

from evolink_async.emulator._contract import MODEL, OTHER_IMAGE_MODELS

__all__ = ["document"]

_Json = dict[str, Any]

_ERRORS = {
    "400": "the request breaks a rule",
    "401": "the API key is missing or wrong",
    "402": "the credits do not suffice",
    "403": "not allowed",
    "404": "unknown task or model",
    "409": "the Idempotency-Key came with another body",
    "413": "the body is too large",
    "429": "too many requests",
    "500": "internal error",
    "502": "the provider failed",
    "503": "not available now",
}
_NUMBER: _Json = {"type": "number", "minimum": 0}
_STRING: _Json = {"type": "string"}
_INTEGER: _Json = {"type": "integer"}
_TASK_ID: _Json = {"type": "string", "pattern": "^[A-Za-z0-9._:-]{4,128}$"}
_TYPE: _Json = {"type": "string", "enum": ["text", "image", "audio", "video"]}


def document(base_url: str, without: frozenset[str]) -> _Json:
    """The document of an emulator at *base_url* that does *without* some features."""
    paths = {
        "/v1/images/generations": {"post": _submit("image", _image_body())},
        "/v1/videos/generations": {"post": _submit("video", _generic_body())},
        "/v1/audios/generations": {"post": _submit("audio", _generic_body())},
        "/v1/tasks/{task_id}": {"get": _read()},
        "/v1/credits": {"get": _operation("credits", "What is left to spend", _ref("Credits"))},
    }
    if "list" not in without:
        paths["/v1/tasks"] = {"get": _list()}
    if "batch" not in without:
        paths["/v1/tasks/batch"] = {"post": _batch()}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "EvoLink generation tasks, emulated",
            "version": "1",
            "description": f"The contract is that of {MODEL}; other models are generic.",
        },
        "servers": [{"url": base_url}],
        "security": [{"bearer": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Task": _task(),
                "TaskSummary": _summary(),
                "Credits": _credits(),
                "Error": _error(),
            },
        },
    }


def _ref(name: str) -> _Json:
    return {"$ref": f"#/components/schemas/{name}"}


def _object(required: dict[str, _Json], **optional: _Json) -> _Json:
    """An object with these properties; others may come at any time."""
    return {
        "type": "object",
        "required": list(required),
        "properties": {**required, **optional},
    }


def _content(schema: _Json) -> _Json:
    return {"application/json": {"schema": schema}}


def _operation(name: str, summary: str, answer: _Json, **more: Any) -> _Json:
    header = {"X-Request-Id": {"schema": _STRING}}
    responses: _Json = {
        "200": {"description": summary, "headers": header, "content": _content(answer)}
    }
    for status, description in _ERRORS.items():
        responses[status] = {"description": description, "content": _content(_ref("Error"))}
    return {"operationId": name, "summary": summary, "responses": responses, **more}


def _submit(kind: str, body: _Json) -> _Json:
    key = {
        "name": "Idempotency-Key",
        "in": "header",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{16,96}$"},
    }
    return _operation(
        f"submit_{kind}",
        f"Submit a generation of type {kind}",
        _ref("Task"),
        parameters=[key],
        requestBody={"required": True, "content": _content(body)},
    )


def _image_body() -> _Json:
    strict = _object(
        {"model": {"const": MODEL}, "prompt": _prompt()},
        n={"type": "integer", "enum": [1, 2, 4]},
        **_common(),
    )
    other = _object(
        {"model": {"enum": list(OTHER_IMAGE_MODELS)}},
        prompt=_prompt(),
        n={"type": "integer", "minimum": 1, "maximum": 4},
        **_common(),
    )
    return {"oneOf": [strict, other]}


def _common() -> dict[str, _Json]:
    return {
        "size": {
            "type": "string",
            "format": "evolink-size",
            "description": "WIDTHxHEIGHT; 768x768 to 1440x1440 pixels in all, aspect 1/4 to 4.",
        },
        "prompt_extend": {"type": "boolean", "default": True},
        "callback_url": _callback_url(),
    }


def _generic_body() -> _Json:
    return _object(
        {"model": {"type": "string", "minLength": 1}},
        prompt=_prompt(),
        n={"type": "integer", "minimum": 1, "maximum": 4},
        prompt_extend={"type": "boolean"},
        callback_url=_callback_url(),
    )


def _prompt() -> _Json:
    return {
        "type": "string",
        "minLength": 1,
        "maxLength": 2000,
        "description": "At most 2000 tokens, which only the server can count.",
    }


def _callback_url() -> _Json:
    return {
        "type": "string",
        "format": "evolink-callback-url",
        "maxLength": 2048,
        "description": "https, and no internal address.",
    }


def _read() -> _Json:
    task_id = {"name": "task_id", "in": "path", "required": True, "schema": _TASK_ID}
    return _operation("read", "The task as it is now", _ref("Task"), parameters=[task_id])


def _batch() -> _Json:
    ids = {"type": "array", "items": _STRING, "minItems": 1, "maxItems": 50}
    return _operation(
        "read_many",
        "Many tasks as they are now; unknown ids are absent",
        _object({"data": {"type": "array", "items": _ref("Task")}}),
        requestBody={"required": True, "content": _content(_object({"task_ids": ids}))},
    )


def _list() -> _Json:
    status = {"type": "string", "enum": ["processing", "completed", "failed", "cancelled"]}
    page = {"type": "integer", "minimum": 1, "maximum": 10**9, "default": 1}
    page_size = {"type": "integer", "minimum": 1, "maximum": 50, "default": 20}
    filters = {
        "status": status, "type": _TYPE, "model": _STRING, "page": page, "page_size": page_size,
    }  # fmt: skip
    return _operation(
        "list",
        "The account's tasks, newest first",
        _object(
            {
                "data": {"type": "array", "items": _ref("TaskSummary")},
                "total": _INTEGER,
                "page": _INTEGER,
                "page_size": _INTEGER,
            }
        ),
        parameters=[
            {"name": name, "in": "query", "schema": schema} for name, schema in filters.items()
        ],
    )


def _task() -> _Json:
    url: _Json = {"type": "string", "format": "uri"}
    return _object(
        {
            "created": _INTEGER,
            "id": _TASK_ID,
            "model": _STRING,
            "object": {
                "type": "string",
                "pattern": "^(text|image|audio|video)\\.generation\\.task$",
            },
            "progress": {"type": "integer", "minimum": 0, "maximum": 100},
            "status": {
                "type": "string",
                "enum": ["pending", "processing", "completed", "failed", "cancelled"],
            },
            "task_info": _object(
                {
                    "can_cancel": {"type": "boolean"},
                    "estimated_time": {"type": "integer", "minimum": 0},
                }
            ),
            "type": _TYPE,
            "usage": _object(
                {
                    "billing_rule": {"enum": ["per_call", "per_token", "per_second"]},
                    "credits_reserved": _NUMBER,
                    "user_group": _STRING,
                },
                credits_used=_NUMBER,
                cost=_NUMBER,
            ),
        },
        results={"type": "array", "items": url},
        result_data={"type": "array", "items": {"type": "object"}},
        duration=_NUMBER,
        error=_object({"code": _STRING, "message": _STRING}, type=_STRING, suggestion=_STRING),
    )


def _summary() -> _Json:
    return _object(
        {
            "id": _TASK_ID,
            "model": _STRING,
            "type": _TYPE,
            "status": _STRING,
            "progress": _INTEGER,
            "created_at": _INTEGER,
            "duration": _NUMBER,
            "has_results": {"type": "boolean"},
            "result_count": _INTEGER,
            "has_error": {"type": "boolean"},
            "credits_used": _NUMBER,
        }
    )


def _credits() -> _Json:
    amounts = {"remaining_credits": _NUMBER, "used_credits": _NUMBER}
    return _object(
        {
            "success": {"const": True},
            "message": _STRING,
            "data": _object(
                {
                    "user": _object(amounts),
                    "token": _object({**amounts, "unlimited_credits": {"type": "boolean"}}),
                }
            ),
        }
    )


def _error() -> _Json:
    return _object(
        {
            "error": _object(
                {"code": {"type": ["integer", "string"]}, "message": _STRING, "type": _STRING},
                param=_STRING,
                fallback_suggestion=_STRING,
            )
        }
    )
