"""`python -m deploy.check`: refuse a wrong cluster file here, before a cluster is paid for.

It runs Ray's own validation offline, and adds what Ray lets pass: Serve accepts unknown keys in silence, and
a placeholder fails late. Of Kubernetes manifests, as `kubectl kustomize` prints them, it checks what the API
server does not: the rules of the KubeRay operator, and the Serve config inside. Without arguments it checks
the Serve config of the installed package, and the `ray_cluster.yaml` of the working folder if there is one.
"""

from __future__ import annotations

import dataclasses
import re
import sys
import typing
from collections.abc import Iterator, Mapping
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blip2_actor.flags import WRONG_FLAGS, Parser, hide_secrets
from blip2_actor.flags.suggestions import did_you_mean
from blip2_actor.installation import MissingPackages, require_packages
from deploy.cluster_files.operator_rules import complaints
from deploy.settings import BODY_WITHIN_S, Settings

if TYPE_CHECKING:
    from jsonschema import ValidationError
    from pydantic import ValidationError as PydanticError
    from ray.serve.schema import DeploymentSchema

PROG = "python -m deploy.check"
CLUSTER_FILE = "ray_cluster.yaml"
IMPORT_PATH = "deploy.app:build"
NEEDS = ("ray", "fastapi", "jsonschema", "yaml")
UNKNOWN_FILE = (
    "the file must be a Serve config (with the key applications), a cluster file of `ray up` (with the key "
    "cluster_name), or Kubernetes manifests (each with the key kind)"
)
ARGS = [field.name for field in dataclasses.fields(Settings)]
UNBUILT = "a kustomization must be built first: kubectl kustomize FOLDER > FILE"
_PLACEHOLDER = re.compile(r"YOUR_[A-Z]+(?:_[A-Z]+)*")
"""What users replace by values of their own, such as `YOUR_BUCKET`."""


def check(path: Path, with_models: bool = False) -> None:
    """Check a cluster file, a Serve config or Kubernetes manifests, told apart by their keys.

    Args:
        with_models: whether to look at the models of the endpoint too.

    Raises:
        ValueError: the file is wrong; the message names the key, or the model that cannot be served.
        OSError: the file cannot be read, or a model cannot be found or fetched.
    """
    import yaml

    if path.is_dir():
        raise ValueError(UNBUILT)
    try:
        parts = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as error:
        raise ValueError(f"the file must be YAML: {error}") from None
    documents = [part for part in parts if part is not None]
    if not documents:
        raise ValueError("the file is empty; the command that wrote it may have failed")
    if not all(isinstance(document, dict) for document in documents):
        raise ValueError(UNKNOWN_FILE)
    if all("kind" in document for document in documents):
        check_manifests(documents, with_models)
    elif len(documents) == 1 and "applications" in documents[0]:
        check_serve_config(documents[0], with_models)
    elif len(documents) == 1 and "cluster_name" in documents[0]:
        check_cluster(documents[0])
    else:
        raise ValueError(UNKNOWN_FILE)
    left: dict[str, str] = {}  # the first key of each
    for key, placeholder in (pair for document in documents for pair in placeholders(document)):
        left.setdefault(placeholder, key)
    if left:
        holding = ", ".join(f"{key} holds {placeholder}" for placeholder, key in left.items())
        raise ValueError(f"{holding}; write your own values there")


def placeholders(value: object, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield the path of each text in a document that holds a placeholder, with the placeholder."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from placeholders(item, f"{path}.{key}".lstrip("."))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from placeholders(item, f"{path}[{index}]")
    elif isinstance(value, str) and (found := _PLACEHOLDER.search(value)):
        yield path, found.group()


def check_manifests(documents: list[dict[str, Any]], with_models: bool = False) -> None:
    """Raise ValueError unless the KubeRay operator and Serve would take the manifests; see `check`."""
    for manifest in documents:
        if manifest["kind"] == "Kustomization":
            raise ValueError(UNBUILT)
        try:
            found = list(complaints(manifest))
        except (AttributeError, KeyError, TypeError):
            raise ValueError(
                f"{manifest['kind']}: a field has a value of the wrong type; "
                "kubectl apply --dry-run=server names it"
            ) from None
        for complaint in found:
            raise ValueError(f"{manifest['kind']}: {complaint}")
        if manifest["kind"] == "RayService":
            check_serve_config(_serve_config_of(manifest["spec"]), with_models)


def _serve_config_of(spec: Mapping[str, Any]) -> Any:
    """Return the Serve config that stands as a text in a RayService."""
    import yaml

    text = spec.get("serveConfigV2", "")
    if not isinstance(text, str):
        raise ValueError(f"spec.serveConfigV2 must be a text, got {type(text).__name__}; begin it with |")
    try:
        return yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"spec.serveConfigV2 must be YAML: {error}") from None


def check_cluster(document: Mapping[str, Any]) -> None:
    """Raise ValueError unless `ray up` would take the cluster."""
    from jsonschema import ValidationError
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        validate_config(prepare_config(dict(document)))
    except ValidationError as error:
        raise ValueError(_explain(error)) from None
    except ValueError:
        raise
    except Exception as error:  # of any kind: Ray sets its defaults before it looks at types
        # Without the defaults, its schema says what is wrong.
        try:
            validate_config(dict(document))
        except ValidationError as wrong:
            raise ValueError(_explain(wrong)) from None
        except (KeyError, RuntimeError):  # of what the defaults set, or no schema
            pass
        raise ValueError(f"Ray cannot read the cluster: {error!r}") from None


def _explain(error: ValidationError) -> str:
    """Return what Ray's schema refuses in a cluster file."""
    return f"{error.json_path.removeprefix('$').removeprefix('.') or 'the file'}: {error.message}"


