"""The command line of the endpoint's benchmark: `python -m benchmarks.serve`."""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

import benchmarks.serve
from benchmarks.command_line import add_models, check_cases, make_parser
from benchmarks.inputs import write_scenes
from benchmarks.measure import report
from benchmarks.serve.command import ServeCommand
from benchmarks.serve.comparison import Comparison
from benchmarks.serve.limits import measure_overload, measure_streaming, measure_without_model
from blip2_actor import EngineConfig, GenerationOptions
from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER
from blip2_actor.testing import save_random_checkpoint

MAX_NEW_TOKENS = GenerationOptions().resolve().max_new_tokens
PARTS = ("comparison", "rest", "streaming", "overload", "without_model")
AT_ONCE = (16, 64)
"""Default numbers of callers, and default batch sizes."""


def main() -> None:
    parser = make_parser(benchmarks.serve.__doc__)
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        default=PARTS,
        metavar="PART",
        help=f"parts to measure (default: {' '.join(PARTS)})",
    )
    add("--model", default="demo", help="demo, midsize (random weights) or a folder (default: %(default)s)")
    add("--dtype", default="float32", help="dtype of both sides (default: %(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    add("--threads", type=int, default=os.cpu_count(), help="CPU threads of each side's model")
    add(
        "--tokens",
        type=int,
        help=f"new tokens of every text (default: each text ends by itself within {MAX_NEW_TOKENS})",
    )
    add("--images", type=int, default=128, help="number of different images (default: %(default)s)")
    add("--callers", type=int, nargs="+", default=AT_ONCE, help="callers at once, one load for each number")
    add("--batches", type=int, nargs="+", default=AT_ONCE, help="values of max_batch_size of @serve.batch")
    add("--passive", action="store_true", help="threads of @serve.batch wait without spinning, as ours do")
    add("--seconds", type=float, default=5, help="duration of one load (default: %(default)s)")
    add("--rest-seconds", type=float, default=20, help="seconds at rest (default: %(default)s)")
    add("--overload-seconds", type=float, default=60, help="seconds of overload (default: %(default)s)")
    add("--rounds", type=int, default=1, help="rounds, each with new processes (default: %(default)s)")
    add_models(parser)
    arguments = parser.parse_args()
    check_cases(parser, arguments.only, PARTS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = DEMO_FOLDER if arguments.model == "demo" else Path(arguments.model)
        if arguments.model == "midsize":
            folder = save_random_checkpoint(
                "midsize", arguments.models or Path(temporary), "cpu", torch.float32
            )
        run(arguments, folder, Path(temporary) / "scenes")


def run(arguments: argparse.Namespace, folder: Path, scenes: Path) -> None:
    """Measure all rounds; report the result again after each.

    Args:
        folder: the checkpoint of both sides.
        scenes: a new folder for the images.
    """
    began = time.monotonic()
    images = write_scenes(scenes, arguments.images)
    tokens = arguments.tokens
    options = GenerationOptions(max_new_tokens=tokens or MAX_NEW_TOKENS, min_new_tokens=tokens or 0)
    config = EngineConfig(
        model=str(folder), dtype=arguments.dtype, device=arguments.device, num_threads=arguments.threads
    )
    comparison = Comparison(
        images, arguments.callers, arguments.batches, arguments.seconds, is_passive=arguments.passive
    )
    names = ("model", "device", "threads", "tokens", "images", "seconds", "passive")
    result: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    result |= {"benchmark": "serve", "dtype": config.info().dtype}
    for turn in range(arguments.rounds):
        if "comparison" in arguments.only:
            comparison.begin_round(config, options)
        with closing(ServeCommand(flags(config, options))) as command:
            result["start"] = command.start()
            result |= measure_endpoint(command, comparison, images, arguments, is_first=turn == 0)
        if "without_model" in arguments.only and turn == 0:
            result["without_model"] = measure_without_model(images, arguments.seconds)
        result |= {"rounds": turn + 1, "took_s": time.monotonic() - began}
        report(result, arguments.output)


def measure_endpoint(
    command: ServeCommand,
    comparison: Comparison,
    images: Sequence[bytes],
    arguments: argparse.Namespace,
    *,
    is_first: bool,
) -> dict[str, Any]:
    """Measure the running endpoint: its loads in every round, everything else in the first."""
    found: dict[str, Any] = {}
    if "rest" in arguments.only and is_first:
        found["rest"] = command.at_rest(arguments.rest_seconds)
    if "comparison" in arguments.only:
        comparison.end_round(command)
        found["comparison"] = comparison.result()
    if "streaming" in arguments.only and is_first:
        found["streaming"] = measure_streaming(command, images, arguments.seconds)
    if "overload" in arguments.only and is_first:
        found["overload"] = measure_overload(command, images, arguments.overload_seconds)
    return found


def flags(config: EngineConfig, options: GenerationOptions) -> list[str]:
    """Return the flags of `blip2 serve` for an engine and the options of every request."""
    given = {
        "--model": config.model,
        "--dtype": config.dtype,
        "--device": config.device,
        "--num-threads": config.num_threads,
        "--max-new-tokens": options.max_new_tokens,
        "--min-new-tokens": options.min_new_tokens,
    }
    return [word for name, value in given.items() for word in (name, str(value))]


if __name__ == "__main__":
    main()
