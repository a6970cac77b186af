"""Random weights that make a model worth comparing.

The weights that transformers gives a new BLIP-2 are degenerate: all queries are equal, and the image has
almost no influence on the output. A test on such a model would not notice a swapped query or a missing image.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


@torch.no_grad()
def randomize_weights(
    model: torch.nn.Module, *, seed: int = 0, std: float = 0.15, vector_std: float | None = None
) -> None:
    """Fill every parameter with numbers of `random_weights`, in its own dtype and on its own device.

    Args:
        model: the model to fill, in place; all its parameters are on one device.
        seed, std, vector_std: as for `random_weights`.
    """
    device = next(model.parameters()).device
    made = random_weights(model, device, seed=seed, std=std, vector_std=vector_std)
    for parameter, (_, values) in zip(model.parameters(), made, strict=True):
        parameter.copy_(values)


def random_weights(
    model: torch.nn.Module,
    device: torch.device,
    *,
    seed: int = 0,
    std: float = 0.15,
    vector_std: float | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield normally distributed numbers for every parameter, by its name, one after the other.

    Weights of normalization layers have mean 1, all other parameters mean 0. Equal arguments give equal
    weights on the same kind of device.

    Args:
        model: gives the names, shapes and dtypes; it may be on the meta device.
        device: where the numbers are made.
        seed: seed of the random numbers.
        std: standard deviation of each parameter.
        vector_std: standard deviation of biases and normalization weights. The default is `std`; with 0 they
            have exactly their mean, which keeps the activations of a deep model in range.
    """
    generator = torch.Generator(device).manual_seed(seed)
    vector_std = std if vector_std is None else vector_std
    for name, parameter in model.named_parameters():
        shape, dtype = parameter.shape, parameter.dtype
        mean = float("norm" in name.lower() and name.endswith("weight"))
        values = torch.full(shape, mean, dtype=dtype, device=device)
        parameter_std = vector_std if parameter.dim() == 1 else std
        if parameter_std:
            noise = torch.randn(shape, generator=generator, dtype=dtype, device=device)
            values.add_(noise.mul_(parameter_std))
        yield name, values
