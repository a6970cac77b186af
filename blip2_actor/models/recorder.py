"""Hidden states and attention maps on request: what passes through a model, kept by name.

The names follow the model: `vision.layers.3` is what layer 3 of the vision encoder computes, and
`vision.layers.3.self_attention` are the weights of its attention. A pass with `NO_RECORDER` keeps nothing.

Axis letters: `blip2.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
from torch import Tensor

from blip2_actor.models.layers import attention_weights
from blip2_actor.transfer import to_numpy


class Recorder:
    """Keeps the values whose names are wanted, on the host; attention maps are computed only if wanted.

    It is for one pass of one image or text.
    """

    def __init__(self, hidden_states: Sequence[str] = (), attention_maps: Sequence[str] = ()) -> None:
        """
        Args:
            hidden_states: names, or patterns of names such as `vision.layers.*`.
            attention_maps: the same.
        """
        self.hidden_states: dict[str, np.ndarray] = {}
        self.attention_maps: dict[str, np.ndarray] = {}
        self._wanted = {"with_hidden_states": hidden_states, "with_attention_maps": attention_maps}
        self._offered: dict[str, list[str]] = {argument: [] for argument in self._wanted}

    def hidden(self, name: str, states: Tensor, update: Tensor | None = None) -> None:
        """Take hidden states, perhaps in two parts (`residual.py`): float[1, T, D] or float[T, D] each."""
        if self._wants("with_hidden_states", name):
            states = states if update is None else states + update
            self.hidden_states[name] = to_numpy(states.reshape(states.shape[-2:]))

    def attention(
        self,
        name: str,
        query: Tensor,
        key: Tensor,
        mask: Tensor | None = None,
        is_causal: bool = False,
        scale: float | None = None,
    ) -> None:
        """Take an attention by the arguments of `attend`, with a batch of 1."""
        if self._wants("with_attention_maps", name):
            self.attention_maps[name] = to_numpy(attention_weights(query, key, mask, is_causal, scale)[0])

    def require_all_found(self) -> None:
        """Refuse names that nothing had.

        Raises:
            ValueError: a pattern fits no name; the message lists the names.
        """
        for argument, patterns in self._wanted.items():
            offered = self._offered[argument]
            for pattern in patterns:
                if not any(fnmatchcase(name, pattern) for name in offered):
                    raise ValueError(
                        f"{argument} must be names or patterns of {', '.join(offered)}, got {pattern!r}"
                    )

    def _wants(self, argument: str, name: str) -> bool:
        if not self._wanted[argument]:
            return False
        self._offered[argument].append(name)
        return any(fnmatchcase(name, pattern) for pattern in self._wanted[argument])


NO_RECORDER = Recorder()
"""Wants nothing, and so keeps nothing; all passes share it."""
