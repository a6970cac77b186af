"""What to say when the tensors of a checkpoint are not those that its config.json describes.

A published checkpoint has more than a thousand tensors, and one wrong prefix makes all of them unexpected. So
the message counts them by module and names the likely reason; the debug log lists them.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

logger = logging.getLogger(__name__)

MAX_MODULES = 3
"""Modules that the message names for each kind of mismatch."""
_PARTS = {"vision_model", "qformer", "language_model"}


@dataclass
class Mismatch:
    """Tensors and parameters that do not fit each other."""

    missing: list[str] = field(default_factory=list)
    """Our names of parameters that no tensor fills."""
    unexpected: list[str] = field(default_factory=list)
    """Names of tensors that fill no parameter."""
    reshaped: list[str] = field(default_factory=list)
    """Names of tensors of another shape, each with both shapes."""

    def refuse(self, origin: str) -> None:
        """Raise ValueError if anything does not fit; `origin` says where the tensors are from."""
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape": self.reshaped,
        }
        kinds = {kind: sorted(names) for kind, names in kinds.items() if names}
        if not kinds:
            return
        for kind, names in kinds.items():
            for name in names:
                logger.debug("%s: %s", kind, name)
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in kinds.items())
        lines = [line for kind, names in kinds.items() for line in _lines(kind, names)]
        reason = next(reason for applies, reason in _REASONS if applies(self))
        raise ValueError(
            f"the tensors in {origin} do not match its config.json ({counts}); {reason}:\n  "
            + "\n  ".join(lines)
        )


def _lines(kind: str, names: list[str]) -> list[str]:
    """Return one line for each module, the first ones; the last line counts those of the others too."""
    modules = Counter(map(_module, names)).most_common()
    lines = []
    for module, count in modules[:MAX_MODULES]:
        example = next(name for name in names if _module(name) == module)
        lines.append(f"{kind}: {example}" + (f" and {count - 1} more in {module}" if count > 1 else ""))
    if len(modules) > MAX_MODULES:
        rest = sum(count for _, count in modules[MAX_MODULES:])
        lines[-1] += f", and {rest} in {len(modules) - MAX_MODULES} other modules"
    return lines


def _module(name: str) -> str:
    """Return the part of a name before the number of a layer, or the name of the tensor's own module."""
    before = re.split(r"\.\d+(?:\.|$)", name)[0]
    return before if before != name else name.rpartition(".")[0] or name


def _unexpected(pattern: str) -> Callable[[Mismatch], bool]:
    regex = re.compile(pattern)
    return lambda mismatch: any(regex.search(name) for name in mismatch.unexpected)


def _has_one_prefix(mismatch: Mismatch) -> bool:
    first_words = {name.partition(".")[0] for name in mismatch.unexpected}
    return len(mismatch.unexpected) > 1 and len(first_words) == 1 and not first_words & _PARTS


def _has_no_part(mismatch: Mismatch) -> bool:
    """Whether a whole part of the model has no tensor, and nothing else is wrong."""
    parts = {name.partition(".")[0] for name in mismatch.missing}
    whole = {"vision": "vision.class_embedding", "language_model": "language_model.embed_tokens.weight"}
    return not mismatch.unexpected and any(whole.get(part) in mismatch.missing for part in parts)


_REASONS: Sequence[tuple[Callable[[Mismatch], bool], str]] = [
    (
        _unexpected(r"\.(SCB|weight_format|absmax|quant_map|qweight|qzeros)$|\.quant_state\."),
        "they are quantized: name the model that they were made from",
    ),
    (
        _unexpected(r"\.(lora_\w+|base_layer|modules_to_save)\."),
        "a PEFT adapter is in them that was not merged: call its merge_and_unload() before save_pretrained, "
        "or save the adapter alone and set --adapter to it",
    ),
    (
        _unexpected(r"^(visual_encoder|Qformer|opt_model|t5_model|opt_proj|t5_proj)\b"),
        "they have the names of LAVIS: set --model to the checkpoint that LAVIS began with, and --adapter to "
        "this file, with a name that ends in .pth",
    ),
    (
        _unexpected(r"^language_model\.(encoder|shared)\."),
        "their language model is a T5: take the config.json of that model",
    ),
    (
        _unexpected(r"^language_model\.model\.decoder\."),
        "their language model is an OPT: take the config.json of that model",
    ),
    (
        _unexpected(r"(^|\.)(module|_orig_mod|_fsdp_wrapped_module)\."),
        "a wrapper such as torch.compile or FSDP was saved with them: save the module that it wraps",
    ),
    (
        _has_one_prefix,
        "all their names begin alike, as when a larger module was saved: save the model itself with "
        "save_pretrained",
    ),
    (
        _has_no_part,
        "a whole part is missing, as when only the trained parts were saved: save the whole model with "
        "save_pretrained",
    ),
    (
        lambda mismatch: bool(mismatch.reshaped),
        "their sizes are those of another model: take the config.json of that model",
    ),
    (lambda mismatch: True, "check that both are of the same model"),
]
"""Likely reasons with what to do, and which mismatches they apply to; the first one counts."""
