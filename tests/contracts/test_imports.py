"""Which package may import which, and what works without an extra, tested in fresh interpreters."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.inputs import png

BLOCK = """
import sys

class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked}:
            raise ImportError(f"{{name}} is blocked")

sys.meta_path.insert(0, Block())
{code}
"""
BATCH = ["ray", "pyarrow"]
"""The packages that the extra `batch` installs."""
SERVE = ["ray", "fastapi", "pydantic", "starlette"]
"""The packages that the extra `serve` installs."""


def run(blocked: list[str], code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run code in an interpreter that cannot import some packages."""
    script = BLOCK.format(blocked=blocked, code=code)
    return subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, timeout=120
    )


def run_module(blocked: list[str], module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line of a module without some packages."""
    return run(blocked, f"from {module} import main\nsys.exit(main())", *arguments)


def test_the_engine_captions_when_ray_cannot_be_imported() -> None:
    code = """
import numpy as np
from blip2_actor import EngineConfig, Request
with EngineConfig(model="demo", device="cpu", num_threads=1).build() as engine:
    result = engine.generate([Request(image=np.zeros((64, 64, 3), np.uint8))])[0]
assert result.ok, result
"""
    done = run(["ray", "pyarrow", "fastapi", "pipeline", "deploy"], code)
    assert done.returncode == 0, done.stderr


def test_importing_the_package_imports_no_torch() -> None:
    """Decoding processes and drivers import it thousands of times."""
    done = run(
        ["torch", "transformers", "numpy"], "import blip2_actor, blip2_actor.preprocessing.decode_child"
    )
    assert done.returncode == 0, done.stderr


def test_a_command_starts_ray_before_it_imports_ray_data() -> None:
    """Ray Data and pandas take half a second to import, which can pass while Ray starts."""
    code = """
import pipeline.cli.commands
assert "ray" in sys.modules
print(sorted({"ray.data", "pandas", "torch"}.intersection(sys.modules)))
"""
    assert run([], code).stdout == "[]\n"


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


@pytest.mark.parametrize("arguments", [["--help"], ["caption", "--help"], ["plan", "score", "--help"]])
def test_help_is_printed_without_any_extra(arguments: list[str]) -> None:
    """Help used to be a traceback, because the settings imported pyarrow for the names of the columns."""
    done = run_module([*BATCH, *SERVE, "torch", "numpy"], "pipeline.__main__", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("usage: blip2")


@pytest.mark.parametrize(
    ("blocked", "arguments", "said"),
    [
        (BATCH, "caption --input a --output b", "caption needs ray and pyarrow"),
        (["pyarrow"], "caption --input a --output b", "caption needs pyarrow"),
        (["ray"], "demo", "demo needs ray"),
        (BATCH, "plan embed --input a", "plan embed needs ray and pyarrow"),
        (BATCH, "retry --output a", "retry needs ray and pyarrow"),
        (BATCH, "status --output a", "status needs pyarrow"),
        (BATCH, "report --output a", "report needs pyarrow"),
    ],
)
def test_a_command_says_which_extra_brings_what_it_needs(
    blocked: list[str], arguments: str, said: str
) -> None:
    done = run_module(blocked, "pipeline.__main__", *arguments.split())
    assert done.returncode == 3, done.stderr
    assert done.stderr == f"blip2 {said}; run: pip install 'blip2-ray[batch]'\n"


@pytest.mark.parametrize("arguments", ["status --output {}", "report --output {}"])
def test_commands_that_need_no_ray_run_without_it(arguments: str, tmp_path) -> None:
    """They report that the folder holds no run, which proves that their own code ran."""
    done = run_module(["ray"], "pipeline.__main__", *arguments.format(tmp_path).split())
    assert done.returncode == 3
    assert str(tmp_path) in done.stderr and "Traceback" not in done.stderr


def test_the_endpoint_says_which_extra_brings_what_it_needs() -> None:
    done = run_module(SERVE, "deploy.__main__", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: blip2 serve"), done.stderr
    done = run_module(SERVE, "deploy.__main__", "--model", "demo")
    assert done.returncode == 3
    assert done.stderr == "blip2 serve needs ray and fastapi; run: pip install 'blip2-ray[serve]'\n"
    done = run_module(["python_multipart"], "deploy.__main__", "--model", "demo")
    assert done.stderr == "blip2 serve needs python_multipart; run: pip install 'blip2-ray[serve]'\n"
    done = run_module(SERVE, "deploy.check")
    assert done.returncode == 3
    assert done.stderr.endswith("needs ray and fastapi; run: pip install 'blip2-ray[serve]'\n")


@pytest.mark.parametrize(("uri", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_model_in_a_bucket_names_the_extra_of_its_store(
    uri: str, package: str, extra: str, tmp_path: Path
) -> None:
    code = "from pipeline.__main__ import main\nsys.exit(main())"
    (tmp_path / "a.png").write_bytes(png(0))
    arguments = f"caption --model {uri}://bucket/model --input {tmp_path} --output b".split()
    done = run([package], code, *arguments)
    assert done.returncode == 3, done.stderr
    assert f"run: pip install 'blip2-ray[{extra}]'" in done.stderr and "Traceback" not in done.stderr


def test_an_input_of_a_scheme_without_its_package_names_the_extra() -> None:
    code = """
from pipeline.storage import filesystems
filesystems.ARROW_SCHEMES = ()  # a build of Arrow without S3
try:
    filesystems.open_filesystem("s3://bucket/a")
except ValueError as error:
    sys.exit(str(error))
"""
    done = run(["s3fs"], code)
    assert "run: pip install 'blip2-ray[s3]'" in done.stderr
