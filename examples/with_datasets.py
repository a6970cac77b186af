"""From a data set of the `datasets` library to one with captions, and on to the hub.

    pip install datasets    # Ray is not needed
    python -m examples.with_datasets --output captioned.parquet
    python -m examples.with_datasets beans --model Salesforce/blip2-opt-2.7b --output captioned.parquet

The name is that of a data set of the hub, or a folder of images. Without one, pictures are drawn.
`captioned.push_to_hub("me/captioned")` uploads the result; for a folder of many files, use
`hf upload me/captions captions --repo-type dataset`. For millions of images, `blip2 caption hf://datasets/…`
reads the files of a data set as a job.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

import datasets
from datasets.table import embed_table_storage

from blip2_actor import Engine, EngineConfig
from examples.drawn_pictures import draw_pictures

BATCH_ROWS = 64


def with_captions(data: datasets.Dataset, engine: Engine, image_column: str = "image") -> datasets.Dataset:
    """Return a data set with the columns caption, logprob and status in addition to its own."""

    def caption(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        results = engine.generate(batch[image_column], max_new_tokens=30)
        return {
            "caption": [result.text for result in results],
            "logprob": [result.logprob for result in results],
            "status": [str(result.status) for result in results],
        }

    # A separate fingerprint: the cached captions of another model must not be reused for these.
    return data.map(caption, batched=True, batch_size=BATCH_ROWS, new_fingerprint=uuid.uuid4().hex)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", nargs="?", help="data set of the hub, or folder of images; default: drawn")
    parser.add_argument("--split", default="train")
    parser.add_argument("--image-column", default="image")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--output", required=True, help="Parquet file to write")
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as drawn:
        name = given.data or drawn
        if given.data is None:
            draw_pictures(Path(drawn), 24)
        data = datasets.load_dataset(name, split=given.split)
        with EngineConfig(model=given.model).build() as engine:
            captioned = with_captions(data, engine, given.image_column)
        # Store the images themselves, not only their paths; push_to_hub does so by itself.
        embedded = captioned.with_format("arrow").map(
            embed_table_storage, batched=True, new_fingerprint=uuid.uuid4().hex
        )
        embedded.with_format(None).to_parquet(given.output)
        for row in captioned.select_columns(["caption", "status"]).select(range(min(3, len(captioned)))):
            print(row["caption"] or row["status"])
        print(f"{len(captioned)} rows in {given.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
