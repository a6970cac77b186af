"""What a person meant who typed an unknown flag: the nearest one, or advice for a habit from elsewhere."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

MIN_SIMILARITY = 0.5
"""A suggestion must share at least this much with what was typed (`difflib`: 0 is nothing, 1 is equal)."""

_MANY_TEXTS = (
    "batches are made while it runs; --max-slots limits the texts at once, --encode-batch the images"
)
_MANY_ACTORS = "--max-decode-actors sets how many actors decode, --max-actors how many caption"
_AGAIN = "finished rows stay as they are; run the same command again to resume, or give another --output"
_EXPORT = "the output is Parquet; blip2 export writes CSV, JSON lines and more of it"
_QUIET = "redirect the output instead, such as > log.txt"
_HABITS: dict[str, tuple[str, ...]] = {
    "b": (_MANY_TEXTS,),
    "batch": (_MANY_TEXTS,),
    "batch-size": (_MANY_TEXTS,),
    "beams": ("use --num-beams",),
    "bf16": ("use --dtype bfloat16",),
    "c": ("use --config",),
    "checkpoint": ("use --model",),
    "cpu": ("use --device cpu",),
    "csv": (_EXPORT,),
    "cuda": ("use --device cuda",),
    "data": ("use --input",),
    "dataset": ("use --input",),
    "debug": ("use --verbose", "use --log-level debug"),
    "dir": ("use --input", "use --output"),
    "dry-run": ("blip2 plan measures a sample, and changes no --output",),
    "endpoint": ("use --url",),
    "format": ("use --to",),
    "fp16": ("use --dtype float16",),
    "fp32": ("use --dtype float32",),
    "folder": ("use --input", "use --output"),
    "force": ("use --yes", _AGAIN),
    "gpu": ("use --device cuda, or --device cuda:1 for the second one",),
    "gpus": ("each actor takes one accelerator; --max-actors sets how many caption",),
    "half": ("use --dtype float16",),
    "i": ("use --input",),
    "image": ("use --input",),
    "images": ("use --input",),
    "input-dir": ("use --input",),
    "jsonl": (_EXPORT,),
    "max-images": ("use --limit",),
    "max-length": ("use --max-new-tokens, which does not count the prompt",),
    "min-length": ("use --min-new-tokens, which does not count the prompt",),
    "max-samples": ("use --limit",),
    "max-tokens": ("use --max-new-tokens",),
    "model-id": ("use --model",),
    "model-name": ("use --model",),
    "model-path": ("use --model",),
    "n": ("use --limit", "use --num-images"),
    "num-samples": ("use --limit", "use --sample"),
    "num-workers": (_MANY_ACTORS, "use --decode-children"),
    "out": ("use --output",),
    "output-dir": ("use --output",),
    "output-format": ("use --to", _EXPORT),
    "output-path": ("use --output",),
    "overwrite": (_AGAIN,),
    "p": ("use --prompt", "use --port"),
    "parallel": (_MANY_ACTORS,),
    "path": ("use --input", "use --output"),
    "precision": ("use --dtype",),
    "pretrained-model-name-or-path": ("use --model",),
    "q": (_QUIET,),
    "question": ("use --prompt 'Question: ... Answer:', or --ask NAME=PROMPT for more than one",),
    "quiet": (_QUIET,),
    "resume": (_AGAIN,),
    "sampling": ("use --do-sample",),
    "save": ("use --output",),
    "silent": (_QUIET,),
    "temp": ("use --temperature",),
    "text": ("use --prompt", "use --text-column"),
    "threads": ("use --num-threads",),
    "torch-dtype": ("use --dtype",),
    "tp": ("use --device-map auto",),
    "v": ("use --verbose", "use --log-level debug"),
    "verbose": ("use --log-level debug",),
    "weights": ("use --model",),
    "where": ("use --grep",),
    "workers": (_MANY_ACTORS, "use --decode-children"),
    "world-size": (_MANY_ACTORS,),
    "y": ("use --yes",),
}
"""Flags of other programs, without dashes, and advice: that is given whose own flags the command has."""

_FLAG = re.compile(r"(?<!\S)--[a-z][a-z-]*")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return the end of a sentence that names the nearest known word, or nothing when none is near."""
    near = difflib.get_close_matches(word, list(known), 1, MIN_SIMILARITY)
    return f"; did you mean {near[0]}?" if near else ""


def advice_for(flag: str, known: Sequence[str]) -> str:
    """Return the end of a sentence that says what to type in place of an unknown flag, or nothing."""
    name = flag.lstrip("-").lower().replace("_", "-")
    if f"--{name}" in known:
        return f"; did you mean --{name}?"
    for advice in _HABITS.get(name, ()):
        if set(_FLAG.findall(advice)) <= set(known):
            return f"; {advice}"
    return did_you_mean(flag, known)
