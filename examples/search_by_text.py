"""Search a folder of images by a text, with the embeddings of a retrieval checkpoint. Needs no Ray.

    python -m examples.search_by_text 'a dog on a beach' photos --model Salesforce/blip2-itm-vit-g-coco

Without a folder, pictures are drawn. Without --model, a tiny checkpoint with random weights embeds them: it
shows the calls, and its order means nothing. For millions of images, keep the vectors.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from blip2_actor import MatchingConfig
from examples.filter_by_match import IMAGE_SUFFIXES, image_folder, write_demonstration


def search(folder: Path, model: str, text: str) -> list[tuple[float, str]]:
    """Return (cosine, file) for the images of a folder, best first."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in IMAGE_SUFFIXES]
    with MatchingConfig(model=model).build() as engine:
        images = engine.image_embeddings([str(file) for file in files])
        query = engine.text_embeddings([text])[0]
    if query.vectors is None:
        raise ValueError(f"the text cannot be embedded: {query.error}")
    # An image has one vector per query of the Q-Former, and a text has one; the best pair counts.
    found = [
        (float(np.max(image.vectors @ query.vectors.T)), file.name)
        for image, file in zip(images, files, strict=True)
        if image.vectors is not None
    ]
    return sorted(found, reverse=True)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Search images by a text.")
    parser.add_argument("text", nargs="?", default="a red circle", help="what to look for")
    parser.add_argument(
        "folder", nargs="?", type=image_folder, help="folder of images; default: drawn pictures"
    )
    parser.add_argument("--model", help="retrieval checkpoint: hub name or folder; default: random weights")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as path:
        folder, model = arguments.folder, arguments.model
        if folder is None or model is None:
            random_model = write_demonstration(Path(path))
            folder, model = folder or Path(path) / "pairs", model or random_model
        for cosine, name in search(folder, model, arguments.text)[:10]:
            print(f"{cosine:.3f}  {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
