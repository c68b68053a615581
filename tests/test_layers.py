"""Which room of the package may import which, checked by parsing the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import frozen

import evolink_async

ROOT = Path(evolink_async.__file__).parent
# Rooms by floor: a room imports rooms of lower floors, and of its own where it says so.
FLOORS: tuple[tuple[str, ...], ...] = (
    ("errors", "_text", "_clock", "_files", "_checks"),
    ("_hosts",),
    ("_model",),
    ("_http",),
    ("_polling", "_results"),
    ("_settings", "_stats", "_callback", "_list", "_task", "_map", "_session"),
    ("batch", "webhook"),
    ("__init__", "_cli", "__main__", "pytest_plugin"),
)
# What a room may import from its own floor.
BESIDE: dict[str, str] = {
    "_clock": "",
    "_files": "_text errors",
    "_checks": "_text errors",
    "errors": "",
    "_text": "",
    "_map": "_task",
    "_session": "_settings _stats _callback _list _task _map",
    "__main__": "_cli",
}
# Rooms of a lower floor that a room must not import.
NEVER: dict[str, str] = {"_polling": "_http", "_map": "_polling"}
# The front door re-exports the package, and programs may start the emulator.
PROGRAMS = {"_cli", "pytest_plugin"}
# For annotations only: what would be a cycle, or load aiohttp, at run time.
TYPES_ONLY: dict[str, str] = {"errors": "_model"}
ELSEWHERE = {"_exit", "_Hash", "_get_running_loop"}  # of the standard library

AIOHTTP_CLIENTS = {"_http/transport.py", "_results/fetch.py"}
AIOHTTP_SERVERS = {"webhook.py"}
TENACITY = {"_http/retry.py", "_polling/policy.py"}


@frozen
class Import:
    """One import: the module, the name taken from it, and whether only type checkers see it."""

    module: str
    name: str | None
    types_only: bool


def imports_of(tree: ast.AST, *, types_only: bool = False) -> Iterator[Import]:
    """Every import in *tree*, those inside functions and after conditions included."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in {
            "TYPE_CHECKING",
            "typing.TYPE_CHECKING",
        }:
            for child in node.body:
                yield from _imports_in(child, types_only=True)
            for child in node.orelse:
                yield from _imports_in(child, types_only=types_only)
        else:
            yield from _imports_in(node, types_only=types_only)


def _imports_in(node: ast.AST, *, types_only: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, None, types_only)
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports are absolute"
        for alias in node.names:
            yield Import(node.module or "", alias.name, types_only)
    elif (
        isinstance(node, ast.Call)
        and ast.unparse(node.func).endswith(("import_module", "__import__"))
        and node.args
        and isinstance(node.args[0], ast.Constant)
    ):
        yield Import(str(node.args[0].value), None, types_only)
    yield from imports_of(node, types_only=types_only)


def own_room(found: Import) -> str | None:
    """The room of this package that is imported; None for other people's modules."""
    package, _, rest = found.module.partition(".")
    if package != "evolink_async":
        return None
    if rest:
        return rest.split(".")[0]
    name = found.name
    inside = name is not None and ((ROOT / f"{name}.py").exists() or (ROOT / name).is_dir())
    return name if inside else "__init__"


def room_of(path: str) -> str:
    """The room a module lives in: its folder, or itself at the top."""
    return path.removesuffix(".py").split("/")[0]


SOURCES = {path.relative_to(ROOT).as_posix(): path for path in sorted(ROOT.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text("utf-8")) for name, path in SOURCES.items()}
MODULES = {n: list(imports_of(t)) for n, t in TREES.items() if room_of(n) != "emulator"}
EMULATOR = {n: list(imports_of(t)) for n, t in TREES.items() if room_of(n) == "emulator"}
ROOMS = [room for floor in FLOORS for room in floor]


def may_import(room: str) -> set[str]:
    """The rooms that *room* may import, itself among them."""
    (floor,) = (k for k, rooms in enumerate(FLOORS) if room in rooms)
    lower = {below for rooms in FLOORS[:floor] for below in rooms}
    beside = set(BESIDE.get(room, "").split())
    programs = {"emulator", "__init__"} if room in PROGRAMS else set()
    return (lower | beside | programs | {room}) - set(NEVER.get(room, "").split())


def test_every_room_has_a_floor() -> None:
    """A new room is given its place in the table, and one that is gone leaves it."""
    assert {room_of(name) for name in MODULES} == set(ROOMS)


def test_nothing_on_one_floor_is_a_cycle() -> None:
    """Rooms of one floor that know each other do so in one direction."""
    for room, others in BESIDE.items():
        for other in others.split():
            assert room not in BESIDE.get(other, "").split()


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_lower_floors_only(module: str) -> None:
    """Each module imports what its room allows, also inside functions and for types."""
    room = room_of(module)
    for found in MODULES[module]:
        own = own_room(found)
        if own is not None:
            extra = set(TYPES_ONLY.get(room, "").split()) if found.types_only else set()
            assert own in may_import(room) | extra, f"{module} imports {own}"


