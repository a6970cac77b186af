"""`blip2 doctor`: each problem is provoked, and found with a remedy."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import sys
from collections import namedtuple
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from huggingface_hub import constants

from blip2_actor import ModelInfo
from pipeline.cli.main import main
from pipeline.doctor import accelerator, doctor, machine, model, packages, ray_start, stores
from pipeline.finding import GIB, Finding
from pipeline.placement.cluster import Cluster, Node
from pipeline.settings.doctor_settings import DoctorSettings
from tests.integration.inputs import BROKEN, png, write_tar

Usage = namedtuple("Usage", "total used free")


def require(finding: Finding, verdict: str, found: str) -> None:
    assert (finding.verdict, finding.remedy is None) == (verdict, verdict == "ok"), finding
    assert found in finding.found


@pytest.fixture
def closed_port() -> Iterator[int]:
    """A port at which nothing answers."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


def test_python_elsewhere(monkeypatch):
    require(machine.check_python(), "ok", "on Linux")
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    require(machine.check_python(), "warn", "on Darwin")


@pytest.mark.parametrize(("free_gib", "verdict"), [(0.5, "fail"), (2, "warn"), (64, "ok")])
def test_memory(monkeypatch, tmp_path, free_gib, verdict):
    limit = tmp_path / "memory.max"
    limit.write_text(f"{3 << 20}\n")
    monkeypatch.setattr(machine, "free_bytes", lambda device: free_gib * GIB)
    monkeypatch.setattr(machine, "CGROUP_LIMITS", (tmp_path / "missing", limit))
    require(machine.check_memory(), verdict, "512 MiB free" if free_gib < 1 else f"{free_gib:.1f} GiB free")
    assert machine.container_limit() == 3 << 20
    limit.write_text("max\n")
    assert machine.container_limit() is None


def test_shared_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, 64 << 20))
    require(machine.check_shared_memory(), "warn", "64 MiB free")
    monkeypatch.undo()
    monkeypatch.setattr(machine, "SHARED_MEMORY", tmp_path / "missing")
    require(machine.check_shared_memory(), "warn", "is missing")


def test_open_files(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 8192))
    finding = machine.check_open_files()
    require(finding, "warn", "may open 1,024 files")
    assert finding.remedy == "run ulimit -n 8192 in the shell of the run"
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 1024))
    assert str(machine.check_open_files().remedy).startswith("raise the hard limit: "), (
        "ulimit changes nothing"
    )
    monkeypatch.setattr(resource, "getrlimit", lambda which: (resource.RLIM_INFINITY,) * 2)
    require(machine.check_open_files(), "ok", "unlimited")


def test_disks(monkeypatch, tmp_path):
    require(machine.check_disk("x", tmp_path / "not" / "there", 1, "X"), "ok", "free for")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, GIB))
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    require(machine.check_temporary_disk(), "warn", "1.0 GiB free")
    require(model.check_cache_disk(True), "warn", "1.0 GiB free")


def test_folders_that_cannot_be_written(monkeypatch, tmp_path):
    """They were "ok, 74 GiB free", and the run failed on them: Ray at its start, or the download."""
    monkeypatch.setattr(machine.os, "access", lambda path, mode: False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "of_ray"))
    found = f"{tmp_path / 'of_ray'} cannot be written"
    require(machine.check_temporary_disk(), "fail", found)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    require(model.check_cache_disk(True), "fail", "cannot be written")
    require(model.check_cache_disk(False), "warn", "cannot be written")
    (tmp_path / "hub").mkdir()  # and may hold the model
    require(model.check_cache_disk(True), "warn", "cannot be written")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    require(model.check_cache_disk(True), "warn", "cannot be written")


