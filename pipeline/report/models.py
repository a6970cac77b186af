"""What is known of models by name: their licenses, and the limits of the demonstration model."""

from __future__ import annotations

from pathlib import Path

from blip2_actor import ModelInfo
from pipeline.demo.dataset import MARKER
from pipeline.ledger.run_record import Run

DEMO = "demo"
DEMO_WARNING = f"warning: {ModelInfo.DEMO_CAVEAT}; choose a published checkpoint with --model"
LICENSES = {
    "Salesforce/blip2-opt-": "OPT weights: Meta's OPT-175B license, non-commercial research only",
    "Salesforce/blip2-flan-t5-": "Flan-T5 weights: Apache-2.0",
}
"""Licences by the beginning of a checkpoint's name. docs/checkpoints.md has their sources."""
UNKNOWN = "license unknown here; see its model card"


def license_of(model: str) -> str:
    """Return the license of a checkpoint as a phrase."""
    if model == DEMO:
        return "Apache-2.0"
    return next((text for name, text in LICENSES.items() if model.startswith(name)), UNKNOWN)


def demo_warning(run: Run) -> str | None:
    """Return the warning if the demonstration model has captioned other images than its own scenes."""
    is_demo = run.settings.get("engine", {}).get("model") == DEMO
    return DEMO_WARNING if is_demo and not all(map(_is_of_the_demo, run.inputs)) else None


def _is_of_the_demo(uri: str) -> bool:
    path = Path(uri)
    return any((folder / MARKER).exists() for folder in (path, *list(path.parents)[:3]))
