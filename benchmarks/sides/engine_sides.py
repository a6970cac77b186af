"""The two sides of the engine's benchmark, and the vision encoder alone next to a matrix product.

Each object is created in its own process (`contender.py`), and its methods return plain values.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, Blip2ForConditionalGeneration

from benchmarks.measure import product
from blip2_actor import Engine, EngineConfig, GenerationOptions, Request
from blip2_actor.checkpoints.checkpoint import Checkpoint
from blip2_actor.checkpoints.loading import load_model
from blip2_actor.device import prepare_device, resolve_compile, resolve_device, resolve_dtype, set_num_threads
from blip2_actor.engine.memory import full_encode_batch
from blip2_actor.models.layers import pack_for_cpu
from blip2_actor.models.vision import PixelNormalizer

Work = list[tuple[int, "str | None", int]]
"""Index of the image, prompt, and forced number of new tokens of each text; with 0 it ends by itself within
`MAX_NEW_TOKENS`."""
MAX_NEW_TOKENS = GenerationOptions().resolve().max_new_tokens


def smooth_noise(count: int, size_px: int) -> np.ndarray:
    """Return uint8[count, S, S, 3] of noise in squares."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    step = -(-size_px // 8)
    return np.ascontiguousarray(coarse.repeat(step, 1).repeat(step, 2)[:, :size_px, :size_px])


class EngineSide:
    """This project's engine."""

    def __init__(self, config: EngineConfig, work: Work, num_beams: int) -> None:
        self._work, self._num_beams = work, num_beams
        started = time.perf_counter()
        self._engine = Engine(config)
        self._pixels = smooth_noise(1 + max(image for image, *_ in work), self._engine.image_size_px)
        self._engine.generate([Request(image=self._pixels[0])], GenerationOptions(max_new_tokens=1))
        self._first_caption_s = time.perf_counter() - started

    def first_caption_s(self) -> float:
        """Return the seconds from nothing to the first caption: loading, self-test, one image."""
        return self._first_caption_s

    def run(self) -> list[list[int]]:
        """Return the new tokens of each text."""
        images = [self._engine.image(picture) for picture in self._pixels]
        asked = [
            Request(image=images[image], prompt=prompt, options=_options(length, self._num_beams))
            for image, prompt, length in self._work
        ]
        return [list(result.token_ids) for result in self._engine.generate(asked)]

    def quantization(self) -> dict[str, Any] | None:
        """Return the record of what is quantized."""
        record = self._engine.quantization
        return None if record is None else asdict(record)


def _options(length: int, num_beams: int) -> GenerationOptions:
    return GenerationOptions(
        max_new_tokens=length or MAX_NEW_TOKENS, min_new_tokens=length, num_beams=num_beams
    )


class ReferenceSide:
    """transformers as its documentation describes it, one batch at a time, with prepared pixel values."""

    def __init__(self, folder: Path, dtype: str, device: str, work: Work, num_beams: int) -> None:
        self._device, self._work, self._num_beams = torch.device(device), work, num_beams
        self.dtype: torch.dtype = getattr(torch, dtype)
        # With a device map the weights go straight to a GPU, in 2 s instead of a minute.
        device_map = {"": device} if self._device.type == "cuda" else None
        self._model = Blip2ForConditionalGeneration.from_pretrained(
            folder, dtype=self.dtype, device_map=device_map
        ).eval()
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        processor = Checkpoint(folder).image_processor
        normalizer = PixelNormalizer(processor.mean, processor.std, processor.rescale_factor).to(self._device)
        size_px = self._model.config.vision_config.image_size
        pixels = torch.from_numpy(smooth_noise(1 + max(image for image, *_ in work), size_px))
        self._pixel_values = normalizer(pixels.to(self._device), self.dtype)

    def run(self, batch: int) -> list[list[int]]:
        """Return the new tokens of each text; a batch runs until its longest text ends."""
        found: list[list[int]] = []
        for start in range(0, len(self._work), batch):
            found += self._generate(self._work[start : start + batch])
        return found

    def _generate(self, rows: Work) -> list[list[int]]:
        ids = [self._input_ids(prompt) for _, prompt, _ in rows]
        gaps = [max(map(len, ids)) - len(i) for i in ids]
        pad = self._model.config.text_config.pad_token_id
        input_ids = torch.tensor([[pad] * gap + i for gap, i in zip(gaps, ids, strict=True)])
        mask = torch.tensor([[0] * gap + [1] * len(i) for gap, i in zip(gaps, ids, strict=True)])
        longest = max(length for *_, length in rows)
        output = self._model.generate(
            self._pixel_values[[image for image, *_ in rows]],
            input_ids=input_ids.to(self._device),
            attention_mask=mask.to(self._device),
            do_sample=False,
            num_beams=self._num_beams,
            max_new_tokens=longest or MAX_NEW_TOKENS,
            min_new_tokens=longest or None,
        )
        skip = input_ids.shape[1] if self._model.config.text_config.model_type == "opt" else 1
        new = output[:, skip:].tolist()
        return [row[:length] if length else row for row, (*_, length) in zip(new, rows, strict=True)]

    def _input_ids(self, prompt: str | None) -> list[int]:
        config = self._model.config
        text = config.text_config
        start = text.bos_token_id if text.model_type == "opt" else text.eos_token_id
        ids = self._tokenizer(prompt).input_ids if prompt else [start]
        return [config.image_token_index] * config.num_query_tokens + ids

    @torch.inference_mode()
    def encode(self, num_images: int, batch: int) -> None:
        """Run the vision encoder alone."""
        for pixel_values in self._pixel_values[:num_images].split(batch):
            self._model.vision_model(pixel_values)


