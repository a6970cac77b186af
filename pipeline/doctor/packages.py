"""Checks of installed packages: image formats, files that hide a package, what is sent."""

from __future__ import annotations

import importlib
import io
import os
import sys
from pathlib import Path

from huggingface_hub import constants
from PIL import Image

from blip2_actor import decode_image
from blip2_actor.installation import ROOT, pip_install
from pipeline.finding import Finding, Verdict

IMPORTED = (
    "accelerate",
    "blip2_actor",
    "deploy",
    "fsspec",
    "huggingface_hub",
    "numpy",
    "PIL",
    "pipeline",
    "psutil",
    "pyarrow",
    "ray",
    "rich",
    "tokenizers",
    "torch",
    "transformers",
)
"""Packages that a run imports; a file of the same name in the working folder may hide one."""
NEEDED_FORMATS = ("JPEG", "PNG", "WEBP")
FORMATS = (*NEEDED_FORMATS, "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "HEIF")


def check_hidden_packages(folder: Path) -> Finding:
    """Find files in a folder that Python may import in place of a package."""
    hiding = [
        str(path)
        for name in IMPORTED
        for path in (folder / f"{name}.py", folder / name / "__init__.py")
        if path.exists() and folder.resolve() != ROOT
    ]
    if not hiding:
        return Finding("hidden packages", "ok", f"none by files in {folder}")
    is_searched = any(Path(entry or ".").resolve() == folder.resolve() for entry in sys.path)
    verdict: Verdict = "fail" if is_searched else "warn"
    remedy = "rename them, or run in another folder: Python may import them in place of the packages"
    return Finding("hidden packages", verdict, ", ".join(hiding), remedy)


def check_image_formats() -> Finding:
    """Encode and decode a small picture in each format."""
    broken = [name for name in FORMATS if not _decodes(name)]
    works = ", ".join(name for name in FORMATS if name not in broken)
    if not broken:
        return Finding("image formats", "ok", works)
    verdict: Verdict = "fail" if set(broken) & set(NEEDED_FORMATS) else "warn"
    heic = f"run: {pip_install('heic')}" if broken == ["HEIF"] else "install another build of Pillow"
    return Finding("image formats", verdict, f"{works}; not {', '.join(broken)}", heic)


def _decodes(name: str) -> bool:
    file = io.BytesIO()
    try:
        if name == "HEIF":
            importlib.import_module("pillow_heif").register_heif_opener()
        Image.new("RGB", (64, 64), "red").save(file, name)
    except Exception:  # Whatever a missing codec raises.
        return False
    return decode_image(file.getvalue(), 32).pixels is not None


def check_what_is_sent() -> Finding:
    """Say which programs tell others about a run."""
    sends = []
    ray_sends = os.environ.get("RAY_USAGE_STATS_ENABLED", "0") != "0"
    if ray_sends:
        sends.append("Ray sends usage statistics (RAY_USAGE_STATS_ENABLED=0 stops it)")
    if not (constants.HF_HUB_DISABLE_TELEMETRY or constants.HF_HUB_OFFLINE):
        sends.append("requests to the hub name the versions of packages (HF_HUB_DISABLE_TELEMETRY=1)")
    found = "; ".join(sends) or "nothing"
    remedy = "unset RAY_USAGE_STATS_ENABLED: a run turns the statistics off by itself" if ray_sends else None
    return Finding("what is sent", "warn" if ray_sends else "ok", found, remedy)
