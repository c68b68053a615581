"""The floors of the package: which module may import which, held by reading the imports."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from attrs import frozen

import evolink_async

ROOT = Path(evolink_async.__file__).parent
PLAIN = "_text _clock _secret _hosts"  # floor 1, about nothing but themselves

# Lower floors first; a module may import the modules named, and nothing above itself.
FLOORS: dict[str, str] = {
    # 1: values, words and rules; no I/O
    "errors": "",
    "_text": "",
    "_clock": "",
    "_secret": "_text",
    "_hosts": "errors _text",
    "_json": "",
    "_models": "errors _text _hosts _json",
    "_polling": "errors _text",
    "_skim": "",
    "_protocol": "errors _text _models _skim",
    # 2: the network, the disk, the loop; knows no session
    "_proxy": "errors _text _hosts",
    "_retry": "errors _protocol _text _clock",
    "_watch": "errors _models _polling",
    "_submission": "errors _models _watch",
    "_gate": "errors _text _clock _retry",
    "_batch_endpoint": "errors _protocol _retry _clock",
    "_transport": (
        f"errors _models _protocol _retry _batch_endpoint _gate _submission _proxy {PLAIN}"
    ),
    "_download": "errors _models _text _hosts",
    "_results": "errors _text _hosts _proxy _download",
    "_watcher": "errors _models _polling _protocol _watch _text _clock",
    "_ledger": "errors _text",
    # 3: what a user holds
    "_task": f"errors _models _watch _watcher _download {PLAIN}",
    "_session": (
        "errors _models _polling _protocol _retry _gate _submission _transport _results _download "
        f"_watch _watcher _task {PLAIN}"
    ),
    # 4: side topics
    "webhook": f"errors _models _session _task {PLAIN}",
    "_batch_input": "errors _text _models _ledger",
    "_batch_files": "errors _text _models _download _ledger",
    "_batch_money": "_ledger",
    "_gallery": "_text _ledger",
    "_batch_run": (f"errors _models _session _task _ledger _batch_files _batch_money {PLAIN}"),
    "batch": (
        "errors _models _session _task _ledger _batch_files _batch_input _batch_money _batch_run "
        "_gallery "
        f"{PLAIN}"
    ),
    # the front door re-exports floors 1 and 3
    "__init__": "errors _clock _models _polling _retry _session _task",
    # 5: programs and plugins
    "_batch_cli": f"errors _batch_input _retry _session batch emulator {PLAIN}",
    "_cli": (
        "_batch_cli __init__ errors _models _polling _protocol _retry _session _task webhook batch "
        "emulator "
        f"{PLAIN}"
    ),
    "__main__": "_cli",
    "pytest_plugin": "__init__ errors _session _task webhook batch emulator",
}
# For annotations only: what would be a cycle, or load aiohttp, at run time.
TYPES_ONLY: dict[str, str] = {"errors": "_models"}

AIOHTTP_CLIENTS = {"_transport", "_results"}
AIOHTTP_SERVERS = {"webhook"}
TENACITY = {"_retry", "_polling"}


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


def own_module(found: Import) -> str | None:
    """The module of this package that is imported; None for other people's."""
    package, _, rest = found.module.partition(".")
    if package != "evolink_async":
        return None
    if rest:
        return rest.split(".")[0]
    if found.name and (ROOT / f"{found.name}.py").exists():
        return found.name
    return "emulator" if found.name == "emulator" else "__init__"


def read(path: Path) -> list[Import]:
    return list(imports_of(ast.parse(path.read_text("utf-8"))))


MODULES = {path.stem: read(path) for path in sorted(ROOT.glob("*.py"))}
EMULATOR = {
    path.relative_to(ROOT).as_posix(): read(path) for path in sorted(ROOT.glob("emulator/**/*.py"))
}


def test_every_module_has_a_floor() -> None:
    """A new module is given its place in the table."""
    assert set(MODULES) <= set(FLOORS)


def test_the_table_points_down_only() -> None:
    """No module is allowed to import one listed after it, so there are no cycles."""
    above: set[str] = set(FLOORS)
    for module, allowed in FLOORS.items():
        assert not set(allowed.split()) & above, module
        above.discard(module)


@pytest.mark.parametrize("module", MODULES)
def test_modules_import_lower_floors_only(module: str) -> None:
    """Each module imports what its row allows, also inside functions and for types."""
    allowed = set(FLOORS[module].split())
    for found in MODULES[module]:
        own = own_module(found)
        if own is not None:
            extra = set(TYPES_ONLY.get(module, "").split()) if found.types_only else set()
            assert own in allowed | extra, f"{module} imports {own}"


def test_the_exceptions_are_needed() -> None:
    """An exception for types that nobody uses any more is removed."""
    for module, names in TYPES_ONLY.items():
        used = {own_module(found) for found in MODULES[module] if found.types_only}
        assert set(names.split()) <= used


@pytest.mark.parametrize("path", EMULATOR)
def test_the_emulator_is_independent(path: str) -> None:
    """The emulator is a second reading of the API: it imports nothing of the client."""
    for found in EMULATOR[path]:
        assert own_module(found) in {None, "emulator"}, found
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
    """The loops of tenacity live in _retry; a policy may know its wait strategies."""
    for module, found in MODULES.items():
        for one in found:
            if one.module.split(".")[0] == "tenacity":
                assert module in TENACITY, module
                harmless = one.name is not None and (
                    one.name == "RetryCallState" or "retry" not in one.name.lower()
                )
                assert module == "_retry" or harmless, f"{module} imports {one.name}"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import evolink_async._a", ("_a", False)),
        ("from evolink_async._a import b", ("_a", False)),
        ("from evolink_async import _gate", ("_gate", False)),
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
    """No way of importing escapes the reading that the tests above stand on."""
    (found,) = imports_of(ast.parse(source))
    assert (own_module(found), found.types_only) == expected