class EncoderSide:
    """This project's vision encoder alone, and the matrix product that shows the device's peak.

    On a CPU two threads encode, as in the engine.
    """

    def __init__(self, config: EngineConfig, num_images: int) -> None:
        device = resolve_device(config.device)
        prepare_device(device)
        checkpoint = Checkpoint(Path(config.model))
        self._vision_config = checkpoint.config.vision_config
        dtype = resolve_dtype(config.dtype, device)
        self._model = load_model(checkpoint, device, dtype)
        if device.type == "cpu":
            pack_for_cpu(self._model)
        self.batch = config.encode_batch or full_encode_batch(self._vision_config, device)
        pixels = torch.from_numpy(smooth_noise(num_images, self._vision_config.image_size))
        self._pixel_values = self._model.normalizer(pixels.to(device), dtype)
        self._product, self._product_flops = product(dtype, device)
        self._num_threads = torch.get_num_threads()
        self._second_thread = None
        if device.type == "cpu" and self._num_threads > 1:
            self._second_thread = ThreadPoolExecutor(
                1, initializer=set_num_threads, initargs=(self._num_threads // 2,)
            )
        self._encode = self._model.image_features
        if resolve_compile(config.compile, config.device_map, device):
            self._encode = torch.compile(self._encode, dynamic=False, fullgraph=True)

    def describe(self) -> tuple[str, int, float, float]:
        """Return the dtype, the images per pass, and the FLOP of one image and of `multiply`.

        Only matrix products count, with 2 FLOP per multiply-add.
        """
        config = self._vision_config
        width, tokens = config.hidden_size, (config.image_size // config.patch_size) ** 2 + 1
        layer = 8 * tokens * width**2 + 4 * tokens * width * config.intermediate_size + 4 * tokens**2 * width
        flops = config.num_hidden_layers * layer + 2 * (tokens - 1) * 3 * config.patch_size**2 * width
        return str(self._pixel_values.dtype).removeprefix("torch."), self.batch, flops, self._product_flops

    def encode(self) -> None:
        """Encode all images once."""
        if self._second_thread is None:
            self._encode_all(self._pixel_values.split(self.batch))
            return
        num_pairs = -(-len(self._pixel_values) // (2 * self.batch))
        batches = self._pixel_values.tensor_split(2 * num_pairs)  # the same number for each thread
        set_num_threads(self._num_threads - self._num_threads // 2)
        other_half = self._second_thread.submit(self._encode_all, batches[1::2])
        self._encode_all(batches[::2])
        other_half.result()
        set_num_threads(self._num_threads)

    @torch.inference_mode()
    def _encode_all(self, batches: Sequence[torch.Tensor]) -> None:
        for pixel_values in batches:
            self._encode(pixel_values)

    def multiply(self) -> None:
        self._product()
