"""The package's shape: names, version, documentation, what ships, what loading it costs."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import evolink_async

ROOT = Path(evolink_async.__file__).parent
PROJECT = ROOT.parent / "pyproject.toml"


def public_modules() -> Iterator[ModuleType]:
    """The package and its public modules, however deep."""
    yield evolink_async
    for info in pkgutil.walk_packages([str(ROOT)], "evolink_async."):
        if not any(part.startswith("_") for part in info.name.split(".")):
            yield importlib.import_module(info.name)


MODULES = {module.__name__: module for module in public_modules()}
every_module = pytest.mark.parametrize("name", MODULES)


def python(code: str) -> str:
    """What a fresh interpreter says to *code*."""
    done = subprocess.run(  # noqa: S603 - our own interpreter and code
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=ROOT.parent,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- names -------------------------------------------------------------------------------------


def test_the_front_door() -> None:
    """The names a user imports are these, and no others are on offer."""
    offered = {
        name
        for name, value in vars(evolink_async).items()
        if not name.startswith("_") and name != "annotations" and not inspect.ismodule(value)
    }
    assert offered | {"errors"} == set(evolink_async.__all__)


@every_module
def test_names_are_importable_and_sorted(name: str) -> None:
    """Each public module says what it offers: sorted, once each, all of it there."""
    module = MODULES[name]
    names: list[str] = module.__all__
    assert len(names) == len(set(names))
    assert names == sorted(names, key=lambda n: (not n.isupper(), not n[0].isupper(), n))
    for one in names:
        assert getattr(module, one) is not None
        assert not one.startswith("_")


def test_every_error_is_at_the_front_door() -> None:
    """What can be raised can be caught by the name the package has for it."""
    for name in evolink_async.errors.__all__:
        assert getattr(evolink_async, name) is getattr(evolink_async.errors, name)


def test_unknown_names_are_attribute_errors() -> None:
    """A misspelt name says which module has no such attribute."""
    with pytest.raises(AttributeError, match="'evolink_async' has no attribute 'Sesion'"):
        getattr(evolink_async, "Sesion")  # noqa: B009 - what is being tested


def test_the_users_file_uses_every_name() -> None:
    """The type-checked example of a user's program leaves no public name out."""
    tree = ast.parse(Path(__file__).with_name("typing_api.py").read_text("utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "evolink_async"
        for alias in node.names
    }
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    # Annotations are expressions of the tree as well, so used is everything that is.
    assert set(evolink_async.__all__) <= imported & used


# -- version and files -------------------------------------------------------------------------


def test_the_version_is_the_distributions() -> None:
    """__version__ is that of the installed distribution, and of the project file."""
    assert evolink_async.__version__ == distribution("evolink-async").version
    if PROJECT.exists():
        project = tomllib.loads(PROJECT.read_text("utf-8"))["project"]
        assert evolink_async.__version__ == project["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", evolink_async.__version__)


def test_type_checkers_are_told() -> None:
    """The marker that the package is typed ships with it."""
    assert (ROOT / "py.typed").is_file()


def test_the_core_needs_three_packages() -> None:
    """Without extras, aiohttp, attrs and tenacity are all that is installed."""
    required = distribution("evolink-async").requires or []
    core = {re.split(r"[^\w-]", line)[0] for line in required if "extra ==" not in line}
    assert core == {"aiohttp", "attrs", "tenacity"}
    assert all("<" not in line and "~=" not in line for line in required)


def test_the_command_and_its_extras() -> None:
    """The console script and the extras the documentation names exist."""
    found = distribution("evolink-async")
    scripts = {
        point.name: point.value for point in found.entry_points.select(group="console_scripts")
    }
    assert scripts == {"evolink-async": "evolink_async.__main__:main"}
    extras = set(found.metadata.get_all("Provides-Extra") or [])
    assert {"all", "cli", "emulator", "test"} <= extras
    assert found.metadata["License-Expression"] == "MIT"


# -- documentation -----------------------------------------------------------------------------


def parts_of(cls: type) -> Iterator[tuple[str, Any]]:
    """Public methods and properties a class defines itself."""
    for name in vars(cls):
        value = getattr(cls, name)
        if not name.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
            yield name, value


def is_sentence(text: str | None) -> bool:
    """True for a docstring whose first paragraph is prose that ends."""
    first = (text or "").strip().split("\n\n")[0]
    return len(first) > 10 and first.rstrip()[-1] in ".:"


@every_module
def test_every_public_name_is_documented(name: str) -> None:
    """Modules, classes, functions, methods and properties say what they are for."""
    module = MODULES[name]
    assert is_sentence(module.__doc__)
    for one in module.__all__:
        value = getattr(module, one)
        if inspect.isclass(value):
            assert is_sentence(vars(value).get("__doc__")), f"{name}.{one}"
            for part, member in parts_of(value):
                assert is_sentence(inspect.getdoc(member)), f"{name}.{one}.{part}"
        elif inspect.isroutine(value):
            assert is_sentence(value.__doc__), f"{name}.{one}"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: path.stem)
def test_every_module_says_what_it_does(path: Path) -> None:
    """Each file, public or not, begins with a sentence about itself."""
    assert is_sentence(ast.get_docstring(ast.parse(path.read_text("utf-8"))))


# -- what loading costs ------------------------------------------------------------------------


def test_importing_loads_no_aiohttp() -> None:
    """Programs and plugins that only import the package do not wait for aiohttp."""
    code = (
        "import sys; before = set(sys.modules); import evolink_async\n"
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    loaded = set(ast.literal_eval(python(code)))
    assert "evolink_async" in loaded
    assert not loaded & {"aiohttp", "yarl", "click", "rich", "PIL", "sqlite3"}


def test_a_session_can_be_made_without_aiohttp() -> None:
    """Aiohttp is loaded when a session opens, not when it is made."""
    code = "import evolink_async, sys; evolink_async.Session('k'); print('aiohttp' in sys.modules)"
    assert python(code).strip() == "False"
