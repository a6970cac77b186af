"""Image-text matching and contrastive search with a retrieval checkpoint: an engine of its own.

It generates no text, so there are no slots. Each call is cut into batches, and one thread computes them.
Calls from several threads take turns.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

import numpy as np
import torch
from torch import Tensor

from blip2_actor.checkpoints.checkpoint import resolve
from blip2_actor.checkpoints.loading import load_retrieval
from blip2_actor.checkpoints.tokenizer import load_tokenizer, require_known_tokens, require_non_empty
from blip2_actor.config import MatchingConfig
from blip2_actor.device import prepare_device, resolve_device, resolve_dtype, set_num_threads
from blip2_actor.engine.memory import full_encode_batch
from blip2_actor.engine.out_of_memory import ItemT, ResultT, ShrinkingBatches
from blip2_actor.engine.own_process import CANNOT_BE_SENT, OwnProcess
from blip2_actor.engine.refusal import RequestRefused, or_refusal, with_refusals
from blip2_actor.engine.request_state import NOT_FINITE
from blip2_actor.inputs.arguments import require_one_per_image, to_images, to_texts
from blip2_actor.inputs.image_input import to_pixels
from blip2_actor.models.layers import pack_for_cpu
from blip2_actor.request import Embedding, EngineStats, ImageLike, Match
from blip2_actor.status import Status
from blip2_actor.transfer import ids_to_device, to_device

ImageWithTexts = tuple[np.ndarray, list[list[int]]]
"""uint8[S, S, 3], and the token ids of each of its texts."""


class MatchingEngine:
    """A loaded retrieval model. Close it, or use it as a context manager.

    Examples:
        >>> engine = MatchingConfig(model=retrieval_folder, device="cpu", dtype="float32").build()
        >>> match = engine.score([picture], ["a dog"])[0]
        >>> image, text = engine.image_embeddings([picture])[0], engine.text_embeddings(["a dog"])[0]
        >>> abs(float((image.vectors @ text.vectors.T).max()) - match.itc) < 1e-3
        True
        >>> engine.close()
    """

    def __init__(self, config: MatchingConfig) -> None:
        """Load the weights.

        Raises:
            ValueError: the configuration or the checkpoint cannot be run; the message names the field.
            OSError: the checkpoint cannot be found or read.
        """
        self.config = config
        self._num_images, self._busy_s = 0, 0.0
        self._process = OwnProcess()
        self._thread = ThreadPoolExecutor(1, "blip2-matching")
        try:
            # Ask in the caller's thread: a new thread gets the number that some engine's thread set last.
            self._thread.submit(self._load, config.num_threads or torch.get_num_threads()).result()
        except BaseException:
            self._thread.shutdown(wait=False)  # an interrupted caller does not wait for the end of the load
            raise

    def _load(self, num_threads: int) -> None:
        """Load in the thread that computes, because each computing thread has OpenMP threads of its own."""
        config = self.config
        set_num_threads(num_threads)
        device = resolve_device(config.device)
        prepare_device(device)
        checkpoint = resolve(config.model, config.revision)
        vision_config = checkpoint.retrieval_config.vision_config
        self.image_size_px = checkpoint.image_processor.image_size(vision_config)
        self.model = load_retrieval(checkpoint, device, resolve_dtype(config.dtype, device))
        if device.type == "cpu":
            pack_for_cpu(self.model)
        self.tokenizer = load_tokenizer(checkpoint.folder, "bert")
        size = full_encode_batch(self.model.config.vision_config, device)
        self._image_batches = ShrinkingBatches(size, "images")
        self._text_batches = ShrinkingBatches(size, "texts")

    # In the caller's thread -----------------------------------------------------------------------------

    def score(self, images: Sequence[ImageLike] | np.ndarray, texts: Sequence[str]) -> list[Match]:
        """Return how well each text fits its image, in order; a bad image or text is an entry with a status.

        An image that is given several times, as the same object, is decoded and encoded once.
        """
        images, texts = to_images(images), to_texts("texts", texts)
        require_one_per_image("texts", texts, images)

        def with_text(pixels: np.ndarray, text: str) -> tuple[np.ndarray, list[int]]:
            return pixels, self._token_ids(text)

        rows = [
            pixels if isinstance(pixels, RequestRefused) else or_refusal(with_text, pixels, text)
            for pixels, text in zip(self._pixels(images), texts, strict=True)
        ]
        return with_refusals(rows, self._score_rows, Match)

    def image_embeddings(self, images: Sequence[ImageLike] | np.ndarray) -> list[Embedding]:
        """Return unit vectors of images, one per query; a bad image is an entry with a status."""
        return self._embed(self._image_batches, self._embed_images, self._pixels(images))

    def text_embeddings(self, texts: Sequence[str]) -> list[Embedding]:
        """Return unit vectors of texts; a text that is empty or too long is an entry with a status."""
        token_ids = [or_refusal(self._token_ids, text) for text in to_texts("texts", texts)]
        return self._embed(self._text_batches, self._embed_texts, token_ids)

    def stats(self) -> EngineStats:
        """Return the images encoded and the seconds worked since the start."""
        return EngineStats(num_images_encoded=self._num_images, busy_s=self._busy_s)

    def close(self) -> None:
        """Finish what was begun, and refuse everything else; in a forked child, do nothing."""
        if self._process.is_current:
            self._thread.shutdown()

    def __enter__(self) -> MatchingEngine:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(CANNOT_BE_SENT)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _pixels(self, images: Sequence[ImageLike] | np.ndarray) -> list[np.ndarray | RequestRefused]:
        """Return uint8[S, S, 3] of each image; one object for all entries that are the same object."""
        images = to_images(images)  # a pass over a stack of arrays makes objects that may reuse ids
        known: dict[int, np.ndarray | RequestRefused] = {}
        for image in images:
            if id(image) not in known:
                size_px, allow_urls = self.image_size_px, self.config.allow_urls
                known[id(image)] = or_refusal(to_pixels, image, size_px, allow_urls)
        return [known[id(image)] for image in images]

    def _token_ids(self, text: str) -> list[int]:
        """Return ids as the reference's processor makes them, with special tokens but without image tokens.

        Raises:
            ValueError: the text cannot be read.
        """
        token_ids: list[int] = self.tokenizer(require_non_empty(text), verbose=False).input_ids
        vocab_size = self.model.word_embeddings.num_embeddings
        require_known_tokens(token_ids, vocab_size, self.model.config.image_token_index)
        limit = self.model.position_embeddings.num_embeddings
        if len(token_ids) > limit:
            raise ValueError(f"text must be at most {limit} tokens, got {len(token_ids)}; shorten it")
        return token_ids

    def _score_rows(self, rows: list[tuple[np.ndarray, list[int]]]) -> list[Match]:
        """Score pixels with token ids; rows of the same array share one image."""
        by_image: dict[int, ImageWithTexts] = {}
        for pixels, token_ids in rows:
            by_image.setdefault(id(pixels), (pixels, []))[1].append(token_ids)
        scored = self._run(self._image_batches, self._score, list(by_image.values()))
        matches = dict(zip(by_image, map(iter, scored), strict=True))
        return [next(matches[id(pixels)]) for pixels, _ in rows]

    def _embed(
        self,
        batches: ShrinkingBatches,
        embed: Callable[[list[ItemT]], list[np.ndarray]],
        items: list[ItemT | RequestRefused],
    ) -> list[Embedding]:
        return with_refusals(items, lambda rows: map(_embedding, self._run(batches, embed, rows)), Embedding)

    def _run(
        self, batches: ShrinkingBatches, work: Callable[[list[ItemT]], list[ResultT]], items: list[ItemT]
    ) -> list[ResultT]:
        self._process.require_current()
        try:
            future = self._thread.submit(self._work, batches, work, items)
        except RuntimeError as error:
            raise RuntimeError("the engine is closed; build a new one") from error
        return future.result()

    # In the engine's thread -----------------------------------------------------------------------------

    @torch.inference_mode()
    def _work(
        self, batches: ShrinkingBatches, work: Callable[[list[ItemT]], list[ResultT]], items: list[ItemT]
    ) -> list[ResultT]:
        started = time.perf_counter()
        try:
            results = batches.run(work, items)
        finally:
            self._busy_s += time.perf_counter() - started
        if batches is self._image_batches:
            self._num_images += len(items)
        return results

    def _score(self, images: list[ImageWithTexts]) -> list[list[Match]]:
        """Score each image with all its texts."""
        image_embeds = self._encode([pixels for pixels, _ in images])
        image_vectors = self.model.image_embeddings(image_embeds).float()

        def match(pairs: list[tuple[int, list[int]]]) -> list[Match]:
            indices = to_device([index for index, _ in pairs], image_embeds.device)
            texts = self._tensors([ids for _, ids in pairs])
            itm = self.model.matching_logits(image_embeds[indices], texts).float().softmax(dim=-1)[:, 1]
            text_vectors = self.model.text_embeddings(texts).float()
            itc = self.model.contrastive_scores(image_vectors[indices], text_vectors)
            return [_match(*scores) for scores in torch.stack([itm, itc], dim=1).tolist()]

        pairs = [(index, ids) for index, (_, texts) in enumerate(images) for ids in texts]
        matches = iter(self._text_batches.run(match, pairs))
        return [[next(matches) for _ in texts] for _, texts in images]

    def _embed_images(self, pixels: list[np.ndarray]) -> list[np.ndarray]:
        return list(self.model.image_embeddings(self._encode(pixels)).float().cpu().numpy())

    def _embed_texts(self, token_ids: list[list[int]]) -> list[np.ndarray]:
        return list(self.model.text_embeddings(self._tensors(token_ids))[:, None].float().cpu().numpy())

    def _encode(self, pixels: list[np.ndarray]) -> Tensor:
        """Run uint8[S, S, 3] each through the vision encoder; float[B, P, Dv]."""
        images = torch.from_numpy(np.stack(pixels)).to(self.model.query_tokens.device)
        return self.model.image_features(self.model.normalizer(images, self.model.dtype))

    def _tensors(self, token_ids: list[list[int]]) -> list[Tensor]:
        return ids_to_device(token_ids, self.model.query_tokens.device)


def _match(itm: float, itc: float) -> Match:
    if not (math.isfinite(itm) and math.isfinite(itc)):
        return Match(status=Status.FAILED, error=NOT_FINITE)
    return Match(itm=itm, itc=itc)


def _embedding(vectors: np.ndarray) -> Embedding:
    if not np.isfinite(vectors).all():
        return Embedding(status=Status.FAILED, error=NOT_FINITE)
    return Embedding(vectors=vectors)
