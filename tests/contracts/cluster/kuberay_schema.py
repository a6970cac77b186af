"""The KubeRay operator's schemas as JSON Schema that refuses unknown fields, and a command to update them.

    python -m tests.contracts.cluster.kuberay_schema PATH_TO_CLONE v1.7.0

reads the CustomResourceDefinitions of RayCluster, RayJob and RayService from a clone of the operator's
repository (ray-project/kuberay, Apache License 2.0) and writes `kuberay_schema.json`: version v1, without
descriptions, and with repeated parts written once. The API server silently drops unknown fields; here they
are an error.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

SCHEMA_FILE = Path(__file__).with_name("kuberay_schema.json")
SOURCE = "helm-chart/kuberay-operator/crds/ray.io_{}s.yaml"
KINDS = ("RayCluster", "RayJob", "RayService")
MIN_SHARED_CHARS = 120
"""Shorter parts are not replaced by references, which would not be shorter."""


def load_schemas() -> dict[str, Any]:
    """Return the schema of each kind, by its name."""
    stored = json.loads(SCHEMA_FILE.read_text())
    return {kind: {"$ref": f"#/$defs/{kind}", "$defs": stored["$defs"]} for kind in KINDS}


def strict(schema: Any) -> Any:
    """Turn a part of an OpenAPI schema of Kubernetes into JSON Schema that forbids unknown fields."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    out: dict[str, Any] = {}
    for key, value in schema.items():
        if key == "properties":
            out[key] = {name: strict(part) for name, part in value.items()}
        elif key in ("items", "not") or (key == "additionalProperties" and isinstance(value, dict)):
            out[key] = strict(value)
        elif key in ("anyOf", "allOf", "oneOf"):
            out[key] = [strict(part) for part in value]
        elif key not in ("nullable", "format", "description", "default") and not key.startswith("x-"):
            out[key] = value
    if "properties" in out and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out.setdefault("additionalProperties", False)
    if schema.get("nullable") and "type" in out:
        out["type"] = [out["type"], "null"]
    return out


def shared(schemas: dict[str, Any]) -> dict[str, Any]:
    """Write each large part that occurs more than once as a definition, and return all definitions."""
    counts: Counter[str] = Counter()

    def count(part: Any) -> None:
        if isinstance(part, dict):
            text = json.dumps(part, sort_keys=True)
            counts[text] += 1
            if counts[text] > 1:
                return
        for child in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            count(child)

    count(schemas)
    definitions: dict[str, Any] = {}
    names: dict[str, str] = {}

    def refer(part: Any, *, below_properties: bool = False) -> Any:
        if isinstance(part, list):
            return [refer(child) for child in part]
        if not isinstance(part, dict):
            return part
        text = json.dumps(part, sort_keys=True)
        is_shared = counts[text] > 1 and len(text) >= MIN_SHARED_CHARS and not below_properties
        if is_shared and text in names:
            return {"$ref": f"#/$defs/{names[text]}"}
        out = {key: refer(child, below_properties=key == "properties") for key, child in part.items()}
        if not is_shared:
            return out
        names[text] = f"part{len(names)}"
        definitions[names[text]] = out
        return {"$ref": f"#/$defs/{names[text]}"}

    kinds = {kind: refer(schema) for kind, schema in schemas.items()}
    return kinds | definitions


def main(argv: list[str]) -> int:
    """Write the schemas of a version of the operator, read from a clone of its repository."""
    clone, tag = argv

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", clone, *arguments], check=True, capture_output=True, text=True
        ).stdout

    schemas = {}
    for kind in KINDS:
        crd = yaml.safe_load(git("show", f"{tag}:{SOURCE.format(kind.lower())}"))
        (version,) = [version for version in crd["spec"]["versions"] if version["name"] == "v1"]
        schemas[kind] = strict(version["schema"]["openAPIV3Schema"])
        schemas[kind]["properties"]["metadata"] = {"type": "object"}
    commit = git("rev-parse", f"{tag}^{{commit}}").strip()
    document = {
        "$comment": f"From ray-project/kuberay {tag}, commit {commit}, Apache License 2.0, changed: made by "
        "tests/contracts/cluster/kuberay_schema.py, which says how.",
        "$defs": shared(schemas),
    }
    SCHEMA_FILE.write_text(json.dumps(document, indent=None, separators=(",", ":"), sort_keys=True) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
