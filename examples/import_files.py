"""Turn a finished output into import files of labelling tools, to look at captions and correct them.

    python -m examples.import_files captions --images photos --to label-studio > tasks.json
    python -m examples.import_files captions --images photos --to fiftyone > samples.jsonl

`captions` is the output of a job whose input was the folder `photos`. Label Studio imports the tasks by
"Import" in a project whose local storage serves the folder. Each line for FiftyOne is one sample:

    samples = [fiftyone.Sample(**json.loads(line)) for line in open("samples.jsonl")]
    fiftyone.Dataset("captions").add_samples(samples)
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds

COLUMNS = ["key", "caption", "logprob", "status", "error"]
FORMATS = ("label-studio", "fiftyone")


def rows(output: Path) -> Iterator[dict[str, Any]]:
    """Yield the rows of an output in constant memory; files and folders that begin with _ have no rows."""
    for batch in ds.dataset(output, format="parquet").to_batches(columns=COLUMNS):
        yield from batch.to_pylist()


def label_studio_task(row: dict[str, Any], images: Path) -> dict[str, Any]:
    """Return one task, with the caption as a prediction for a TextArea named "caption"."""
    choice = {
        "from_name": "caption",
        "to_name": "image",
        "type": "textarea",
        "value": {"text": [row["caption"]]},
    }
    return {
        "data": {"image": f"/data/local-files/?d={images.name}/{row['key']}", "key": row["key"]},
        "predictions": [{"result": [choice], "score": row["logprob"]}] if row["status"] == "ok" else [],
    }


def fiftyone_sample(row: dict[str, Any], images: Path) -> dict[str, Any]:
    """Return the arguments of one `fiftyone.Sample`; a failed row is tagged with its status."""
    return {
        "filepath": str((images / row["key"]).resolve()),
        "tags": [] if row["status"] == "ok" else [row["status"]],
        "caption": row["caption"],
        "caption_logprob": row["logprob"],
        "error": row["error"],
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Write an import file of a labelling tool.")
    parser.add_argument("output", type=Path, help="output of blip2 caption")
    parser.add_argument("--images", type=Path, required=True, help="folder that was captioned")
    parser.add_argument("--to", choices=FORMATS, required=True)
    arguments = parser.parse_args(argv)
    if arguments.to == "label-studio":
        json.dump([label_studio_task(row, arguments.images) for row in rows(arguments.output)], sys.stdout)
    else:
        for row in rows(arguments.output):
            print(json.dumps(fiftyone_sample(row, arguments.images)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
