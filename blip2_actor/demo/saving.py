"""Save a trained checkpoint: ordinary Hugging Face files, and the log of the training."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import Blip2ForConditionalGeneration, PreTrainedTokenizerFast

from blip2_actor.demo.architecture import build_processor


def save_checkpoint(
    output: Path,
    model: Blip2ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    about: dict[str, Any],
    log: list[dict[str, Any]],
) -> None:
    """Replace the folder `output` as a whole, so that a reader finds the old checkpoint or the new one.

    Args:
        about: options and scores, for `training_log.json`.
        log: the entries of the log, for `training_log.json` and `training_log.txt`.
    """
    output = output.resolve()
    new, old = output.with_name(output.name + ".new"), output.with_name(output.name + ".old")
    for folder in (new, old):
        shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(new)
    processor = build_processor(tokenizer)
    processor.save_pretrained(new)
    processor.image_processor.save_pretrained(new)  # writes preprocessor_config.json, which most tools read
    about = about | {
        "parameters": sum(p.numel() for p in model.parameters()),
        "processor": _processor_name(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "log": log,
    }
    (new / "training_log.json").write_text(json.dumps(about, indent=1) + "\n")
    (new / "training_log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in log))
    for file in new.iterdir():
        file.chmod(0o644)  # safetensors writes files that only their owner can read
    if output.exists():
        os.rename(output, old)
    os.rename(new, output)
    shutil.rmtree(old, ignore_errors=True)


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
