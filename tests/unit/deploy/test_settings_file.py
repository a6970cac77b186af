"""The Serve config file and the flags of `blip2 serve` set the same values."""

from __future__ import annotations

import dataclasses
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import LoggingConfig

from blip2_actor import Calibration, EngineConfig
from deploy.app import NODE_ENVIRONMENT, ServeArgs
from deploy.command import make_parser
from deploy.observe.logs import serve_logging
from deploy.settings import ServeSettings, Settings

DOCUMENT: dict[str, Any] = yaml.safe_load((files("deploy") / "serve_config.yaml").read_text("utf-8"))
[APPLICATION] = DOCUMENT["applications"]
SERVES_OWN = {"host": "http_options", "port": "http_options", "log_level": "logging_config"}
"""Flags of the one-machine form, with the part of the file that sets the same on a cluster."""


def test_every_flag_is_an_argument_or_a_setting_of_serve() -> None:
    assert Settings in ServeSettings.__mro__
    of_settings = {field.name for field in dataclasses.fields(Settings)}
    own = {field.name for field in dataclasses.fields(ServeSettings)} - of_settings
    # On a cluster, each node's Ray agent chooses the port of metrics.
    assert own == {*SERVES_OWN, "metrics_port"}
    for name, place in SERVES_OWN.items():
        assert name in DOCUMENT[place]


def test_the_image_gives_the_processes_of_serve_what_the_one_machine_form_does() -> None:
    image = (files("deploy") / "Dockerfile").read_text("utf-8")
    assert [
        f"{name}={value}" for name, value in NODE_ENVIRONMENT.items() if f" {name}={value} " not in image
    ] == []


def test_the_file_is_a_command_line() -> None:
    """Each argument of the file has a flag of the same name, which gives the same settings."""
    from blip2_actor.flags import build

    given = APPLICATION["args"]
    flags: list[str] = []
    for name, value in given.items():
        pairs = value.items() if isinstance(value, dict) else [(name, value)]
        for key, inner in pairs:
            prefix = "image-" if name == "image" else ""
            words = inner if isinstance(inner, list) else [inner]
            flags += [f"--{prefix}{key.replace('_', '-')}", *map(str, words)]
    settings = build(ServeSettings, vars(make_parser().parse_args(flags)))
    from_file = ServeArgs.model_validate(given).root
    for field in dataclasses.fields(Settings):
        assert getattr(settings, field.name) == getattr(from_file, field.name), field.name


def test_the_logs_of_a_cluster_are_those_of_one_machine() -> None:
    assert LoggingConfig(**DOCUMENT["logging_config"]) == LoggingConfig(**serve_logging("info"))


def test_a_calibration_of_another_model_is_refused_before_work(tmp_path: Path) -> None:
    file = tmp_path / "c.json"
    settings = Settings(engine=EngineConfig(model="demo"), calibration=str(file), min_confidence=0.5)
    flat: dict[str, Any] = {"coefficients": dict.fromkeys(("log_odds", "num_tokens"), 0.0), "intercept": 0.0}
    Calibration(model=settings.engine.info().digest, curve=[(0, 0.5)], **flat).save(file)
    settings.check_models()
    Calibration(model="other", curve=[(0, 0.5)], **flat).save(file)
    with pytest.raises(ValueError, match="calibration must be of a model that is served, got "):
        settings.check_models()
    with pytest.raises(ValueError, match="min_confidence must be left out without calibration"):
        Settings(min_confidence=0.5)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"log_level": "loud"}, "log_level must be 'debug', 'info', 'warning' or 'error', got 'loud'"),
        ({"port": "8000"}, "port must be a whole number, got '8000'"),
        ({"allow_anonymous": "no"}, "allow_anonymous must be true or false, got 'no'"),
        ({"allowed_hosts": "localhost"}, "allowed_hosts must be texts, got 'localhost'"),
        ({"engine": "demo"}, "engine must be EngineConfig, got 'demo'"),
        ({"slots": 0}, "slots must be at least 1, got 0"),
        ({"cache_bytes": -1}, "cache_bytes must be at least 0, got -1"),
        ({"host": ""}, "host must not be empty; leave it out"),
        ({"host": "localhost:8000"}, "host must be .* without brackets and port, got .localhost:8000."),
        ({"host": "[::1]"}, r"host must be .* without brackets and port, got '\[::1\]'"),
        ({"keys_file": ""}, "keys_file must not be empty; leave it out"),
    ],
)
def test_wrong_values_from_python_are_refused_by_name(given: dict[str, Any], said: str) -> None:
    """They used to fail in a replica or silently: the letters of a host were taken for hosts."""
    with pytest.raises(ValueError, match=f"^{said}"):
        ServeSettings(**given)


def test_python_may_give_lists_and_paths() -> None:
    settings = Settings(allowed_hosts=["a.example"], cache_from=Path("run"))  # type: ignore[arg-type]
    assert (settings.allowed_hosts, settings.cache_from) == (("a.example",), "run")
