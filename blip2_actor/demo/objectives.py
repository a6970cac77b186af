"""What the demonstration is trained on: the caption, and labels for patches and queries.

Captions alone teach shapes slowly. So during training, small linear heads predict the color and the shape of
the object under each patch, and the first four queries predict the first object, the second object, the
arrangement and the background. The checkpoint does not contain these heads.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from blip2_actor.demo.architecture import NUM_QUERY_TOKENS, WIDTH
from blip2_actor.demo.examples import Examples
from blip2_actor.demo.grammar import ARRANGEMENTS, BACKGROUNDS, COLORS, SHAPES
from blip2_actor.demo.tokenizer import IMAGE_TOKEN

_IGNORED = -100


def to_pixel_values(images: np.ndarray) -> Tensor:
    """Convert uint8[B, S, S, 3] to float32[B, 3, S, S], as the checkpoint's image processor does."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


def encode_captions(tokenizer: PreTrainedTokenizerFast, examples: Examples) -> Tensor:
    """Return int64[N, T]: image tokens, start token, caption, end token, padding on the right."""
    texts = [str(caption) + tokenizer.eos_token for caption in examples.captions]
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return torch.cat([torch.full((len(ids), NUM_QUERY_TOKENS), image_token), ids], dim=1)


def caption_loss(logits: Tensor, input_ids: Tensor, pad_token_id: int) -> Tensor:
    """Return the mean cross-entropy of the tokens after the start token."""
    targets = input_ids[:, NUM_QUERY_TOKENS + 1 :]
    targets = targets.masked_fill(targets == pad_token_id, _IGNORED)
    return F.cross_entropy(logits[:, NUM_QUERY_TOKENS:-1].flatten(0, 1).float(), targets.flatten())


class Heads(nn.Module):
    """Linear predictions from patches and queries, for training only."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.ModuleList([nn.Linear(WIDTH, len(COLORS) + 1), nn.Linear(WIDTH, len(SHAPES) + 1)])
        self.ground = nn.Linear(WIDTH, len(BACKGROUNDS) + 1)
        self.order = nn.Linear(WIDTH, 3)
        self.layout = nn.Linear(WIDTH, len(ARRANGEMENTS) + 1)
        answers = [len(names) + 1 for names in (COLORS, SHAPES, COLORS, SHAPES, ARRANGEMENTS, BACKGROUNDS)]
        self.query = nn.ModuleList([nn.Linear(WIDTH, n) for n in answers])

    def patch_loss(self, image_embeds: Tensor, patches: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss over float[B, P + 1, D], and the accuracy of the shapes of patches on an object."""
        colors, shapes = (head(image_embeds[:, 1:]).float() for head in self.patch)
        loss = F.cross_entropy(colors.flatten(0, 1), patches[..., 0].flatten())
        loss = loss + 2 * F.cross_entropy(shapes.flatten(0, 1), patches[..., 1].flatten())
        loss = loss + 0.2 * F.cross_entropy(self.ground(image_embeds[:, 0]).float(), attributes[:, 5])
        right = shapes.argmax(-1) == patches[..., 1]
        return loss, right[patches[..., 1] > 0].float().mean()

    def place_loss(self, image_embeds: Tensor, patches: Tensor, attributes: Tensor) -> Tensor:
        """Return the loss over float[B, P + 1, D] for the order of the objects and for their arrangement."""
        order = F.cross_entropy(
            self.order(image_embeds[:, 1:]).float().flatten(0, 1), patches[..., 2].flatten()
        )
        return order + 0.2 * F.cross_entropy(self.layout(image_embeds[:, 0]).float(), attributes[:, 4])

    def query_loss(self, query_output: Tensor, attributes: Tensor) -> Tensor:
        """Return the mean loss over float[B, Q, D]; one query predicts both color and shape of an object."""
        losses = [
            F.cross_entropy(head(query_output[:, query]).float(), attributes[:, i])
            for i, (query, head) in enumerate(zip((0, 0, 1, 1, 2, 3), self.query, strict=True))
        ]
        return torch.stack(losses).mean()
