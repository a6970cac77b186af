"""The command line of the engine's benchmark: `python -m benchmarks.engine`."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import benchmarks.engine
from benchmarks.command_line import add_models, check_cases, make_parser
from benchmarks.engine.cases import CASES, DEFAULT_CASES, Case
from benchmarks.engine.measuring import measure_case
from benchmarks.measure import report, write
from blip2_actor import EngineConfig
from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER
from blip2_actor.testing import save_random_checkpoint


def main() -> None:
    parser = make_parser(benchmarks.engine.__doc__)
    parser.add_argument("cases", nargs="*", help="cases to run (default: those meant for the device)")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and exit")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of each side (default: torch's choice)")
    add_models(parser)
    parser.add_argument("--rounds", type=int, help="rounds of every case (default: each case's own number)")
    parser.add_argument(
        "--reference-batches",
        type=int,
        nargs="*",
        help="batch sizes of the reference (default: each case's own); no number leaves the reference out",
    )
    parser.add_argument("--quantize", choices=("int8", "fp8", "int8-weights"), help="quantize the engine")
    parser.add_argument(
        "--encode-batch", type=int, help="images of one pass of the encoders (default: the engine's choice)"
    )
    parser.add_argument("--skip-vision", action="store_true", help="do not measure the vision encoder alone")
    parser.add_argument("--quick", action="store_true", help="a quarter of the images, one round")
    arguments = parser.parse_args()
    if arguments.list:
        print("\n".join(CASES))
        return
    check_cases(parser, arguments.cases, CASES)
    with tempfile.TemporaryDirectory() as temporary:
        arguments.models = arguments.models or Path(temporary)
        results: dict[str, Any] = {}
        for name in arguments.cases or DEFAULT_CASES[torch.device(arguments.device).type]:
            _run(name, arguments, results)
            report(_as_json(results), arguments.output)


def _run(name: str, arguments: argparse.Namespace, results: dict[str, Any]) -> None:
    """Measure one case, and rewrite the results whenever a figure is known."""
    case = CASES[name]
    if arguments.reference_batches is not None:
        case = replace(case, reference_batches=arguments.reference_batches)
    print(name, flush=True)
    config = EngineConfig(
        model=str(_checkpoint(case, arguments)),
        dtype=case.dtype,
        device=arguments.device,
        max_slots=case.max_slots,
        num_threads=arguments.threads,
        skip_self_test=case.skip_self_test,
        quantize=arguments.quantize,
        encode_batch=arguments.encode_batch,
    )

    def keep(found: dict[str, Any]) -> None:
        results[name] = found
        write(_as_json(results), arguments.output)

    num_images = max(case.num_images // 4, 4) if arguments.quick else case.num_images
    rounds = arguments.rounds or (1 if arguments.quick else case.rounds)
    measure_case(case, config, num_images, rounds, with_vision=not arguments.skip_vision, keep=keep)


def _checkpoint(case: Case, arguments: argparse.Namespace) -> Path:
    if case.model == "demo":
        return DEMO_FOLDER
    stored = torch.float32 if case.model == "midsize" else torch.bfloat16
    return save_random_checkpoint(case.model, arguments.models, arguments.device, stored)


def _as_json(results: dict[str, Any]) -> dict[str, Any]:
    return {"benchmark": "engine", "cases": results}


if __name__ == "__main__":
    main()
