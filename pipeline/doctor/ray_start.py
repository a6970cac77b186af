"""The check of Ray: it is imported, and started or reached, as a run does it."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys

from blip2_actor.installation import pip_install
from pipeline.errors import RayStartFailed
from pipeline.finding import Finding
from pipeline.run.cluster import TOKEN_REFUSED, connected

ASK = """
import sys
from ray._raylet import GcsClient
GcsClient(address=sys.argv[1]).internal_kv_keys(b"", b"blip2", timeout=5)
"""
"""Reads something of a cluster, which refuses it if it asks for a token."""
ANSWER_S = 60.0


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
            asks = None if cluster.is_local else _asks_for_token(ray.get_runtime_context().gcs_address)
    except RayStartFailed as error:
        reason, _, remedy = str(error).partition("; ")
        return Finding("Ray", "fail", f"{ray.__version__}: {reason}", remedy)
    if cluster.is_local:
        return Finding("Ray", "ok", found)
    address = os.environ.get("RAY_ADDRESS")
    found = f"{ray.__version__} reaches {address}; {cluster}"
    if asks is None:
        return Finding("Ray", "ok", f"{found}; it did not say whether it asks for a token")
    if not asks:
        remedy = "start its nodes with RAY_AUTH_MODE=token, and set that and RAY_AUTH_TOKEN here"
        return Finding(
            "Ray", "warn", f"{found}; it asks for no token, so everybody can run code on it", remedy
        )
    return Finding("Ray", "ok", f"{found}; it asks for a token")


def _asks_for_token(address: str) -> bool | None:
    """Return whether the head of a cluster refuses a process that gives no token; None if it says neither.

    What RAY_AUTH_MODE says here tells nothing: a cluster without tokens ignores one that it is given.
    """
    try:
        done = subprocess.run(
            [sys.executable, "-c", ASK, address],
            env=os.environ | {"RAY_AUTH_MODE": "disabled"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=ANSWER_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode == 0:
        return False
    return True if TOKEN_REFUSED in done.stderr else None
