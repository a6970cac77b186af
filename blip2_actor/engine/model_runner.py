"""The model on its device, as the scheduler uses it: host values in, tensors out.

Everything that touches the device is here: uploads, dtype, the slots' memory.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from contextlib import suppress
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from blip2_actor.engine.cuda_graphs import DecodeReplay, StepCapturer
from blip2_actor.engine.encoders import Encoders
from blip2_actor.engine.memory import free_bytes, position_bytes
from blip2_actor.engine.out_of_memory import ShrinkingBatches
from blip2_actor.engine.request_state import EncodedImage, RequestState
from blip2_actor.engine.upload import Upload, stack_pixels
from blip2_actor.models.blip2 import Blip2
from blip2_actor.models.language_model import KVCacheProtocol, LanguageModel
from blip2_actor.models.scoring import text_logprobs
from blip2_actor.transfer import ids_to_device, to_device

SCORE_BATCH = 64
"""Texts read at once outside the slots; bounds the memory of their logits."""


class ModelRunner:
    """Encode, prefill, decode."""

    def __init__(
        self,
        model: Blip2,
        num_slots: int,
        compiled_batch: int | None = None,
        capturer: StepCapturer | None = None,
    ) -> None:
        """
        Args:
            num_slots: texts decoded at once.
            compiled_batch: as in `Encoders`.
            recorder: replay decode steps in fixed shapes; None runs each as it is.
        """
        self.model = model
        self.language_model: LanguageModel = model.language_model
        self.device = model.query_tokens.device
        self.dtype = model.dtype
        self.num_slots = num_slots
        self._slots: KVCacheProtocol | None = None
        self._position_bytes = position_bytes(model)
        self._text_batches = ShrinkingBatches(SCORE_BATCH, "texts")
        self._replay = DecodeReplay(self.language_model, capturer, self.device) if capturer else None
        self._upload = Upload(self.device) if self.device.type == "cuda" else None
        self.encoders = Encoders(model, compiled_batch)

    @torch.inference_mode()
    def encode(self, images: Sequence[EncodedImage]) -> None:
        """Through the vision encoder, the Q-Former and the projection, as one batch.

        On a CPU two threads may do so at once.
        """
        encoded = self.encoders(stack_pixels(images) if self._upload is None else self._upload.take(images))
        for row, image in enumerate(images):
            image.pooler_output, image.qformer_features = (
                encoded.pooler_output[row],
                encoded.qformer_features[row],
            )
            image.prefix = encoded.prefixes[row]
            if image.keeps_image_embeds:
                image.image_embeds = encoded.image_embeds[row].clone()  # a view would keep the whole batch

    @torch.inference_mode()
    def send_ahead(self, waiting: Collection[EncodedImage], count: int) -> None:
        """While the device computes, bring it the images that it will most likely encode next."""
        if self._upload is None or self._upload.has_sent or len(waiting) < count:
            return
        with suppress(torch.OutOfMemoryError):  # `encode` will send them, and smaller batches if need be
            self._upload.send(list(islice(waiting, count)))

    def shrink(self, num_slots: int) -> None:
        """Give back the memory of all slots; the next prefill makes `num_slots` new ones."""
        self.num_slots = num_slots
        self._forget_graphs()
        self._slots = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prefix_length(self, job: RequestState) -> int:
        return self.model.config.num_query_tokens + len(job.prompt_ids)

    def cached_length(self, job: RequestState) -> int:
        return self.language_model.cached_length(self.prefix_length(job))

    @torch.inference_mode()
    def prefill(self, jobs: Sequence[RequestState], slots: list[int]) -> Tensor:
        """Run each job's image and prompt into its slot; float[n, V], logits of the first new tokens."""
        for job in jobs:
            self._make_room(self.prefix_length(job), job.options.max_new_tokens)
        flat = to_device([t for job in jobs for t in job.prompt_ids], self.device)
        texts = self.model.embed_tokens(flat).split([len(job.prompt_ids) for job in jobs])
        images = [job.image.prefix for job in jobs if job.image.prefix is not None]
        prefixes = [torch.cat(pair) for pair in zip(images, texts, strict=True)]
        return self.language_model.prefill(prefixes, slots, self.slots)

    @torch.inference_mode()
    def decode(self, token_ids: list[int], lengths: list[int]) -> Tensor:
        """Append one token to each of the first slots; float[R, V]."""
        if self._replay is not None:
            return self._replay.decode(token_ids, lengths, self.slots)
        return self.decode_plainly(token_ids, lengths)

    @property
    def replays(self) -> bool:
        """True where `decode` repeats recorded steps."""
        return self._replay is not None

    @torch.inference_mode()
    def decode_plainly(self, token_ids: list[int], lengths: list[int]) -> Tensor:
        """What `decode` does where nothing is replayed."""
        ids = to_device(token_ids, self.device)
        positions = to_device(lengths, self.device)
        return self.language_model.decode(ids, positions, self.slots, max(lengths) + 1)

    @torch.inference_mode()
    def text_logprobs(self, rows: list[tuple[EncodedImage, list[int], list[int]]]) -> list[list[float]]:
        """Log-probability of each token of given texts: (image, prompt ids, text ids) -> list per text."""

        def score(batch: list[tuple[EncodedImage, list[int], list[int]]]) -> list[list[float]]:
            images, prompt_ids, text_ids = zip(*batch, strict=True)
            prefixes = [image.prefix for image in images]
            return [x.tolist() for x in text_logprobs(self.model, prefixes, prompt_ids, text_ids)]

        return self._text_batches.run(score, rows)

    @torch.inference_mode()
    def text_features(self, token_ids: list[list[int]]) -> list[Tensor]:
        """Last hidden states of texts alone: float[T_i, Dw] each, on the host."""

        def read(batch: list[list[int]]) -> list[Tensor]:
            features = self.model.text_features(ids_to_device(batch, self.device))
            return list(torch.cat(features).cpu().split([len(ids) for ids in batch]))

        return self._text_batches.run(read, token_ids)

    @torch.inference_mode()
    def attention_maps(self, image: EncodedImage) -> dict[str, np.ndarray]:
        """What each query looks at, by layer: float32[H, Q, P] each, of an image with kept embeddings."""
        recorded: dict[str, Tensor] = {}
        assert image.image_embeds is not None, "the image must keep its embeddings"
        self.model.qformer_features(image.image_embeds[None], recorded.__setitem__)
        suffix = ".cross_attention"
        return {
            name.removesuffix(suffix): weights[0].float().cpu().numpy()
            for name, weights in recorded.items()
            if name.endswith(suffix)
        }

    @torch.inference_mode()
    def copy_slots(self, sources: list[int], targets: list[int], length: int) -> None:
        self.slots.copy_slots(sources, targets, length)

    @torch.inference_mode()
    def copy_positions(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        self.slots.copy_positions(sources, targets, start, stop)

    @property
    def slots(self) -> KVCacheProtocol:
        assert self._slots is not None, "prefill makes the slots"
        return self._slots

    def _make_room(self, prefix_length: int, max_new_tokens: int) -> None:
        if self._slots is not None and self._slots.holds(prefix_length, max_new_tokens):
            return
        self._require_memory(prefix_length + max_new_tokens)
        if self._slots is None:
            self._slots = self.language_model.new_kv_cache(self.num_slots, prefix_length, max_new_tokens)
        else:
            self._forget_graphs()
            self._slots.grow(prefix_length, max_new_tokens)

    def _require_memory(self, num_positions: int) -> None:
        """A GPU says when its memory ends; a CPU's machine would swap, or end the process."""
        needed = self.num_slots * num_positions * self._position_bytes
        if self.device.type == "cpu" and needed > (free := free_bytes(self.device)):
            raise torch.OutOfMemoryError(
                f"{self.num_slots} slots of {num_positions} positions need {needed:,} bytes of {free:,} free"
            )

    def _forget_graphs(self) -> None:
        if self._replay is not None:
            self._replay.forget()
