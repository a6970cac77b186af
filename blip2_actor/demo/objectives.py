"""What the demonstration is trained on: the caption, and what queries and patches should know.

Captions alone teach shapes slowly. So while training, small heads ask every patch for the colour and
shape of the object it lies on, and the first four queries for the first object, the second object, the
arrangement and the background. The heads are thrown away; the checkpoint has none of them.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from blip2_actor.demo.architecture import NUM_QUERY_TOKENS, WIDTH
from blip2_actor.demo.examples import Examples
from blip2_actor.demo.scenes import ARRANGEMENTS, BACKGROUNDS, COLOURS, SHAPES
from blip2_actor.demo.tokenizer import IMAGE_TOKEN

_IGNORED = -100

Losses = tuple[Tensor, dict[str, float]]
"""What to minimise, and figures for the log."""


def to_pixel_values(images: np.ndarray) -> Tensor:
    """uint8[B, S, S, 3] -> float32[B, 3, S, S], as the checkpoint's image processor makes them."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    return (torch.from_numpy(images).permute(0, 3, 1, 2) / 255 - mean) / std


def encode_captions(tokenizer: PreTrainedTokenizerFast, examples: Examples) -> Tensor:
    """int64[N, T]: image tokens, start token, caption, end token, padding on the right."""
    texts = [str(caption) + tokenizer.eos_token for caption in examples.captions]
    ids = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt").input_ids
    image_token = tokenizer.convert_tokens_to_ids(IMAGE_TOKEN)
    return torch.cat([torch.full((len(ids), NUM_QUERY_TOKENS), image_token), ids], dim=1)


def caption_loss(logits: Tensor, input_ids: Tensor, pad_token_id: int) -> Tensor:
    """Mean cross-entropy of the tokens that follow the start token."""
    targets = input_ids[:, NUM_QUERY_TOKENS + 1 :]
    targets = targets.masked_fill(targets == pad_token_id, _IGNORED)
    return F.cross_entropy(logits[:, NUM_QUERY_TOKENS:-1].flatten(0, 1).float(), targets.flatten())


class Heads(nn.Module):
    """Linear questions to patches and queries, for training only."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.ModuleList([nn.Linear(WIDTH, len(COLOURS) + 1), nn.Linear(WIDTH, len(SHAPES) + 1)])
        self.ground = nn.Linear(WIDTH, len(BACKGROUNDS) + 1)
        self.order = nn.Linear(WIDTH, 3)
        self.layout = nn.Linear(WIDTH, len(ARRANGEMENTS) + 1)
        answers = [len(names) + 1 for names in (COLOURS, SHAPES, COLOURS, SHAPES, ARRANGEMENTS, BACKGROUNDS)]
        self.query = nn.ModuleList([nn.Linear(WIDTH, n) for n in answers])

    def patch_loss(self, image_embeds: Tensor, patches: Tensor, attributes: Tensor) -> tuple[Tensor, Tensor]:
        """Loss over float[B, P + 1, D], and the share of patches on an object whose shape is known."""
        colours, shapes = (head(image_embeds[:, 1:]).float() for head in self.patch)
        loss = F.cross_entropy(colours.flatten(0, 1), patches[..., 0].flatten())
        loss = loss + 2 * F.cross_entropy(shapes.flatten(0, 1), patches[..., 1].flatten())
        loss = loss + 0.2 * F.cross_entropy(self.ground(image_embeds[:, 0]).float(), attributes[:, 5])
        right = shapes.argmax(-1) == patches[..., 1]
        return loss, right[patches[..., 1] > 0].float().mean()

    def place_loss(self, image_embeds: Tensor, patches: Tensor, attributes: Tensor) -> Tensor:
        """Loss over float[B, P + 1, D]: which object is named first, and how the two are arranged."""
        order = F.cross_entropy(
            self.order(image_embeds[:, 1:]).float().flatten(0, 1), patches[..., 2].flatten()
        )
        return order + 0.2 * F.cross_entropy(self.layout(image_embeds[:, 0]).float(), attributes[:, 4])

    def query_loss(self, query_output: Tensor, attributes: Tensor) -> Tensor:
        """Mean loss over float[B, Q, D]; one query answers for both colour and shape of an object."""
        losses = [
            F.cross_entropy(head(query_output[:, query]).float(), attributes[:, i])
            for i, (query, head) in enumerate(zip((0, 0, 1, 1, 2, 3), self.query, strict=True))
        ]
        return torch.stack(losses).mean()


class Objectives:
    """The losses of the three stages, each with the figures that tell how it goes."""

    def __init__(self, model: Blip2ForConditionalGeneration, heads: Heads) -> None:
        self.model = model
        self.heads = heads

    def look(self, pixel_values: Tensor, patches: Tensor, attributes: Tensor) -> Losses:
        """The vision encoder alone."""
        return self._seen(self.model.vision_model(pixel_values).last_hidden_state, patches, attributes)

    def tell(self, image_embeds: Tensor, input_ids: Tensor, attributes: Tensor) -> Losses:
        """Q-Former and language model, over what the vision encoder saw: float[B, P + 1, D]."""
        model, pad = self.model, self.model.config.text_config.pad_token_id
        queries = model.query_tokens.expand(len(image_embeds), -1, -1)
        query_output = model.qformer(
            query_embeds=queries, encoder_hidden_states=image_embeds
        ).last_hidden_state
        words = model.get_input_embeddings()(input_ids[:, NUM_QUERY_TOKENS:])
        inputs_embeds = torch.cat([model.language_projection(query_output), words], dim=1)
        told = caption_loss(model.language_model(inputs_embeds=inputs_embeds).logits, input_ids, pad)
        asked = self.heads.query_loss(query_output, attributes)
        return told + asked, {"caption_loss": told.item(), "query_loss": asked.item()}

    def finish(self, pixel_values: Tensor, patches: Tensor, input_ids: Tensor, attributes: Tensor) -> Losses:
        """Everything at once, and the patches also learn whose turn it is to be named."""
        image_embeds = self.model.vision_model(pixel_values).last_hidden_state
        seen, seen_figures = self._seen(image_embeds, patches, attributes)
        placed = self.heads.place_loss(image_embeds, patches, attributes)
        told, told_figures = self.tell(image_embeds, input_ids, attributes)
        figures = seen_figures | {"place_loss": placed.item()} | told_figures
        return told + 0.5 * seen + placed, figures

    def _seen(self, image_embeds: Tensor, patches: Tensor, attributes: Tensor) -> Losses:
        loss, shapes = self.heads.patch_loss(image_embeds, patches, attributes)
        return loss, {"patch_loss": loss.item(), "patch_shapes_right": shapes.item()}
