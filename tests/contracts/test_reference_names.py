"""`docs/reference_names.md` lists every public name of the installed transformers' BLIP-2."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import blip2_actor
from tests.contracts.source_tree import ROOT

PAGE = ROOT / "docs" / "reference_names.md"
ROW = re.compile(r"^\| `([^`]+)` \| (present|different|absent) \| (.+) \|$", re.MULTILINE)
OURS = re.compile(r"`([A-Z]\w+)\.(\w+)[^`]*`|`([A-Z]\w+)`")
FILES = ("modeling_blip_2.py", "processing_blip_2.py", "configuration_blip_2.py")


def test_every_public_name_of_the_reference_is_listed_once() -> None:
    """A name that a newer transformers adds must be listed here, and one that it removes deleted."""
    listed = [name for name, _, _ in ROW.findall(PAGE.read_text(encoding="utf-8"))]
    assert len(listed) == len(set(listed))
    expected = set(reference_names())
    assert len(expected) > 80, "the reference's source was not found"
    assert set(listed) == expected


def test_every_name_of_this_package_on_the_page_exists() -> None:
    """A row that says where something is must not point to a name that no longer exists."""
    missing = []
    for _, state, where in ROW.findall(PAGE.read_text(encoding="utf-8")):
        names = OURS.findall(where)
        assert names or state == "absent", f"{where!r} names nothing of this package"
        missing += [name for name in names if not _exists(*name)]
    assert not missing


def reference_names() -> Iterator[str]:
    """Yield classes, the public methods and fields that they define, and the arguments of these methods.

    Building blocks that are not in `__all__`, such as `Blip2MLP`, are listed as classes only. Arguments are
    listed once for all classes, as `argument=`.
    """
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    for file in FILES:
        tree = ast.parse((Path(spec.origin).parent / "models/blip_2" / file).read_text(encoding="utf-8"))
        exported = _exported(tree)
        for node in tree.body:
            if isinstance(node, ast.ClassDef):
                yield node.name
                if node.name.endswith("ModelOutput") or (node.name in exported and "Config" not in node.name):
                    yield from _members(node)


def _exported(tree: ast.Module) -> list[str]:
    (names,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    return list(names)


def _members(node: ast.ClassDef) -> Iterator[str]:
    for member in node.body:
        if isinstance(member, ast.FunctionDef) and (member.name == "__call__" or member.name[0] != "_"):
            yield f"{node.name}.{member.name}"
            yield from (f"{argument.arg}=" for argument in member.args.args if argument.arg != "self")
        elif isinstance(member, ast.AnnAssign) and node.name.endswith("ModelOutput"):
            yield f"{node.name}.{ast.unparse(member.target)}"


def _exists(owner: str, member: str, alone: str) -> bool:
    if alone:
        return hasattr(blip2_actor, alone)
    cls = getattr(blip2_actor, owner, None)
    fields = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set()
    return cls is not None and (member in fields or hasattr(cls, member))
