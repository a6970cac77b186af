"""One running Serve for all tests of the endpoint: a fake engine at `/`, and a real one at `/real`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from ray import serve

from blip2_actor import EngineConfig
from blip2_actor.testing import FakeEngineConfig, save_tiny_checkpoint
from deploy.settings import OnlineImageLimits
from tests.engines import cpu_config
from tests.integration.online.endpoint import FAULTY, NUM_CALLERS, caption_of, target
from tests.ports import free_port


@pytest.fixture(scope="package")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The path of a file; while it exists, the fake engine finishes no request."""
    return tmp_path_factory.mktemp("gate") / "closed"


@pytest.fixture(scope="package")
def real_engine(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    model = save_tiny_checkpoint(tmp_path_factory.mktemp("checkpoint"))
    return cpu_config(model)


@pytest.fixture(scope="package")
def url(local_ray: None, gate: Path, real_engine: EngineConfig) -> Iterator[str]:
    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    gated = FakeEngineConfig(model="demo", gate=str(gate), faults_on=(caption_of(FAULTY),))
    limits = OnlineImageLimits(max_file_bytes=1 << 20, max_pixels=10_000)
    serve.run_many(
        [
            target("/", gated, max_in_flight=NUM_CALLERS, timeout_s=20, image=limits),
            target("/real", real_engine),
        ]
    )
    yield f"http://127.0.0.1:{port}"
    serve.shutdown()


@pytest.fixture
def closed_gate(gate: Path) -> Iterator[Path]:
    gate.touch()
    yield gate
    gate.unlink(missing_ok=True)
