"""Random weights that make a model worth comparing.

The weights that transformers gives a new BLIP-2 are degenerate: all queries are equal, and the image has
almost no influence on the output. A test on such a model would not notice a swapped query or a missing image.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def randomize_weights(
    model: torch.nn.Module, *, seed: int = 0, std: float = 0.15, vector_std: float | None = None
) -> None:
    """Fill every parameter with normally distributed numbers, in its own dtype and on its own device.

    Weights of normalization layers have mean 1, all other parameters mean 0. Equal arguments give equal
    weights on the same kind of device.

    Args:
        model: the model to fill, in place; all its parameters are on one device.
        seed: seed of the random numbers.
        std: standard deviation of each parameter.
        vector_std: standard deviation of biases and normalization weights. The default is `std`; with 0 they
            have exactly their mean, which keeps the activations of a deep model in range.
    """
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    vector_std = std if vector_std is None else vector_std
    for name, parameter in model.named_parameters():
        parameter.fill_(float("norm" in name.lower() and name.endswith("weight")))
        parameter_std = vector_std if parameter.dim() == 1 else std
        if parameter_std:
            noise = torch.randn(
                parameter.shape, generator=generator, dtype=parameter.dtype, device=parameter.device
            )
            parameter.add_(noise.mul_(parameter_std))
