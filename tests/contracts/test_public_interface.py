"""The public interface is a contract: siblings and users import from `blip2_actor`, never deeper."""

from __future__ import annotations

import ast
import importlib.metadata
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import blip2_actor
import pipeline
from blip2_actor import Engine, EngineBuilder, EngineConfig, EngineLike
from blip2_actor.testing import FakeEngine, FakeEngineConfig

ROOT = Path(__file__).parents[2]

PUBLIC = [
    "Blip2Actor",
    "Calibration",
    "Completion",
    "DecodePool",
    "DecodedImage",
    "Embedding",
    "Engine",
    "EngineBuilder",
    "EngineConfig",
    "EngineLike",
    "EngineStats",
    "Features",
    "FetchError",
    "FetchPolicy",
    "FinishReason",
    "GenerationOptions",
    "ImageLike",
    "ImageLimits",
    "LogitsProcessor",
    "Match",
    "MatchingConfig",
    "MatchingEngine",
    "ModelInfo",
    "QuantizationChoice",
    "Request",
    "Result",
    "ResultSheet",
    "SandboxReport",
    "Score",
    "Status",
    "TextFeatures",
    "__version__",
    "abstention_flags",
    "array_to_rgb",
    "decode_image",
    "fetch_image",
    "find_quality_flags",
    "fit_calibration",
    "free_bytes",
    "load_for_training",
    "load_retrieval_for_training",
    "require_image_layout",
    "resize_image",
    "resolve_device",
    "resolve_dtype",
    "save_model",
    "stricter_options",
    "upright_size",
]

OPEN_TO_SIBLINGS = (
    "blip2_actor.flags",
    "blip2_actor.inputs.field_types",
    "blip2_actor.version_flag",
    "blip2_actor.installation",
    "blip2_actor.testing",
    "blip2_actor.demo",
)


def test_the_public_names_are_frozen() -> None:
    assert blip2_actor.__all__ == PUBLIC


@pytest.mark.parametrize("package", [blip2_actor, pipeline])
def test_a_notebook_completes_every_public_name(package: ModuleType) -> None:
    """Names that are imported lazily used to be missing from `dir`."""
    assert set(package.__all__) <= set(dir(package))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_resolves(name: str) -> None:
    assert getattr(blip2_actor, name) is not None


def test_an_unknown_name_is_an_attribute_error() -> None:
    """`hasattr`, and tools that look for optional names, rely on it."""
    assert not hasattr(blip2_actor, "no_such_name")


def test_the_version_is_that_of_the_installed_package() -> None:
    try:
        installed = importlib.metadata.version("blip2-ray")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package is not installed")
    assert blip2_actor.__version__ == installed


def imported_modules(path: Path) -> Iterator[str]:
    """Return the modules of `blip2_actor` that a file imports, at any level."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [str(node.module), *(name for name in submodules if is_module(name))]
        else:
            continue
        yield from (name for name in names if name.partition(".")[0] == "blip2_actor")


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").exists()


@pytest.mark.parametrize("sibling", ["pipeline", "deploy"])
def test_siblings_import_the_public_interface_only(sibling: str) -> None:
    reached = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in (ROOT / sibling).rglob("*.py")
        for module in imported_modules(path)
        if module != "blip2_actor"
        and not any(module == name or module.startswith(f"{name}.") for name in OPEN_TO_SIBLINGS)
    }
    assert not reached


def test_modules_do_not_import_each_other_in_circles() -> None:
    """Only the configuration and the two engines that it builds may: it imports them to build them."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / "blip2_actor").rglob("*.py")
    }
    imports = {name: set(imported_modules(path)) - {name} for name, path in files.items()}

    def reachable(start: str) -> set[str]:
        found: set[str] = set()
        waiting = [start]
        while waiting:
            new = imports.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    in_circles = {name for name in files if name in reachable(name)}
    allowed = {"blip2_actor.config", "blip2_actor.engine.engine", "blip2_actor.engine.matching_engine"}
    assert in_circles == allowed


def test_configurations_and_engines_satisfy_their_protocols() -> None:
    """mypy checks these assignments; a missing method fails here too."""
    builders: list[EngineBuilder] = [EngineConfig(model="demo"), FakeEngineConfig()]
    engines: list[type[EngineLike]] = [Engine, FakeEngine]
    for builder in builders:
        assert method_names(EngineBuilder) <= set(dir(builder))
    for engine in engines:
        assert method_names(EngineLike) <= set(dir(engine))


def method_names(protocol: type) -> set[str]:
    return {name for name in dir(protocol) if not name.startswith("_") and callable(getattr(protocol, name))}
