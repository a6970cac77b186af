"""Image-text matching and contrastive search with a retrieval checkpoint: an engine of its own.

No text is generated, so there are no slots: each call is cut into batches that one thread computes.
Callers of several threads take turns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor
from transformers import AutoTokenizer

from blip2_actor.checkpoints.checkpoint import resolve
from blip2_actor.checkpoints.loading import load_retrieval
from blip2_actor.checkpoints.tokenizer import require_known_tokens, require_non_empty
from blip2_actor.config import MatchingConfig
from blip2_actor.device import prepare_device, resolve_device, resolve_dtype
from blip2_actor.engine.input_processor import RequestRefused, to_pixels
from blip2_actor.engine.memory import full_encode_batch
from blip2_actor.engine.out_of_memory import ItemT, ResultT, ShrinkingBatches
from blip2_actor.engine.request_state import NO_NUMBERS
from blip2_actor.models.layers import pack_for_cpu
from blip2_actor.request import Embedding, EngineStats, ImageLike, Match
from blip2_actor.status import Status
from blip2_actor.transfer import ids_to_device, to_device


class MatchingEngine:
    """A loaded retrieval model. Close it, or use it as a context manager."""

    def __init__(self, config: MatchingConfig) -> None:
        """Load the weights.

        Raises:
            ValueError: the configuration or the checkpoint cannot be run; the field is named.
            OSError: the checkpoint cannot be found or read.
        """
        self.config = config
        self._num_images, self._busy_s = 0, 0.0
        self._thread = ThreadPoolExecutor(1, "blip2-matching")
        try:
            self._thread.submit(self._load).result()
        except BaseException:
            self._thread.shutdown()
            raise

    def _load(self) -> None:
        """On the thread that computes: each thread that does has a pool of OpenMP threads of its own."""
        config = self.config
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        device = resolve_device(config.device)
        prepare_device(device)
        checkpoint = resolve(config.model, config.revision)
        self.model = load_retrieval(checkpoint, device, resolve_dtype(config.dtype, device))
        if device.type == "cpu":
            pack_for_cpu(self.model)
        self.tokenizer = AutoTokenizer.from_pretrained(checkpoint.folder)
        self.image_size_px: int = self.model.config.vision_config.image_size
        size = full_encode_batch(self.model.config.vision_config, device)
        self._image_batches, self._text_batches = (
            ShrinkingBatches(size, "images"),
            ShrinkingBatches(size, "texts"),
        )

    def score(self, images: Sequence[ImageLike], texts: Sequence[str]) -> list[Match]:
        """How well each text fits its image, in order; a bad image or text is an entry with a status.

        An image that is given several times, as the same object, is decoded and encoded once.
        """
        if len(images) != len(texts):
            raise ValueError(f"texts must be one per image ({len(images)}), got {len(texts)}")
        found: list[Match | None] = []
        asked: dict[int, tuple[np.ndarray, list[list[int]], list[int]]] = {}
        for row, (pixels, text) in enumerate(zip(self._pixels(images), texts, strict=True)):
            ids = self._token_ids(text)
            refusal = next((x for x in (pixels, ids) if isinstance(x, RequestRefused)), None)
            found.append(None if refusal is None else Match(status=refusal.status, error=str(refusal)))
            if not isinstance(pixels, RequestRefused) and not isinstance(ids, RequestRefused):
                _, ids_of_image, rows = asked.setdefault(id(pixels), (pixels, [], []))
                ids_of_image.append(ids)
                rows.append(row)
        by_image = [(pixels, ids) for pixels, ids, _ in asked.values()]
        scored = self._run(self._image_batches, self._score, by_image)
        for (_, _, rows), matches in zip(asked.values(), scored, strict=True):
            for row, match in zip(rows, matches, strict=True):
                found[row] = match
        return [match for match in found if match is not None]

    def image_embeddings(self, images: Sequence[ImageLike]) -> list[Embedding]:
        """Unit vectors of images, one per query; a bad image is an entry with a status."""
        return self._embed(self._image_batches, self._embed_images, self._pixels(images))

    def text_embeddings(self, texts: Sequence[str]) -> list[Embedding]:
        """Unit vectors of texts; one that is empty or too long is an entry with a status."""
        token_ids = [self._token_ids(text) for text in texts]
        return self._embed(self._text_batches, self._embed_texts, token_ids)

    def stats(self) -> EngineStats:
        """Images encoded and seconds worked since the start."""
        return EngineStats(num_images_encoded=self._num_images, busy_s=self._busy_s)

    def close(self) -> None:
        """Finish what was begun, refuse what comes."""
        self._thread.shutdown()

    def __enter__(self) -> MatchingEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # In the caller's thread -----------------------------------------------------------------------------

    def _pixels(self, images: Sequence[ImageLike]) -> list[np.ndarray | RequestRefused]:
        """uint8[S, S, 3] of each image; the same object where the image is the same object."""
        images = list(images)  # a stack of arrays makes its items anew at each pass, under the same ids
        known: dict[int, np.ndarray | RequestRefused] = {}
        for image in images:
            if id(image) not in known:
                try:
                    known[id(image)] = to_pixels(image, self.image_size_px)
                except RequestRefused as refusal:
                    known[id(image)] = refusal
        return [known[id(image)] for image in images]

    def _token_ids(self, text: str) -> list[int] | RequestRefused:
        """Ids as the reference's processor makes them, special tokens included, image tokens not."""
        try:
            token_ids: list[int] = self.tokenizer(require_non_empty(text)).input_ids
            known = self.model.word_embeddings.num_embeddings
            require_known_tokens(token_ids, known, self.model.config.image_token_index)
        except ValueError as error:
            return RequestRefused(Status.REFUSED, str(error))
        limit = self.model.position_embeddings.num_embeddings
        if len(token_ids) > limit:
            return RequestRefused(
                Status.REFUSED, f"text must be at most {limit} tokens, got {len(token_ids)}; shorten it"
            )
        return token_ids

    def _embed(
        self,
        batches: ShrinkingBatches,
        embed: Callable[[list[ItemT]], list[np.ndarray]],
        asked: list[ItemT | RequestRefused],
    ) -> list[Embedding]:
        vectors = iter(self._run(batches, embed, [x for x in asked if not isinstance(x, RequestRefused)]))
        return [
            Embedding(status=x.status, error=str(x))
            if isinstance(x, RequestRefused)
            else Embedding(vectors=next(vectors))
            for x in asked
        ]

    def _run(
        self, batches: ShrinkingBatches, work: Callable[[list[ItemT]], list[ResultT]], items: list[ItemT]
    ) -> list[ResultT]:
        return self._thread.submit(self._work, batches, work, items).result()

    # In the engine's thread -----------------------------------------------------------------------------

    @torch.inference_mode()
    def _work(
        self, batches: ShrinkingBatches, work: Callable[[list[ItemT]], list[ResultT]], items: list[ItemT]
    ) -> list[ResultT]:
        started = time.perf_counter()
        try:
            found = batches.run(work, items)
        finally:
            self._busy_s += time.perf_counter() - started
        if batches is self._image_batches:
            self._num_images += len(items)
        return found

    def _score(self, asked: list[tuple[np.ndarray, list[list[int]]]]) -> list[list[Match]]:
        """Images with all their texts."""
        image_embeds = self._encode([pixels for pixels, _ in asked])
        image_vectors = self.model.image_embeddings(image_embeds).float()

        def match(rows: list[tuple[int, list[int]]]) -> list[Match]:
            indices = to_device([index for index, _ in rows], image_embeds.device)
            texts = self._tensors([ids for _, ids in rows])
            itm = self.model.matching_logits(image_embeds[indices], texts).float().softmax(dim=-1)[:, 1]
            text_vectors = self.model.text_embeddings(texts).float()
            itc = self.model.contrastive_scores(image_vectors[indices], text_vectors)
            return [_match(p, c) for p, c in torch.stack([itm, itc], dim=1).tolist()]

        rows = [(index, ids) for index, (_, texts) in enumerate(asked) for ids in texts]
        matches = iter(self._text_batches.run(match, rows))
        return [[next(matches) for _ in texts] for _, texts in asked]

    def _embed_images(self, pixels: list[np.ndarray]) -> list[np.ndarray]:
        return list(self.model.image_embeddings(self._encode(pixels)).float().cpu().numpy())

    def _embed_texts(self, token_ids: list[list[int]]) -> list[np.ndarray]:
        return list(self.model.text_embeddings(self._tensors(token_ids))[:, None].float().cpu().numpy())

    def _encode(self, pixels: list[np.ndarray]) -> Tensor:
        """uint8[S, S, 3] each -> float[B, P, Dv]."""
        images = torch.from_numpy(np.stack(pixels)).to(self.model.query_tokens.device)
        return self.model.image_features(self.model.normalizer(images, self.model.dtype))

    def _tensors(self, token_ids: list[list[int]]) -> list[Tensor]:
        return ids_to_device(token_ids, self.model.query_tokens.device)


def _match(itm: float, itc: float) -> Match:
    if not (math.isfinite(itm) and math.isfinite(itc)):
        return Match(status=Status.FAILED, error=NO_NUMBERS)
    return Match(itm=itm, itc=itc)
