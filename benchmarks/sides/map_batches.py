"""The alternative that users write: Ray Data's `map_batches` around transformers' `generate`.

It follows Ray's documentation of batch inference.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

BATCH_SIZE = 16


class Captioner:
    """The class that runs in an actor.

    Args:
        dtype, threads: None leaves them to the libraries.
    """

    def __init__(
        self, folder: str, dtype: str | None, threads: int | None, max_new_tokens: int, min_new_tokens: int
    ) -> None:
        import torch
        from transformers import AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        if threads is not None:
            torch.set_num_threads(threads)
        chosen = {} if dtype is None else {"dtype": getattr(torch, dtype)}
        self.model = Blip2ForConditionalGeneration.from_pretrained(folder, **chosen)
        size_px, queries = self.model.config.vision_config.image_size, self.model.config.num_query_tokens
        self.processor = Blip2Processor(
            BlipImageProcessorPil(size={"height": size_px, "width": size_px}),
            AutoTokenizer.from_pretrained(folder, padding_side="left"),
            num_query_tokens=queries,
        )
        self.lengths = {"max_new_tokens": max_new_tokens, "min_new_tokens": min_new_tokens}

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        from PIL import Image

        captions = self.captions([Image.fromarray(image) for image in batch["image"]])
        return {"path": batch["path"], "caption": captions, "at": [time.time()] * len(captions)}

    def captions(self, images: list[Any]) -> list[str]:
        """Caption PIL images in one batch."""
        inputs = self.processor(images=images, text=[""] * len(images), return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        output = self.model.generate(**inputs, **self.lengths)
        return [text.strip() for text in self.processor.batch_decode(output, skip_special_tokens=True)]


class MapBatchesSide:
    """Run the job in this process, which becomes Ray's driver."""

    def __init__(self) -> None:
        from pipeline import set_ray_environment

        set_ray_environment()

    def run(
        self,
        images: str,
        output: str,
        folder: str,
        dtype: str | None,
        threads: int | None,
        max_new_tokens: int,
    ) -> dict[str, float]:
        """Caption a folder of images.

        Args:
            images, output: folders.
            folder: the checkpoint.
            dtype, threads: None leaves them to the libraries.
            max_new_tokens: number of tokens of every caption.

        Returns:
            What the run took, with keys of `JobSide.run`.
        """
        import ray

        from pipeline.run.cluster import connected

        began = time.time()
        with connected():
            ds = ray.data.read_images(images, mode="RGB", include_paths=True)
            ds = ds.map_batches(
                Captioner,
                fn_constructor_args=(folder, dtype, threads, max_new_tokens, max_new_tokens),
                batch_size=BATCH_SIZE,
                compute=ray.data.ActorPoolStrategy(size=1),
            )
            ds.write_parquet(output)
        ends = np.concatenate(
            [pq.read_table(path, columns=["at"])["at"].to_numpy() for path in Path(output).rglob("*.parquet")]
        )
        first, last = ends.min(), ends.max()
        return {
            "num_rows": len(ends),
            "rows_per_s": float((ends > first).sum() / (last - first)),
            "first_rows_s": float(first - began),
            "total_s": time.time() - began,
        }
