"""Keep the pairs of image and text that match, as a retrieval checkpoint scores them. Needs no Ray.

    python -m examples.filter_by_match pairs --model Salesforce/blip2-itm-vit-g --min-score 0.5

`pairs` is a folder with a text file next to each image: photo.jpg and photo.txt. An image without one is left
out. Without a folder, pictures are drawn. Without --model, a tiny checkpoint with random weights scores the
pairs: it shows the calls, and its scores mean nothing. For millions of pairs, `blip2 score --text-column txt
--score-model …` does the same as a job.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from blip2_actor import MatchingConfig
from examples.drawn_pictures import draw_pictures

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp"}


def matching_pairs(folder: Path, model: str, min_score: float) -> list[tuple[str, str, float]]:
    """Return (file, text, probability of a match) for the pairs that reach the score, best first."""
    images = [
        file
        for file in sorted(folder.iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES and file.with_suffix(".txt").exists()
    ]
    texts = [image.with_suffix(".txt").read_text(encoding="utf-8").strip() for image in images]
    with MatchingConfig(model=model).build() as engine:
        matches = engine.score([image.read_bytes() for image in images], texts)
    scored = [
        (image.name, text, match.itm)
        for image, text, match in zip(images, texts, matches, strict=True)
        if match.itm is not None and match.itm >= min_score
    ]
    return sorted(scored, key=lambda pair: -pair[2])


def write_demonstration(folder: Path) -> str:
    """Write a few pairs to `folder/pairs` and a random checkpoint; return the checkpoint's folder."""
    from blip2_actor.testing import save_tiny_retrieval_checkpoint

    for name, caption in draw_pictures(folder / "pairs", 6).items():
        (folder / "pairs" / name).with_suffix(".txt").write_text(caption, encoding="utf-8")
    return str(save_tiny_retrieval_checkpoint(folder / "checkpoint"))


def image_folder(path: str) -> Path:
    """Return the folder that an argument names; argparse reports the error."""
    if not Path(path).is_dir():
        raise argparse.ArgumentTypeError(f"must be a folder of images, got {path}")
    return Path(path)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Keep the images that match their texts.")
    parser.add_argument(
        "folder",
        nargs="?",
        type=image_folder,
        help="folder of images with text files; default: drawn pictures",
    )
    parser.add_argument("--model", help="retrieval checkpoint: hub name or folder; default: random weights")
    parser.add_argument("--min-score", type=float, default=0.0, help="probability of a match (default: 0)")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as path:
        folder = arguments.folder or Path(path) / "pairs"
        model = arguments.model
        if arguments.folder is None or model is None:
            random_model = write_demonstration(Path(path))
            model = model or random_model
        for name, text, score in matching_pairs(folder, model, arguments.min_score):
            print(f"{score:.3f}  {name}  {text}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