def test_a_build_of_torch_that_does_not_fit_the_driver(monkeypatch, tmp_path):
    monkeypatch.setattr(accelerator, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    require(accelerator.check_torch(), "fail", "built for the CPU, and this machine has an NVIDIA driver")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    require(accelerator.check_torch(), "fail", "sees no device of the NVIDIA driver")
    monkeypatch.setattr(accelerator, "NVIDIA_DRIVER", tmp_path / "missing")
    require(accelerator.check_torch(), "ok", "13.0")


def test_the_device_that_auto_takes(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    require(accelerator.check_device(), "ok", "CPU with")


def test_speed(monkeypatch):
    monkeypatch.setattr(accelerator, "PRODUCT_ROWS", 64)
    monkeypatch.setattr(accelerator, "COPIED_BYTES", 1 << 20)
    monkeypatch.setattr(accelerator, "MEASURED_S", 0.0)
    require(accelerator.check_speed(), "ok", "TFLOP/s in ")

    def no_kernel(*args: object, **options: object) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nsee the documentation")

    monkeypatch.setattr(torch, "randn", no_kernel)
    require(accelerator.check_speed(), "fail", "cannot compute on cpu: no kernel image is available")


def test_ray_that_cannot_be_imported(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    finding = ray_start.check_ray()
    require(finding, "fail", "cannot be imported: ModuleNotFoundError")
    assert finding.remedy == "run: pip install 'blip2-ray[batch]'"


@pytest.fixture
def ray_environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Variables of Ray that a test may set: they are as before afterwards."""
    for name in [*filter(lambda name: name.startswith("RAY_"), os.environ), "RAY_ADDRESS", "RAY_AUTH_MODE"]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_a_ray_that_does_not_start(ray_environment):
    def no_memory(**options: object) -> None:
        raise RuntimeError("The current node timed out.\nMore")

    ray_environment.setattr("ray.init", no_memory)
    finding = ray_start.check_ray()
    require(finding, "fail", "Ray did not start on this machine: The current node timed out")
    assert finding.remedy is not None
    assert "wait or free some" in finding.remedy


def test_a_cluster_that_is_not_there(ray_environment, closed_port):
    ray_environment.setenv("RAY_ADDRESS", f"127.0.0.1:{closed_port}")
    finding = ray_start.check_ray()
    require(finding, "fail", "nothing listens there")
    assert finding.remedy == (
        "start the cluster or correct RAY_ADDRESS, or unset it to start Ray on this machine"
    )


@pytest.mark.parametrize(
    ("answer", "verdict", "said"),
    [
        ("", "warn", "everybody can run code on it"),
        (
            "from ray.exceptions import AuthenticationError; raise AuthenticationError('no')",
            "ok",
            "for a token",
        ),
        ("raise TimeoutError", "ok", "it did not say whether it asks for a token"),
        ("import time; time.sleep(60)", "ok", "it did not say whether it asks for a token"),
    ],
)
def test_the_token_of_a_cluster(ray_environment, answer, verdict, said):
    """A cluster that ignores tokens was said to ask for one, because RAY_AUTH_MODE was set here."""
    cluster = Cluster((Node({"CPU": 8}),), is_local=False)
    head = SimpleNamespace(gcs_address="10.0.0.1:6379")
    ray_environment.setattr(ray_start, "connected", lambda: nullcontext(cluster))
    ray_environment.setattr("ray.get_runtime_context", lambda: head)
    ray_environment.setattr(ray_start, "ASK", answer)
    if "sleep" in answer:
        ray_environment.setattr(ray_start, "ANSWER_S", 0.1)
    ray_environment.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    ray_environment.setenv("RAY_AUTH_MODE", "token")
    finding = ray_start.check_ray()
    require(finding, verdict, "reaches 10.0.0.1:6379; the cluster has 8 CPU")
    assert finding.found.endswith(said)


def test_files_that_hide_packages(monkeypatch, tmp_path):
    (tmp_path / "torch").mkdir()
    require(packages.check_hidden_packages(tmp_path), "ok", "none")  # a folder without code hides nothing
    (tmp_path / "torch" / "__init__.py").touch()
    (tmp_path / "ray.py").touch()
    require(packages.check_hidden_packages(tmp_path), "warn", f"{tmp_path}/ray.py, {tmp_path}/torch/")
    monkeypatch.syspath_prepend(tmp_path)
    require(packages.check_hidden_packages(tmp_path), "fail", "ray.py")


def test_image_formats(monkeypatch):
    require(packages.check_image_formats(), "ok", "JPEG2000, HEIF")
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    finding = packages.check_image_formats()
    require(finding, "warn", "; not HEIF")
    assert finding.remedy == "run: pip install 'blip2-ray[heic]'"
    monkeypatch.setattr(packages, "FORMATS", ("JPEG", "PNG", "no such format"))
    monkeypatch.setattr(packages, "NEEDED_FORMATS", ("no such format",))
    require(packages.check_image_formats(), "fail", "JPEG, PNG; not no such format")


def test_what_is_sent(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    require(packages.check_what_is_sent(), "ok", "nothing")
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    require(packages.check_what_is_sent(), "ok", "requests to the hub name the versions")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    require(packages.check_what_is_sent(), "warn", "Ray sends usage statistics")


def test_a_hub_that_does_not_answer(monkeypatch, closed_port):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{closed_port}")
    monkeypatch.setattr(model, "get_token", lambda: "hf_secret")
    require(model.check_hub(is_needed=True), "fail", "does not answer")
    refused = f"http://127.0.0.1:{closed_port} does not answer: Connection refused"
    require(model.check_hub(is_needed=False), "warn", refused)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    finding = model.check_hub(is_needed=True)
    require(finding, "ok", "offline by HF_HUB_OFFLINE, with a token")
    assert "hf_secret" not in str(finding)


def test_whether_the_model_fits(monkeypatch, tmp_path):
    finding = model.check_model("demo", None)
    require(finding, "ok", ": fits")
    assert not re.search(r"\b0\.00 billion|\b0\.0 GiB", finding.found)
    assert model.count_parameters("demo", None) > 100_000
    require(model.check_model(str(tmp_path), None), "fail", str(tmp_path))
    info = ModelInfo(model="x", image_size_px=64, dtype="bfloat16", digest="")
    monkeypatch.setattr(model.EngineConfig, "info", lambda self: info)
    num_parameters = model.count_parameters("demo", None)
    monkeypatch.setattr(model, "ENCODER_PARAMETERS", num_parameters // 2)
    for bytes_per_parameter, verdict in (
        (2, "needs --quantize or --device-map"),
        (1, "needs --device-map"),
    ):
        free = bytes_per_parameter * num_parameters
        monkeypatch.setattr(model, "free_bytes", lambda device, free=free: free)
        require(model.check_model("demo", None), "warn", f"free on cpu: {verdict}")
    require(model.check_model(str(tmp_path), None), "fail", "holds no weights")
    (tmp_path / "pytorch_model.bin").write_bytes(bytes(4000))
    assert model.count_parameters(str(tmp_path), None) == 1000
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "demo"}')
    (tmp_path / "pytorch_model.bin").unlink()
    assert model.count_parameters(str(tmp_path), None) == num_parameters
    for text in ("{}", "[]", "{"):
        (tmp_path / "adapter_config.json").write_text(text)
        with pytest.raises(OSError, match=r"adapter_config.json in .* is damaged"):
            model.count_parameters(str(tmp_path), None)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda file: file.write_bytes(model.POINTER + b"/spec/v1\noid sha256:ab\nsize 9\n"), "Git LFS"),
        (lambda file: os.truncate(file, 5_000_000), "not a complete safetensors file"),
        (lambda file: os.truncate(file, 9), "not a complete safetensors file"),
        (
            lambda file: file.rename(f"{file}.index.json").write_text('{"weight_map": {"a": "1.x"}}'),
            "lacks 1.x",
        ),
    ],
)
def test_weights_that_are_not_whole(tmp_path, change, found):
    """A clone without Git LFS was a MemoryError, and the others were ok."""
    shutil.copytree(model.DEMO, tmp_path / "model")
    change(tmp_path / "model" / "model.safetensors")
    require(model.check_model(str(tmp_path / "model"), None), "fail", found)


def test_the_size_of_a_model_on_the_hub(monkeypatch):
    """The client raises errors of its HTTP library, which ended the command with a traceback."""

    def ask(found: object) -> None:
        def model_info(self, *args, **options):
            if isinstance(found, Exception):
                raise found
            return found

        monkeypatch.setattr(model.HfApi, "model_info", model_info)

    def not_cached(*args, **options):
        raise FileNotFoundError

    info = ModelInfo(model="x", image_size_px=64, dtype="bfloat16", digest="")
    monkeypatch.setattr(model.EngineConfig, "info", lambda self: info)
    monkeypatch.setattr(model, "snapshot_download", not_cached)
    monkeypatch.setattr(model, "free_bytes", lambda device: 8 * GIB)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    ask(RuntimeError("no route"))
    require(model.check_model("who/knows", None), "warn", "its size is unknown: the hub does not tell it (no")
    ask(SimpleNamespace(safetensors=SimpleNamespace(total=3_745_000_000)))
    require(
        model.check_model("who/knows", None), "warn", "3.75 billion parameters in bfloat16: needs about 8.7"
    )
    files = [SimpleNamespace(rfilename="pytorch_model-1.bin", size=4_000_000_000)]
    ask(SimpleNamespace(safetensors=None, siblings=files))
    require(model.check_model("who/knows", None), "ok", "1.00 billion parameters")
    tensors = [SimpleNamespace(rfilename="model.safetensors", size=None)]
    ask(SimpleNamespace(safetensors=None, siblings=tensors))
    header = SimpleNamespace(parameter_count={"F32": 1_500_000_000, "I64": 500_000_000})
    monkeypatch.setattr(model.HfApi, "get_safetensors_metadata", lambda self, name, revision: header)
    require(model.check_model("who/knows", None), "ok", "2.00 billion parameters")
    for siblings in (None, [SimpleNamespace(rfilename="pytorch_model.bin", size=None)]):
        ask(SimpleNamespace(safetensors=None, siblings=siblings))
        require(model.check_model("who/knows", None), "warn", "does not tell the sizes of its files")
    ask(SimpleNamespace(safetensors=None, siblings=[SimpleNamespace(rfilename="README.md", size=1)]))
    require(model.check_model("who/knows", None), "fail", "holds no weights")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    require(model.check_model("who/knows", None), "fail", "are not in the cache, and HF_HUB_OFFLINE is set")
    monkeypatch.setattr(model, "snapshot_download", lambda *args, **options: str(model.DEMO))
    assert model.count_parameters("who/knows", None) == model.count_parameters("demo", None)


def test_inputs(tmp_path):
    write_tar(tmp_path / "good.tar", {"a": BROKEN, "b": png(0)})
    write_tar(tmp_path / "bad.tar", {"a": BROKEN})
    require(stores.check_input([str(tmp_path / "good.tar")]), "ok", "1 shard")
    require(stores.check_input([str(tmp_path / "bad.tar")]), "fail", "have no usable image")
    require(stores.check_input([str(tmp_path / "none")]), "fail", str(tmp_path / "none"))
    found = stores.check_input([str(tmp_path / "*.png")])
    require(found, "fail", "*.png")
    assert ";" not in found.found and found.remedy == "check the pattern", "one remedy, that of the error"
    pq.write_table(pa.table({"url": ["http://a/b.jpg"]}), tmp_path / "urls.parquet")
    found = stores.check_input([str(tmp_path / "urls.parquet")])
    require(found, "warn", "1 shard without images, but url may hold their addresses")
    assert found.remedy is not None and "--fetch" in found.remedy
    pq.write_table(pa.table({"alt": ["a boat"]}), tmp_path / "texts.parquet")
    found = stores.check_input([str(tmp_path / "texts.parquet")])  # it said that the table has no rows
    require(found, "fail", "no column of image bytes, only alt (string); if one of them holds URLs or paths")


def test_outputs(tmp_path):
    require(stores.check_output(str(tmp_path / "new")), "ok", "can be written, and holds no run yet")
    assert not [*(tmp_path / "new").iterdir()]
    (tmp_path / "file").touch()
    finding = stores.check_output(str(tmp_path / "file"))
    require(finding, "fail", "must be a folder that can be written")
    assert finding.remedy == "give another --output or the missing permission"
    assert finding.remedy not in finding.found, "it was said twice"


@pytest.mark.parametrize("as_json", [False, True])
def test_the_command_exits_with_1_if_a_check_fails(monkeypatch, capsys, as_json):
    found = [Finding("a", "ok", "fine"), Finding("b", "warn", "slow", "wait")]
    monkeypatch.setattr(doctor, "examine", lambda settings: found)
    flags = ["--json"] * as_json
    assert main(["doctor", *flags]) == 0
    found.append(Finding("c", "fail", '"s3://me:secret@host/x?key=secret" is gone', "look for it"))
    capsys.readouterr()
    assert main(["doctor", *flags]) == 1
    said = capsys.readouterr().out
    assert "secret" not in said
    if as_json:
        assert [entry["verdict"] for entry in json.loads(said)] == ["ok", "warn", "fail"]
        assert json.loads(said)[1]["remedy"] == "wait"
    else:
        assert said.splitlines()[:3] == ["ok    a: fine", "warn  b: slow", "      wait"]
        assert said.splitlines()[-1] == "      look for it"


def test_everything_is_checked(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(doctor, "check_ray", lambda: Finding("Ray", "ok", "starts"))
    monkeypatch.setattr(accelerator, "PRODUCT_ROWS", 64)
    monkeypatch.setattr(accelerator, "COPIED_BYTES", 1 << 20)
    monkeypatch.setattr(accelerator, "MEASURED_S", 0.0)
    write_tar(tmp_path / "good.tar", {"b": png(0)})
    settings = DoctorSettings(model="demo", input=(str(tmp_path / "good.tar"),), output=str(tmp_path / "out"))
    subjects = [finding.subject for finding in doctor.examine(settings)]
    assert subjects == [
        "Python",
        "memory",
        "shared memory",
        "open files",
        "temporary disk",
        "torch",
        "device",
        "speed",
        "Ray",
        "hidden packages",
        "image formats",
        "hub",
        "model cache",
        "what is sent",
        "model",
        "input",
        "output",
    ]
