"""A folder of photographs to captions: run the job from Python and read its Parquet files.

    python -m examples.caption_folder --output captions
    python -m examples.caption_folder --input /data/photos --output captions --model Salesforce/blip2-opt-2.7b

Without --input, pictures are drawn first, and the demonstration checkpoint captions them. Run the same
command again: the run is complete, so nothing is captioned twice.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pyarrow.dataset as ds

from examples.drawn_pictures import draw_pictures
from pipeline.__main__ import main as blip2


def caption_folder(pictures: str, output: str, model: str) -> int:
    """Caption a folder and print a line per picture; return the exit status of `blip2 caption`."""
    status = blip2(["caption", "--model", model, "--input", pictures, "--output", output])
    if Path(output).exists():
        table = ds.dataset(output, format="parquet").to_table(columns=["key", "status", "caption"])
        for row in table.slice(0, 10).to_pylist():
            print(f"{row['key']}  {row['caption'] or row['status']}")
        print(f"{len(table)} rows in {output}")
    return status


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Caption a folder of photographs.")
    parser.add_argument("--input", help="folder of images; default: pictures are drawn to pictures/")
    parser.add_argument("--output", required=True, help="folder for the captions")
    parser.add_argument("--model", default="demo", help="hub name, folder or demo (default: demo)")
    arguments = parser.parse_args(argv)
    if arguments.input is None:
        arguments.input = "pictures"
        draw_pictures(Path(arguments.input), 24)
    return caption_folder(arguments.input, arguments.output, arguments.model)


if __name__ == "__main__":
    sys.exit(main())
