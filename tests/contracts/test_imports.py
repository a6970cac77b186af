"""Who may import whom, checked in fresh interpreters."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Block())
{code}
"""


def run(blocked: list[str], code: str) -> subprocess.CompletedProcess[str]:
    script = BLOCK.format(blocked=blocked, code=code)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)


def test_the_engine_captions_where_ray_cannot_be_imported() -> None:
    code = """
import numpy as np
from blip2_actor import EngineConfig, Request
with EngineConfig(model="demo", device="cpu", num_threads=1).build() as engine:
    result = engine.generate([Request(image=np.zeros((64, 64, 3), np.uint8))])[0]
assert result.ok, result
"""
    done = run(["ray", "pyarrow", "fastapi", "pipeline", "deploy"], code)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_brings_no_torch() -> None:
    """Decode workers and drivers import it thousands of times."""
    done = run(
        ["torch", "transformers", "numpy"], "import blip2_actor, blip2_actor.preprocessing.decode_child"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("importer", "sibling"), [("pipeline", "deploy"), ("deploy", "pipeline")])
def test_siblings_do_not_import_each_other(importer: str, sibling: str) -> None:
    code = f"""
import importlib, pkgutil, {importer} as package
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    done = run([sibling], code)
    assert done.returncode == 0, done.stderr
