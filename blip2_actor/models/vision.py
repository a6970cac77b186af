"""The vision encoder of BLIP-2: a ViT (EVA-CLIP's ViT-g/14 in the published checkpoints).

It has pre-norm blocks, a class token, learned positions, and one fused qkv projection whose key bias is zero
in the published weights. Pixels arrive as uint8 and are normalized here, on the device.

Source: arXiv:2301.12597, section 3; transformers `Blip2VisionModel`. Axis letters: `blip2.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Blip2VisionConfig

from blip2_actor.device import find_kernel
from blip2_actor.models.layers import (
    HALF_DTYPES,
    Layers,
    Linear,
    attend,
    merge_heads,
    runs_kernels,
    split_heads,
)
from blip2_actor.models.recorder import NO_RECORDER, Recorder
from blip2_actor.models.residual import multiply_norm, normalize

KERNEL_BLOCK, MAX_LEFT = 128, 16
"""The kernel of this package replaces torch's if blocks of 128 positions leave up to 16 over, as with 257."""


class VisionBlock(nn.Module):
    """Attention and MLP, each after a layer norm and with a residual."""

    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.qkv = Linear(width, 3 * width, bias=config.qkv_bias)
        self.projection = Linear(width, width)
        self.layer_norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = Linear(width, config.intermediate_size, activation=config.hidden_act)
        self.fc2 = Linear(config.intermediate_size, width)

    def forward(
        self, hidden: Tensor, update: Tensor | None, recorder: Recorder = NO_RECORDER, name: str = ""
    ) -> tuple[Tensor, Tensor]:
        """Read the residual stream `hidden + update`, and return it in two parts again (`residual.py`).

        float[B, P, Dv] each -> float[B, P, Dv] each; `name` is that of this layer for the recorder.
        """
        hidden, qkv = multiply_norm(self.layer_norm1, self.qkv, hidden, update)
        if recorder is not NO_RECORDER:
            query, key, _ = split_heads(qkv, 3 * self.num_heads).chunk(3, dim=1)
            recorder.attention(f"{name}.self_attention", query, key)
        context = self.projection(_attend_to_all(qkv, self.num_heads))
        hidden, inner = multiply_norm(self.layer_norm2, self.fc1, hidden, context)
        return hidden, self.fc2(inner)


