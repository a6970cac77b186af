"""Captions as one stage of your own Ray Data program: read, caption, filter, write.

    python -m examples.stage_in_a_dataset --output captioned
    python -m examples.stage_in_a_dataset --input photos --output captioned --model Salesforce/blip2-opt-2.7b

Every column of your dataset is kept. A bad image is a row with a status, so the filter decides what happens
to it.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import ray
from ray.data.expressions import col

import pipeline
from blip2_actor import EngineConfig, GenerationOptions
from examples.drawn_pictures import draw_pictures


def add_number_of_words(row: dict[str, Any]) -> dict[str, Any]:
    """Stand for a stage of your own, after the captions."""
    return {**row, "num_words": len(row["caption"].split())}


def caption_dataset(pictures: str, output: str, model: str) -> int:
    """Caption a folder, drop the rows that failed, and return the number of rows written."""
    # Workers may run in another working directory.
    pictures, output = os.path.abspath(pictures), os.path.abspath(output)
    files = ray.data.read_binary_files(pictures, include_paths=True)
    captioned = pipeline.caption(
        files, EngineConfig(model=model), GenerationOptions(max_new_tokens=30), image_column="bytes"
    )
    good = captioned.filter(expr=col("status") == "ok").map(add_number_of_words)
    good.select_columns(["path", "caption", "num_words"]).write_parquet(output)
    written = ray.data.read_parquet(output)
    for row in written.take(5):
        print(f"{Path(row['path']).name}  {row['caption']} ({row['num_words']} words)")
    return written.count()


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Caption images in a Ray Data program.")
    parser.add_argument("--input", help="folder of images; default: pictures are drawn to pictures/")
    parser.add_argument("--output", required=True, help="folder for the captions")
    parser.add_argument("--model", default="demo", help="hub name, folder or demo (default: demo)")
    arguments = parser.parse_args(argv)
    if arguments.input is None:
        arguments.input = "pictures"
        draw_pictures(Path(arguments.input), 24)
    print(f"{caption_dataset(arguments.input, arguments.output, arguments.model)} rows written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
