"""What a person meant who typed an unknown flag: the nearest one, or advice for a habit from elsewhere."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

MIN_SIMILARITY = 0.5
"""A suggestion must share at least this much with what was typed (`difflib`: 0 is nothing, 1 is equal)."""
MIN_FLAG_SIMILARITY = 0.55
"""The same for the names of flags, among which there are more: `prompt` and `format` share 0.5."""

_HABITS = {
    "batches are made while it runs; --max-slots limits the texts at once, --encode-batch the images": (
        "b batch batch-size"
    ),
    "--max-decode-actors sets how many actors decode, --max-actors how many caption": (
        "num-workers parallel workers world-size"
    ),
    "each actor takes one accelerator; --max-actors sets how many caption": "gpus",
    "use --config": "c",
    "use --decode-children": "num-workers workers",
    "use --device cpu": "cpu",
    "use --device cuda": "cuda",
    "use --device cuda, or --device cuda:1 for the second one": "gpu",
    "use --device-map auto": "tp",
    "use --do-sample": "sampling",
    "use --dtype": "precision torch-dtype",
    "use --dtype bfloat16": "bf16",
    "use --dtype float16": "fp16 half",
    "use --dtype float32": "fp32",
    "use --grep": "where",
    "use --input": "data dataset dir folder i image images input-dir path",
    "use --limit": "max-images max-samples n num-samples",
    "use --max-new-tokens": "max-tokens",
    "use --max-new-tokens, which does not count the prompt": "max-length",
    "use --min-new-tokens, which does not count the prompt": "min-length",
    "use --model": "checkpoint model-id model-name model-path pretrained-model-name-or-path weights",
    "use --num-beams": "beams",
    "use --num-images": "n",
    "use --num-threads": "threads",
    "use --output": "dir folder out output-dir output-path path save",
    "use --prompt": "p text",
    "use --prompt 'Question: ... Answer:', or --ask NAME=PROMPT for more than one": "question",
    "use --port": "p",
    "use --sample": "num-samples",
    "use --temperature": "temp",
    "use --text-column": "text",
    "use --to": "format output-format",
    "use --url": "endpoint",
    "use --verbose": "debug v",
    "use --log-level debug": "debug v verbose",
    "use --version": "v",
    "use --yes": "force y",
    "set RAY_ADDRESS to the head of the cluster, such as 10.0.0.1:6379, or use blip2 submit": (
        "address ray-address"
    ),
    "blip2 plan measures a sample, and changes no --output": "dry-run",
    "finished rows stay as they are; run the same command again to resume, or give another --output": (
        "force overwrite resume"
    ),
    "the output is Parquet; blip2 export writes CSV, JSON lines and more of it": "csv jsonl output-format",
    "redirect the output instead, such as > log.txt": "q quiet silent",
}
"""Advice, and the flags of other programs, without dashes, for which it is given.

A flag gets the first advice whose own flags the command has.
"""

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
    for advice, habits in _HABITS.items():
        if name in habits.split() and set(_FLAG.findall(advice)) <= set(known):
            return f"; {advice}"
    names = {one.lstrip("-"): one for one in known}  # without dashes, which every flag has in common
    near = difflib.get_close_matches(name, names, 1, MIN_FLAG_SIMILARITY)
    return f"; did you mean {names[near[0]]}?" if near else ""