class VisionEncoder(nn.Module):
    """Images in; embeddings of the class token and of the patches out."""

    def __init__(self, config: Blip2VisionConfig) -> None:
        super().__init__()
        self.image_size_px = config.image_size
        self.patch_size_px = config.patch_size
        self.grid = config.image_size // config.patch_size
        width = config.hidden_size
        self.patch_embedding = Linear(3 * config.patch_size**2, width)
        self.class_embedding = nn.Parameter(torch.empty(1, 1, width))
        self.position_embedding = nn.Parameter(torch.empty(1, self.grid**2 + 1, width))
        self.layers: Layers[VisionBlock] = Layers(
            [VisionBlock(config) for _ in range(config.num_hidden_layers)]
        )
        self.post_layernorm = nn.LayerNorm(width, eps=config.layer_norm_eps)

    def resize(self, image_size_px: int) -> None:
        """Take images of another size from now on, with interpolated positions.

        They are those of the reference's `interpolate_pos_encoding=True`. Call it after loading the weights.

        Args:
            image_size_px: side of the square, a multiple of the patch size.
        """
        grid = image_size_px // self.patch_size_px
        if grid != self.grid:
            of_class, of_patches = self.position_embedding.data.tensor_split([1], dim=1)
            square = of_patches.unflatten(1, (self.grid, self.grid)).permute(0, 3, 1, 2)
            square = F.interpolate(square, size=(grid, grid), mode="bicubic", align_corners=False)
            positions = torch.cat([of_class, square.flatten(2).transpose(1, 2)], dim=1)
            self.position_embedding = nn.Parameter(positions, requires_grad=False)
        self.image_size_px, self.grid = image_size_px, grid

    def patches(self, pixel_values: Tensor) -> Tensor:
        """Cut images into flat patches, channels first as in the reference's convolution.

        Args:
            pixel_values: float[B, 3, S, S], normalized.

        Returns:
            float[B, P - 1, 3 * patch * patch], in the same dtype.

        Raises:
            ValueError: the images do not have the size for which the positions are.
        """
        size, grid, patch = self.image_size_px, self.grid, self.patch_size_px
        if pixel_values.shape[1:] != (3, size, size):
            raise ValueError(
                f"pixel_values must be [B, 3, {size}, {size}], got {list(pixel_values.shape)}; "
                "resize the images, or set image_size_px to interpolate the positions"
            )
        used = pixel_values[:, :, : grid * patch, : grid * patch]
        cut = used.reshape(-1, 3, grid, patch, grid, patch)
        return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, grid * grid, 3 * patch * patch)

    def forward(self, pixel_values: Tensor, recorder: Recorder = NO_RECORDER) -> Tensor:
        """Encode images.

        Args:
            pixel_values: float[B, 3, S, S], normalized, in this module's dtype.
            recorder: takes the input of the first block, and the output and the attention of each.

        Returns:
            float[B, P, Dv], after the final norm; position 0 is the class token.

        Raises:
            ValueError: the images do not have the size for which the positions are.
        """
        embeds = self.patch_embedding(self.patches(pixel_values))
        hidden = torch.cat([self.class_embedding.expand(embeds.shape[0], -1, -1), embeds], dim=1)
        hidden = hidden + self.position_embedding
        recorder.hidden("vision.embeddings", hidden)
        update: Tensor | None = None
        for index, layer in enumerate(self.layers):
            name = f"vision.layers.{index}"
            hidden, update = layer(hidden, update, recorder, name)
            recorder.hidden(name, hidden, update)
        return normalize(self.post_layernorm, hidden, update)[1]

    def pool(self, image_embeds: Tensor) -> Tensor:
        """Return the reference's `pooler_output`: the class token, after the final norm a second time.

        float[B, P, Dv] -> float[B, Dv].
        """
        return self.post_layernorm(image_embeds[:, 0])


def _attend_to_all(qkv: Tensor, num_heads: int) -> Tensor:
    """Compute the attention of all positions to each other: float[B, P, 3 Dv] -> float[B, P, Dv]."""
    num_blocks, num_left = divmod(qkv.shape[1], KERNEL_BLOCK)
    if runs_kernels(qkv) and qkv.dtype in HALF_DTYPES and num_blocks and 0 < num_left <= MAX_LEFT:
        kernel = _find_kernel(qkv.device, qkv.dtype, *qkv.shape[1:], num_heads)
        if kernel is not None:
            return kernel(qkv.contiguous(), num_heads)
    query, key, value = split_heads(qkv, 3 * num_heads).chunk(3, dim=1)
    return merge_heads(attend(query, key, value))


@cache
def _find_kernel(
    device: torch.device, dtype: torch.dtype, num_positions: int, width: int, num_heads: int
) -> Callable[[Tensor, int], Tensor] | None:
    """Find `encoder_attention`, and try it with this shape: not every GPU has the shared memory for it."""

    def load() -> Callable[[Tensor, int], Tensor]:
        from blip2_actor.models.encoder_attention import encoder_attention

        encoder_attention(torch.ones(1, num_positions, width, device=device, dtype=dtype), num_heads)
        return encoder_attention

    return find_kernel(device, "Attention of the vision encoder", load)


class PixelNormalizer(nn.Module):
    """Normalizes uint8 images on their own device."""

    mean: Tensor
    std: Tensor
    divisor: Tensor

    def __init__(self, mean: Sequence[float], std: Sequence[float], rescale_factor: float) -> None:
        super().__init__()
        # The reference multiplies in float64 and rounds. A float32 division gives the same bits, a float32
        # product does not. The divisor is a tensor, because CUDA turns division by a Python number into a
        # product.
        self.register_buffer("divisor", torch.tensor(1 / rescale_factor), persistent=False)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor, dtype: torch.dtype) -> Tensor:
        """Normalize in float32, as the reference does: uint8[B, S, S, 3] -> float[B, 3, S, S] in `dtype`."""
        pixels = images.permute(0, 3, 1, 2).to(torch.float32) / self.divisor
        return ((pixels - self.mean) / self.std).to(dtype)