def check_serve_config(document: Mapping[str, Any], with_models: bool = False) -> None:
    """Raise ValueError unless `serve deploy` would take the config and ignore nothing in it; see `check`."""
    from pydantic import ValidationError
    from ray.serve.schema import ServeDeploySchema

    from deploy.app import CAPTIONER, GATEWAY, ServeArgs, captioner_of

    for path in _unknown_keys(document, ServeDeploySchema):
        raise ValueError(f"{path} is not a key that Serve knows; it would be ignored")
    try:
        served = ServeDeploySchema.model_validate(document)
    except ValidationError as error:
        raise ValueError(_reasons(error)) from None
    for application in served.applications:
        if application.import_path != IMPORT_PATH:
            raise ValueError(f"import_path must be {IMPORT_PATH}, got {application.import_path}")
        try:
            settings = ServeArgs.model_validate(application.args).root
        except ValidationError as error:
            raise ValueError(f"args must be those of deploy/settings.py: {_reasons(error)}") from None
        settings.require_keys("a cluster")
        _require_time("http_options.request_timeout_s", served.http_options.request_timeout_s, settings)
        known = [GATEWAY.name, CAPTIONER.name, *map(captioner_of, settings.other_engines)]
        for deployment in application.deployments:
            if deployment.name not in known:
                raise ValueError(f"deployments must be {' or '.join(known)}, got {deployment.name}")
            if isinstance(drain_s := deployment.graceful_shutdown_timeout_s, int | float):  # else unset
                _require_time(f"graceful_shutdown_timeout_s of {deployment.name}", drain_s, settings)
            _check_scale(deployment)
        if with_models:
            settings.check_models()


def _check_scale(deployment: DeploymentSchema) -> None:
    """Raise ValueError for a scale that Serve refuses only while it deploys; its schema takes any dict."""
    from pydantic import ValidationError
    from ray.serve.config import AutoscalingConfig

    given = deployment.autoscaling_config
    if not isinstance(given, dict):
        return
    is_auto = deployment.num_replicas == "auto"  # Then Serve has other defaults.
    defaults = AutoscalingConfig.default().model_dump(exclude_unset=True) if is_auto else {}
    try:
        AutoscalingConfig.model_validate(defaults | given)
    except ValidationError as error:
        raise ValueError(
            f"autoscaling_config of {deployment.name} must be one that Serve takes: {_reasons(error)}"
        ) from None


def _reasons(error: PydanticError) -> str:
    """Return what pydantic refuses: each field, why, and its value."""
    reasons = []
    for each in error.errors():
        place = ".".join(map(str, each["loc"]))
        given = f" (got {each['input']!r})" if isinstance(each["input"], int | float | str) else ""
        hint = did_you_mean(place, ARGS) if "unexpected" in each["type"] and "." not in place else ""
        reasons.append(f"{place} {each['msg'].removeprefix('Value error, ')}{given}{hint}".lstrip())
    return ", ".join(reasons)


def _require_time(name: str, seconds: float | None, settings: Settings) -> None:
    """Raise ValueError if Serve would end a request before its time is over; None or below 0 is no limit."""
    if seconds is not None and 0 <= seconds < settings.longest_request_s:
        raise ValueError(
            f"{name} must be at least {settings.longest_request_s:g}, {BODY_WITHIN_S:g} for the body of a "
            f"request and timeout_s for its answer, got {seconds:g}; raise it, or lower timeout_s"
        )


def _unknown_keys(value: object, annotation: Any, path: str = "") -> Iterator[str]:
    """Yield the path of each key that no pydantic model in the annotation has."""
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


def _models_in(annotation: Any) -> Iterator[Any]:
    """Yield the pydantic models in an annotation, such as that of `list[Model] | None`."""
    from pydantic import BaseModel

    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def main(argv: list[str] | None = None) -> int:
    """Check files; return 0 when all are valid, else 1 with one line per wrong file."""
    parser = Parser(
        prog=PROG, description="Check cluster files, Serve configs and Kubernetes manifests offline."
    )
    parser.add_argument(
        "files",
        nargs="*",
        metavar="FILE",
        help=f"default: the Serve config of this package, and {CLUSTER_FILE} of the working folder if any",
    )
    parser.add_argument(
        "--models",
        action="store_true",
        help="also find the models of the endpoint, as its engines would, without loading weights; do it "
        "before each update",
    )
    arguments = parser.parse_args(argv)
    paths: list[str] = arguments.files
    try:
        require_packages(PROG, NEEDS, "serve")
    except MissingPackages as error:
        sys.stderr.write(f"{error}\n")
        return WRONG_FLAGS
    if paths:
        num_wrong = sum(_is_wrong(Path(path), arguments.models) for path in paths)
    else:
        with as_file(files("deploy") / "serve_config.yaml") as packaged:
            num_wrong = _is_wrong(packaged, arguments.models)
        if Path(CLUSTER_FILE).exists():
            num_wrong += _is_wrong(Path(CLUSTER_FILE), arguments.models)
        else:
            sys.stdout.write(
                f"no cluster was checked: there is no {CLUSTER_FILE} in this folder; name one: {PROG} FILE\n"
            )
    return 1 if num_wrong else 0


def _is_wrong(path: Path, with_models: bool) -> bool:
    try:
        check(path, with_models)
    except (ValueError, OSError) as error:
        reason = str((isinstance(error, OSError) and error.strerror) or error)
        sys.stderr.write(f"error: {path}: {hide_secrets(' '.join(reason.split()))}\n")
        return True
    sys.stdout.write(f"{path} is valid\n")
    return False


if __name__ == "__main__":
    sys.exit(main())
