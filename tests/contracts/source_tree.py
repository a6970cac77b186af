"""The source files as the contract tests read them: modules, their imports, functions and classes."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("blip2_actor", "pipeline", "deploy")


@dataclass(frozen=True)
class Module:
    """One Python file, by its path relative to the root."""

    path: str

    @property
    def name(self) -> str:
        """The dotted name; for an `__init__.py`, that of its package."""
        return self.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @cached_property
    def text(self) -> str:
        return (ROOT / self.path).read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def imported_names(self) -> Iterator[tuple[str, str | None]]:
        """Each import as (module, name in it or None), at the top, in functions and under TYPE_CHECKING."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                yield from ((alias.name, None) for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{self.path}:{node.lineno}: imports are absolute in this project"
                yield from ((node.module or "", alias.name) for alias in node.names)

    @property
    def functions(self) -> Iterator[tuple[str, int]]:
        """Each function as (name, number of lines from `def` to its last line, without its docstring)."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                docstring = node.body[0] if ast.get_docstring(node) is not None else None
                yield node.name, _num_lines(node) - (_num_lines(docstring) if docstring else 0)

    @property
    def defined_names(self) -> set[str]:
        """The names of the classes, functions, methods and module constants that the file defines."""
        names = {
            node.name
            for node in ast.walk(self.tree)
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        }
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Assign):
                names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
        return names


def _num_lines(node: ast.stmt) -> int:
    return (node.end_lineno or node.lineno) - node.lineno + 1


@cache
def modules(*folders: str) -> list[Module]:
    """Return every Python file below the folders."""
    files = (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    return [Module(file.relative_to(ROOT).as_posix()) for file in files]
