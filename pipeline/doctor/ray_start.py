"""The check of Ray: it is imported, and started or reached, as a run does it."""

from __future__ import annotations

import importlib
import os

from blip2_actor.installation import pip_install
from pipeline.errors import RayStartFailed
from pipeline.finding import Finding
from pipeline.run.cluster import connected


def check_ray() -> Finding:
    """Import Ray, start it or connect to the cluster at RAY_ADDRESS, and end it again."""
    try:
        ray = importlib.import_module("ray")
        importlib.import_module("ray.data")
    except Exception as error:  # Whatever a broken installation raises is the finding.
        found = f"cannot be imported: {type(error).__name__}: {error}"
        return Finding("Ray", "fail", found, f"run: {pip_install('batch')}")
    try:
        with connected() as cluster:
            found = f"{ray.__version__} starts; {cluster}"
    except RayStartFailed as error:
        reason, _, remedy = str(error).partition("; ")
        return Finding("Ray", "fail", f"{ray.__version__}: {reason}", remedy)
    if cluster.is_local:
        return Finding("Ray", "ok", found)
    address = os.environ.get("RAY_ADDRESS")
    found = f"{ray.__version__} reaches {address}; {cluster}"
    if os.environ.get("RAY_AUTH_MODE") != "token":
        remedy = "start its nodes with RAY_AUTH_MODE=token, and set that and RAY_AUTH_TOKEN here"
        return Finding(
            "Ray", "warn", f"{found}; it asks for no token, so everybody can run code on it", remedy
        )
    return Finding("Ray", "ok", f"{found}; it asks for a token")
