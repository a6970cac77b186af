"""The model on its device, as the scheduler uses it: host values in, tensors out.

Everything that touches the device is here: uploads, dtypes, the memory of the slots.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from blip2_actor.engine.cuda_graphs import DecodeReplay, StepCapturer, fill_in
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.encoders import Encoded, Encoders
from blip2_actor.engine.memory import free_bytes, position_bytes
from blip2_actor.engine.out_of_memory import ShrinkingBatches
from blip2_actor.engine.request_state import RequestState
from blip2_actor.engine.upload import Upload, stack_pixels
from blip2_actor.generation.step import LateTokens
from blip2_actor.models.blip2 import Blip2
from blip2_actor.models.language_model import KVCacheProtocol, LanguageModel
from blip2_actor.models.recorder import NO_RECORDER, Recorder
from blip2_actor.transfer import ids_to_device, to_device

ON_DEVICE = -1
"""Stands for a token that `select` has selected for a slot and the host has not read."""
SCORE_BATCH = 64
"""Texts read at once outside the slots; bounds the memory of their logits."""

TextToScore = tuple[EncodedImage, list[int], list[int]]
"""Image, prompt ids and text ids."""


class ModelRunner:
    """Encode, prefill, decode."""

    def __init__(
        self,
        model: Blip2,
        num_slots: int,
        encoders: Encoders | None = None,
        capturer: StepCapturer | None = None,
    ) -> None:
        """
        Args:
            num_slots: texts decoded at once.
            encoders: of the model; None encodes every batch kernel by kernel.
            capturer: captures decode steps of fixed shapes to replay them; None runs each step eagerly.
        """
        self.model = model
        self.language_model: LanguageModel = model.language_model
        self.device = model.query_tokens.device
        self.dtype = model.dtype
        self.num_slots = num_slots
        self.position_bytes = position_bytes(model)
        """Memory of one position in one slot."""
        self.encoders = encoders or Encoders(model)
        self._slots: KVCacheProtocol | None = None
        self._selected: Tensor | None = None
        """int64[S]: the last token that `select` has selected for each slot."""
        self._text_batches = ShrinkingBatches(SCORE_BATCH, "texts")
        self._replay = DecodeReplay(self.language_model, capturer, self.device) if capturer else None
        self._upload = Upload(self.device) if self.device.type == "cuda" else None

    @torch.inference_mode()
    def encode(self, images: Sequence[EncodedImage]) -> None:
        """Run a batch through the vision encoder, the Q-Former and the projection.

        On a CPU, two threads may do so at once.
        """
        self.store(images, self.run_encoders(images))

    @torch.inference_mode()
    def run_encoders(self, images: Sequence[EncodedImage]) -> Encoded:
        """Queue a batch on the current stream of a GPU; `store` gives its tensors to the images."""
        return self.encoders(stack_pixels(images) if self._upload is None else self._upload(images))

    @torch.inference_mode()
    def store(self, images: Sequence[EncodedImage], encoded: Encoded) -> None:
        """Give images what `run_encoders` computes of them; from then on they count as encoded."""
        for row, image in enumerate(images):
            image.pooler_output = encoded.pooler_output[row]
            image.qformer_features = encoded.qformer_features[row]
            image.prefix = encoded.prefixes[row]
            if image.keeps_image_embeds:
                image.image_embeds = encoded.image_embeds[row].clone()  # a view would keep the whole batch

    def shrink(self, num_slots: int) -> None:
        """Give back the memory of all slots; the next prefill allocates `num_slots` new ones."""
        self.num_slots = num_slots
        self._forget_graphs()
        self._slots = self._selected = None
        self.forget_images()

    def forget_images(self) -> None:
        """Give back the memory of the captured pass of the encoders, and all that is cached."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # the pass may still run
        self.encoders.forget()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def prefix_length(self, request: RequestState) -> int:
        """Positions of the image and the prompt together."""
        return self.model.config.num_query_tokens + len(request.prompt_ids)

    def cached_length(self, request: RequestState) -> int:
        """Positions of the key/value cache that a prefill fills."""
        return self.language_model.cached_length(self.prefix_length(request))

    @torch.inference_mode()
    def prefill(self, requests: Sequence[RequestState], slots: list[int]) -> Tensor:
        """Run each request's image and prompt into its slot.

        Returns:
            float[n, V], logits of the first new tokens.
        """
        for request in requests:
            self._ensure_slots_hold(self.prefix_length(request), request.options.max_new_tokens)
        flat = to_device([t for request in requests for t in request.prompt_ids], self.device)
        texts = self.language_model.embed_tokens(flat).split(
            [len(request.prompt_ids) for request in requests]
        )
        images = [request.image.prefix for request in requests if request.image.prefix is not None]
        prefixes = [torch.cat(pair) for pair in zip(images, texts, strict=True)]
        return self.language_model.prefill(prefixes, slots, self.slots)

    @torch.inference_mode()
    def decode(self, token_ids: list[int], lengths: list[int]) -> Tensor:
        """Append one token to each of the first slots.

        Args:
            token_ids: `ON_DEVICE` stands for the token that `select` has selected for the slot.

        Returns:
            float[R, V], logits of the next tokens; valid until the next step.
        """
        selected = self._selected if ON_DEVICE in token_ids else None
        if self._replay is not None:
            return self._replay.decode(token_ids, lengths, self.slots, selected)
        return self.decode_eagerly(token_ids, lengths, selected)

    @property
    def replays_steps(self) -> bool:
        """True if `decode` replays captured steps."""
        return self._replay is not None

    @torch.inference_mode()
    def decode_eagerly(
        self, token_ids: list[int], lengths: list[int], selected: Tensor | None = None
    ) -> Tensor:
        """Do what `decode` does, without a CUDA graph.

        Args:
            selected: int64[S], the tokens of the slots whose id is negative.
        """
        ids = fill_in(to_device(token_ids, self.device), selected)
        positions = to_device(lengths, self.device)
        return self.language_model.decode(ids, positions, self.slots, max(lengths) + 1)

    @torch.inference_mode()
    def select(
        self,
        logits: Tensor,
        slots: Sequence[int],
        rows: Sequence[int],
        early: Sequence[int] = (),
        end_ids: Collection[int] = (),
    ) -> LateTokens:
        """Select the largest logit of each row, and keep it on the device for the next `decode`.

        Args:
            logits: float[R, V].
            slots: the slots to which the tokens will be appended.
            rows: for each of these slots, its row of the logits.
            early: rows that must not end a text yet.
            end_ids: tokens that end a text.
        """
        tokens = LateTokens(logits, early, end_ids)
        if self._selected is None:
            self._selected = torch.zeros(self.num_slots, dtype=torch.int64, device=self.device)
        token_ids = tokens.token_ids.to(self.device, non_blocking=True)
        if len(slots) == len(token_ids) and slots == rows:
            self._selected[: len(token_ids)] = token_ids
        else:
            self._selected[to_device(slots, self.device)] = token_ids[to_device(rows, self.device)]
        return tokens

    @torch.inference_mode()
    def text_logprobs(self, texts: list[TextToScore], recorder: Recorder = NO_RECORDER) -> list[list[float]]:
        """Return the log-probability of each token of each text; a recorder takes one text."""

        def score(batch: list[TextToScore]) -> list[list[float]]:
            images, prompt_ids, text_ids = zip(*batch, strict=True)
            prefixes = [image.prefix for image in images]
            logprobs = self.model.text_logprobs(prefixes, prompt_ids, text_ids, recorder)
            return [of_text.tolist() for of_text in logprobs]

        return self._text_batches.run(score, texts)

    @torch.inference_mode()
    def text_features(self, token_ids: list[list[int]], recorder: Recorder = NO_RECORDER) -> list[Tensor]:
        """Return the last hidden states of texts without an image: float[T_i, Dw] each, on the host.

        A recorder takes one text.
        """

        def read(batch: list[list[int]]) -> list[Tensor]:
            features = self.language_model.text_features(ids_to_device(batch, self.device), recorder)
            return list(torch.cat(features).cpu().split([len(ids) for ids in batch]))

        return self._text_batches.run(read, token_ids)

    @torch.inference_mode()
    def record(self, image: EncodedImage, recorder: Recorder, from_image_embeds: bool = False) -> None:
        """Run an image through the encoders once more, for the recorder.

        Args:
            from_image_embeds: the vision encoder does not run again; its output is kept.
        """
        if from_image_embeds:
            assert image.image_embeds is not None, "it is kept"
            image_embeds = image.image_embeds[None]
        else:
            pixels = stack_pixels([image]).to(self.device)
            image_embeds = self.model.vision(self.model.normalizer(pixels, self.dtype), recorder)
        self.model.qformer_features(image_embeds, recorder)

    @torch.inference_mode()
    def copy_slots(self, sources: list[int], targets: list[int], length: int) -> None:
        """Copy the first `length` positions of slots to other slots, and the tokens selected for them."""
        self.slots.copy_slots(sources, targets, length)
        if self._selected is not None:
            self._selected[to_device(targets, self.device)] = self._selected[to_device(sources, self.device)]

    @torch.inference_mode()
    def copy_positions(self, sources: list[int], targets: list[int], start: int, stop: int) -> None:
        """Copy the positions from `start` to `stop` of slots to other slots."""
        self.slots.copy_positions(sources, targets, start, stop)

    @property
    def slots(self) -> KVCacheProtocol:
        assert self._slots is not None, "the first prefill allocates the slots"
        return self._slots

    def _ensure_slots_hold(self, prefix_length: int, max_new_tokens: int) -> None:
        """Allocate the slots, or let them grow, so that a text of this length fits."""
        if self._slots is not None and self._slots.holds(prefix_length, max_new_tokens):
            return
        self._require_memory(prefix_length + max_new_tokens)
        if self._slots is None:
            self._slots = self.language_model.new_kv_cache(self.num_slots, prefix_length, max_new_tokens)
        else:
            self._forget_graphs()
            self._slots.grow(prefix_length, max_new_tokens)

    def _require_memory(self, num_positions: int) -> None:
        """Raise on a CPU if memory does not suffice.

        A GPU raises by itself. The machine of a CPU would swap, or kill the process.
        """
        needed = self.num_slots * num_positions * self.position_bytes
        if self.device.type == "cpu" and needed > (free := free_bytes(self.device)):
            raise torch.OutOfMemoryError(
                f"{self.num_slots} slots of {num_positions} positions need {needed:,} bytes of {free:,} free"
            )

    def _forget_graphs(self) -> None:
        if self._replay is not None:
            self._replay.forget()
