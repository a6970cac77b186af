"""`blip2 caption --endpoint` refuses, before any work, what would not give the rows of the run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2_actor.testing import FakeEngineConfig
from pipeline.cli.main import main
from pipeline.endpoint.client import Endpoint, EndpointError
from pipeline.endpoint.settings import EndpointSettings
from pipeline.run.prepare import prepare, prepare_retry
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.placement import Placement
from pipeline.settings.retry_settings import RetrySettings
from tests.unit.endpoint.scripted_endpoint import Exchange, endpoint
from tests.unit.inputs.run_without_ray import work


@pytest.fixture
def photos(tmp_path: Path) -> str:
    (tmp_path / "photos").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "photos" / "a.png")
    return str(tmp_path / "photos")


def answer(exchange: Exchange) -> None:
    if exchange.fields["options"]["num_beams"] > 16:
        exchange.refuse(400, "bad_request", "options: num_beams must be at most 16, got 17")
    else:
        exchange.answer_all()


def test_what_the_endpoint_cannot_make_is_named(
    photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    with endpoint(answer) as url:
        for flags, said in [
            (["--endpoint", "127.0.0.1"], "endpoint must begin with http:// or https://, got 127.0.0.1"),
            (["--endpoint", url, "-m", "demo2"], "model must be left out with --endpoint"),
            (["--endpoint", url, "--dtype", "float16"], "dtype must be left out with --endpoint"),
            (
                ["--endpoint", url, "--score", "s=caption", "--score-model", "m"],
                "score-model must be left out with --endpoint",
            ),
            (["--endpoint", url, "--gpus-per-actor", "1"], "gpus-per-actor must be left out with --endpoint"),
            (
                ["--endpoint", url, "--step-timeout-s", "60"],
                "step-timeout-s must be left out with --endpoint, which watches its own engine, got 60",
            ),
            (
                ["--endpoint", url, "--num-beams", "17"],
                "refuses captions: the endpoint answers 400: options: --num-beams ",
            ),
            (["--endpoint", "http://127.0.0.1:9"], "http://127.0.0.1:9 gives no answer: "),
            (["--endpoint-key-file", "k"], "endpoint-key-file must be left out without --endpoint"),
            (["--endpoint", url, "--endpoint-key-file", "nowhere"], "nowhere"),
        ]:
            assert main(["caption", photos, "-o", str(output), *flags]) == 3, flags
            shown = capsys.readouterr().err
            assert said in shown, (flags, shown)
    assert not output.exists()


def test_a_run_of_another_model_is_not_continued(
    photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    job = prepare(CaptionSettings(input=(photos,), output=str(output)), FakeEngineConfig(model="another"))
    job.ledger.begin(job.run)
    with endpoint(answer) as url:
        assert main(["caption", photos, "-o", str(output), "--endpoint", url]) == 3
    assert "was begun with other settings: image.size_px: 32 -> 8; model: " in capsys.readouterr().err


def finish_run(photos: str, output: Path, **settings: Any) -> None:
    """Make a run of the same model without the endpoint."""
    given = CaptionSettings(input=(photos,), output=str(output), **settings)
    work(prepare(given, FakeEngineConfig(model="demo", image_size_px=8)))


@pytest.mark.parametrize(
    "flags",
    ["--gpus-per-actor 1", "--accelerator NPU=1", "--accelerator-type L40S", "--step-timeout-s 60"],
    ids=lambda flags: flags.split()[0],
)
def test_a_retry_is_refused_what_a_caption_is_refused(
    photos: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: str
) -> None:
    """Workers that only send used to occupy the GPUs."""
    finish_run(photos, tmp_path / "out")
    with endpoint(answer) as url:
        assert main(["retry", str(tmp_path / "out"), "--endpoint", url, *flags.split()]) == 3
    assert f"{flags.split()[0][2:]} must be left out with --endpoint" in capsys.readouterr().err


def test_a_retry_by_an_endpoint_reserves_no_accelerator_of_its_run(photos: str, tmp_path: Path) -> None:
    placement = Placement(gpus_per_actor=1, accelerator_type="L40S", max_actors=3)
    finish_run(photos, tmp_path / "out", placement=placement)
    with endpoint(answer) as url:
        job = prepare_retry(
            RetrySettings(output=str(tmp_path / "out"), serving=EndpointSettings(endpoint=url))
        )
    assert job.settings.placement == Placement(max_actors=3)


def test_the_settings_that_are_stored_name_the_model_of_the_endpoint(photos: str, tmp_path: Path) -> None:
    """A later start without the endpoint finds the model by this name, with the same fingerprint."""
    with endpoint(answer) as url:
        settings = CaptionSettings(
            input=(photos,), output=str(tmp_path / "out"), serving=EndpointSettings(endpoint=url)
        )
        remote = prepare(settings)
    local = prepare(
        CaptionSettings(input=(photos,), output=str(tmp_path / "out")),
        FakeEngineConfig(model="demo", image_size_px=8),
    )
    assert remote.run.fingerprint == local.run.fingerprint
    assert remote.settings.engine.model == "demo" and "serving" not in remote.settings.to_dict()


@pytest.mark.parametrize("url", ["http://me:s3cret@web:8000", "http://s3cret@web", "http://web?key=s3cret"])
def test_a_password_in_the_address_is_refused_and_not_said(url: str) -> None:
    with pytest.raises(ValueError, match="endpoint must hold no password") as refused:
        EndpointSettings(endpoint=url)
    assert "s3cret" not in str(refused.value)


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("", 401, "give a key of this endpoint in a file"),
        ("/v1/", 404, "leave out /v1, which"),
        ("/a", 404, "no"),
    ],
)
def test_a_missing_key_and_the_address_for_openai_are_named(
    path: str, status: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The address that OpenAI's clients take ends in /v1; it was said that there is no '/v1/v1/model'."""
    response = SimpleNamespace(status=status, headers={}, reason="no", read=lambda: b"")
    connection = SimpleNamespace(request=lambda *_: None, getresponse=lambda: response, close=lambda: None)
    monkeypatch.setattr(Endpoint, "connect", lambda *_: connection)
    with pytest.raises(EndpointError, match=f"{said}[^;]*$"):
        Endpoint(f"http://head:8000{path}").model()