def test_the_exceptions_are_needed() -> None:
    """An exception for types that nobody uses any more is removed."""
    for room, names in TYPES_ONLY.items():
        used = {
            own_room(found)
            for module, all_found in MODULES.items()
            if room_of(module) == room
            for found in all_found
            if found.types_only
        }
        assert set(names.split()) <= used


def private_names(tree: ast.AST) -> Iterator[str]:
    """Names with an underscore that *tree* defines, as a variable, function or attribute."""
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name
            case ast.ClassDef(name=name) | ast.Name(id=name, ctx=ast.Store()):
                yield name
            case ast.Attribute(value=ast.Name(id="self" | "cls"), attr=name, ctx=ast.Store()):
                yield name
            case ast.Constant(value=str(name)):  # __slots__
                yield name


def private_access(tree: ast.AST) -> Iterator[str]:
    """Names with an underscore that are asked of something else than ``self``."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="self" | "cls")):
                pass
            case ast.Attribute(attr=name) if name.startswith("_") and not name.endswith("__"):
                yield name


def is_private(name: str | None) -> bool:
    return name is not None and name.startswith("_") and not name.endswith("__")


@pytest.mark.parametrize("module", SOURCES)
def test_no_room_reaches_into_another(module: str) -> None:
    """What begins with an underscore is used in its own room only: anything else is an arrow."""
    room = room_of(module)
    own = {
        name for other in SOURCES if room_of(other) == room for name in private_names(TREES[other])
    }
    for name in private_access(TREES[module]):
        assert name in own | ELSEWHERE, f"{module} reaches for {name}"
    for found in imports_of(TREES[module]):
        inside = own_room(found)
        if inside is not None and inside != room and found.module != "evolink_async":
            assert not is_private(found.name), f"{module} imports {found.name} of {found.module}"


@pytest.mark.parametrize(
    ("source", "reaches"),
    [
        ("self._a", []),
        ("other._a", ["_a"]),
        ("self._a._b", ["_b"]),
        ("f()._a = 1", ["_a"]),
        ("cls.__name__", []),
    ],
)
def test_private_access_is_found(source: str, reaches: list[str]) -> None:
    """Whatever stands before the dot, but for ``self``, counts."""
    assert list(private_access(ast.parse(source))) == reaches


@pytest.mark.parametrize("path", EMULATOR)
def test_the_emulator_is_independent(path: str) -> None:
    """The emulator is a second implementation of the API: it imports nothing of the client."""
    for found in EMULATOR[path]:
        assert own_room(found) in {None, "emulator"}, found
        if found.module == "evolink_async":
            assert found.name == "emulator"


def test_only_two_modules_open_connections() -> None:
    """The client of aiohttp lives in the transport and where results are fetched."""
    for module, found in MODULES.items():
        for one in found:
            if one.module.split(".")[0] not in {"aiohttp", "yarl"} or one.types_only:
                continue
            serves = module in AIOHTTP_SERVERS and (one.module, one.name) == ("aiohttp", "web")
            assert module in AIOHTTP_CLIENTS or serves, f"{module} imports {one.module}"


def test_only_one_module_retries() -> None:
    """The loops of tenacity live in _http/retry; a policy may know its wait strategies."""
    for module, found in MODULES.items():
        for one in found:
            if one.module.split(".")[0] == "tenacity":
                assert module in TENACITY, module
                harmless = one.name is not None and (
                    one.name == "RetryCallState" or "retry" not in one.name.lower()
                )
                assert module == "_http/retry.py" or harmless, f"{module} imports {one.name}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import evolink_async._a", ("_a", False)),
        ("from evolink_async._a import b", ("_a", False)),
        ("from evolink_async._a.b import c", ("_a", False)),
        ("from evolink_async import _http", ("_http", False)),
        ("from evolink_async import Session", ("__init__", False)),
        ("from evolink_async.emulator.faults import Status", ("emulator", False)),
        ("def f():\n    from evolink_async._a import b", ("_a", False)),
        ("try:\n    pass\nexcept E:\n    import evolink_async._a", ("_a", False)),
        ("x = importlib.import_module('evolink_async._a')", ("_a", False)),
        ("if TYPE_CHECKING:\n    from evolink_async._a import b", ("_a", True)),
        ("if TYPE_CHECKING:\n    pass\nelse:\n    import evolink_async._a", ("_a", False)),
    ],
)
def test_imports_are_found(source: str, expected: tuple[str, bool]) -> None:
    """Every way of importing is found by the function that the tests above rely on."""
    (found,) = imports_of(ast.parse(source))
    assert (own_room(found), found.types_only) == expected
