"""Ask questions about each image of a folder and write the answers as CSV. Needs no Ray.

    python -m examples.ask_about_folder photos --model Salesforce/blip2-flan-t5-xl \
        --ask 'where=is this indoors or outdoors?' --ask 'people=how many people are there?' > answers.csv

Each image is encoded once for all questions. Without a folder, pictures are drawn, and the demonstration
checkpoint continues the beginning of a caption instead of answering.
"""

from __future__ import annotations

import argparse
import csv
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from blip2_actor import EngineConfig, GenerationOptions, Request
from examples.drawn_pictures import draw_pictures
from examples.filter_by_match import IMAGE_SUFFIXES, image_folder


def ask(folder: Path, model: str, prompts: dict[str, str]) -> Iterator[dict[str, str]]:
    """Yield a row for each image: its file, and the answer to each prompt, or why there is none."""
    with EngineConfig(model=model).build() as engine:
        for file in sorted(folder.iterdir()):
            if file.suffix.lower() not in IMAGE_SUFFIXES:
                continue
            try:
                image = engine.image(str(file))
            except ValueError as error:
                yield {"file": file.name, **dict.fromkeys(prompts, f"({error})")}
                continue
            requests = [Request(image=image, prompt=prompt) for prompt in prompts.values()]
            results = engine.generate(requests, GenerationOptions(max_new_tokens=20))
            answers = [result.text or f"({result.error})" for result in results]
            yield {"file": file.name, **dict(zip(prompts, answers, strict=True))}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ask questions about the images of a folder.")
    parser.add_argument(
        "folder", nargs="?", type=image_folder, help="folder of images; default: drawn pictures"
    )
    parser.add_argument("--model", default="demo", help="hub name or folder (default: demo)")
    parser.add_argument("--ask", action="append", default=[], metavar="NAME=QUESTION", help="may be repeated")
    arguments = parser.parse_args(argv)
    for one in arguments.ask:
        if "=" not in one:
            parser.error(f"--ask must be NAME=QUESTION, got {one}")
    questions = dict(one.split("=", 1) for one in arguments.ask)
    prompts = {name: f"Question: {question} Answer:" for name, question in questions.items()}
    with tempfile.TemporaryDirectory() as path:
        if arguments.folder is None:
            draw_pictures(Path(path), 6)
        rows = ask(arguments.folder or Path(path), arguments.model, prompts or {"caption": "a"})
        writer = csv.DictWriter(sys.stdout, ["file", *(prompts or {"caption": ""})])
        writer.writeheader()
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
