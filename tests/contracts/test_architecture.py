"""The shape of the source: no import circles, few files per folder, short functions, documents that match."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath

import pytest

from tests.contracts.source_tree import PACKAGES, ROOT, Module, modules

MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 300
MAX_ROOM_MODULES = 12
BIG_ROOMS = {"blip2_actor/models", "blip2_actor/engine", "pipeline/stages"}
"""Folders with one file per concept of the paper, concept of the engine, or stage."""

THE_ONE_CIRCLE = {
    "blip2_actor/config.py",
    "blip2_actor/engine/engine.py",
    "blip2_actor/engine/matching_engine.py",
}
"""A configuration builds its engine, and the engine takes the configuration: `EngineConfig(...).build()`."""


# Import circles -----------------------------------------------------------------------------------------


def import_graph(sources: list[Module]) -> dict[str, set[str]]:
    """Map each file to the files that it imports.

    `from package import name` leads to the module `package.name` when there is one; otherwise to the file
    that defines the name, through the package's `__init__.py`: its eager imports and its lazy ones
    (imports under TYPE_CHECKING there are what `__getattr__` imports on first use). Importing a submodule
    also runs the `__init__.py` of its packages; these arrows are left out, because an `__init__.py` is the
    list of a package's public names and depends on the files that define them, not the other way round.
    """
    by_name = {module.name: module for module in sources}
    exports = {
        module.name: dict(_exports(module)) for module in sources if module.path.endswith("__init__.py")
    }

    def resolve(module: str, name: str | None) -> str | None:
        if name is not None and f"{module}.{name}" in by_name:
            return by_name[f"{module}.{name}"].path
        if name is not None and name in exports.get(module, {}):
            return resolve(exports[module][name], name)
        return by_name[module].path if module in by_name else None

    return {
        source.path: {
            target
            for module, name in source.imported_names
            if (target := resolve(module, name)) is not None and target != source.path
        }
        for source in sources
    }


def _exports(module: Module) -> Iterator[tuple[str, str]]:
    """Return the names that an `__init__.py` takes from other modules, with the module of each."""
    for node in ast.walk(module.tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            yield from ((alias.asname or alias.name, node.module) for alias in node.names)


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the strongly connected components of more than one file (Tarjan's algorithm)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[set[str]] = []

    def visit(file: str) -> None:
        index[file] = low[file] = len(index)
        stack.append(file)
        for other in graph[file]:
            if other not in index:
                visit(other)
                low[file] = min(low[file], low[other])
            elif other in stack:
                low[file] = min(low[file], index[other])
        if low[file] == index[file]:
            start = stack.index(file)
            found.append(set(stack[start:]))
            del stack[start:]

    for file in graph:
        if file not in index:
            visit(file)
    return [component for component in found if len(component) > 1]


def test_no_files_import_each_other_in_a_circle() -> None:
    """Imports inside functions and under TYPE_CHECKING count: they are dependencies all the same."""
    found = circles(import_graph(modules(*PACKAGES)))
    wrong = [", ".join(sorted(component)) for component in found if component != THE_ONE_CIRCLE]
    assert not wrong, "\n".join(["these files import each other:", *wrong])
    assert THE_ONE_CIRCLE in found, "the permitted circle is gone; remove it from this test"


def test_lazy_names_are_counted() -> None:
    """`__getattr__` hides imports from `ast`, so each lazy name must also appear under TYPE_CHECKING."""
    import blip2_actor

    (package,) = [module for module in modules("blip2_actor") if module.name == "blip2_actor"]
    assert blip2_actor._LAZY.items() <= dict(_exports(package)).items()


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": set()}
    assert circles(graph) == [{"a", "b", "c"}]


# Sizes --------------------------------------------------------------------------------------------------


def test_no_room_holds_too_many_modules() -> None:
    """A reader should see a folder at one glance; `__init__.py` is not counted."""
    sources = modules(*PACKAGES, "benchmarks", "tests", "examples")
    rooms = Counter(
        PurePosixPath(module.path).parent.as_posix()
        for module in sources
        if not module.path.endswith("__init__.py")
    )
    large = [
        f"{room}/ holds {count} modules"
        for room, count in rooms.items()
        if count > MAX_ROOM_MODULES and room not in BIG_ROOMS
    ]
    assert not large, "\n".join(large)


def test_no_function_is_too_long() -> None:
    long = [
        f"{module.path}: {name} has {num_lines} lines"
        for module in modules(*PACKAGES, "benchmarks", "examples")
        for name, num_lines in module.functions
        if num_lines > MAX_FUNCTION_LINES
    ]
    assert not long, "\n".join(long)


def test_no_file_is_too_long() -> None:
    long = [
        f"{module.path} has {num_lines} lines"
        for module in modules(*PACKAGES, "benchmarks", "examples")
        if (num_lines := len(module.text.splitlines())) > MAX_FILE_LINES
    ]
    assert not long, "\n".join(long)


# Documents ----------------------------------------------------------------------------------------------

NAMED = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
FILE = re.compile(r"[\w./-]+(?:\.(?:py|md|yaml|toml|json|txt|html)|/)")
CLASS = re.compile(r"[A-Z][a-z0-9]+\w*|[A-Z]\d?[a-z]\w*")
FUNCTION = re.compile(r"[a-z_]\w*(?=\(\)$)")
NOT_OURS = {"Dataset", "Datasource", "Parquet"}
"""Classes of Ray and other packages that the documents name."""


@pytest.mark.parametrize("document", ["docs/architecture.md", "docs/glossary.md", "CONTRIBUTING.md"])
def test_documents_name_files_and_classes_that_exist(document: str) -> None:
    """Every file, folder, class or function() in backticks must exist.

    A bare file name counts as found below any folder; names with placeholders (`NAME`, `*`) are skipped.
    """
    text = re.sub(r"```.*?```", "", (ROOT / document).read_text(encoding="utf-8"), flags=re.DOTALL)
    sources = modules(*PACKAGES, "benchmarks", "tests", "examples")
    defined = {name for module in sources for name in module.defined_names}
    named = {name.split(".")[-1] if CLASS.match(name) else name for name in NAMED.findall(text)}
    missing = {name for name in named if FILE.fullmatch(name) and not _exists(name)}
    missing |= {name for name in named if CLASS.fullmatch(name) and name not in defined | NOT_OURS}
    missing |= {name for name in named if (m := FUNCTION.match(name)) and m[0] not in defined}
    assert not missing, f"{document} names what does not exist: {sorted(missing)}"
    assert len(named) >= 10, "the document names nothing in backticks; this test reads nothing"


def _exists(name: str) -> bool:
    if name.startswith(("_blip2/", "/")):  # in an output folder or in a URL
        return True
    if (ROOT / name).exists():
        return True
    folders = (*PACKAGES, "benchmarks", "docs", "examples", "tests")
    return "/" not in name and any(any((ROOT / folder).rglob(name)) for folder in folders)
