"""`python -m deploy.check`: refuse a wrong cluster file here, before a cluster is paid for.

Ray's own validation, offline, and what it lets pass: Serve accepts unknown keys in silence.
"""

from __future__ import annotations

import sys
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from jsonschema import ValidationError
from pydantic import BaseModel
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from deploy.app import CAPTIONER, GATEWAY
from deploy.settings import Settings

FILES = ("ray_cluster.yaml", "deploy/serve_config.yaml")


def check(path: Path) -> None:
    """Check a cluster file or a Serve config file, told apart by their keys.

    Raises:
        ValueError: with what is wrong.
    """
    document = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(document, dict) or not {"applications", "cluster_name"} & set(document):
        raise ValueError("the file must be a Serve config (applications) or a cluster (cluster_name)")
    if "applications" in document:
        check_serve_config(document)
    else:
        check_cluster(document)


def check_cluster(document: Mapping[str, Any]) -> None:
    """Raise ValueError unless `ray up` would take the cluster."""
    try:
        validate_config(prepare_config(dict(document)))
    except ValidationError as error:
        raise ValueError(f"{error.json_path.removeprefix('$.')}: {error.message}") from None


def check_serve_config(document: Mapping[str, Any]) -> None:
    """Raise ValueError unless `serve deploy` would take the config and mean all of it."""
    ServeDeploySchema.model_validate(document)
    for path in _unknown_keys(document, ServeDeploySchema):
        raise ValueError(f"{path} is not a key that Serve knows; it would be ignored")
    for application in document["applications"]:
        Settings.model_validate(application.get("args", {}))
        for deployment in application.get("deployments", []):
            if deployment["name"] not in (CAPTIONER.name, GATEWAY.name):
                raise ValueError(
                    f"deployments must be {CAPTIONER.name} or {GATEWAY.name}, got {deployment['name']}"
                )


def _unknown_keys(value: object, annotation: Any, path: str = "") -> Iterator[str]:
    models = list(_models_in(annotation))
    if isinstance(value, Mapping) and models:
        fields = {name: field for model in models for name, field in model.model_fields.items()}
        for key, item in value.items():
            if key in fields:
                yield from _unknown_keys(item, fields[key].annotation, f"{path}.{key}".lstrip("."))
            else:
                yield f"{path}.{key}".lstrip(".")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _unknown_keys(item, annotation, f"{path}[{index}]")


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def main(paths: list[str]) -> int:
    """Check files; 0 when all are right, 1 with one line per wrong file."""
    num_wrong = 0
    for path in paths or FILES:
        try:
            check(Path(path))
        except (ValueError, OSError) as error:
            num_wrong += 1
            sys.stderr.write(f"error: {path}: {error}\n")
        else:
            sys.stdout.write(f"{path} is valid\n")
    return 1 if num_wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
