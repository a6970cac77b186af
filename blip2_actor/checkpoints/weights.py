"""From the tensors of a Hugging Face BLIP-2 checkpoint to ours: one name map, strict, streamed.

Each tensor is read from its safetensors file straight into its place (a slice of a fused projection,
where we fuse), so that a checkpoint is in memory once.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
from torch import Tensor, nn

from blip2_actor.checkpoints.safetensors_file import StoredTensor, list_tensors

WB = r"(?P<wb>weight|bias)"
INDEX = r"(?P<i>\d+)"


@dataclass(frozen=True)
class Place:
    """Where a tensor goes: a parameter, and which of the equal parts it is stacked from."""

    name: str
    part: int | None = None


Rule = tuple[str, Callable[[re.Match[str]], Place]]


def _to(template: str, part: int | None = None) -> Callable[[re.Match[str]], Place]:
    return lambda match: Place(template.format(**match.groupdict()), part)


_VISION: list[Rule] = [
    (r"vision_model\.embeddings\.(?P<x>class_embedding|position_embedding)", _to("vision.{x}")),
    (rf"vision_model\.embeddings\.patch_embedding\.{WB}", _to("vision.patch_embedding.{wb}")),
    (
        rf"vision_model\.encoder\.layers\.{INDEX}\.self_attn\.(?P<x>qkv|projection)\.{WB}",
        _to("vision.layers.{i}.{x}.{wb}"),
    ),
    (
        rf"vision_model\.encoder\.layers\.{INDEX}\.mlp\.(?P<x>fc1|fc2)\.{WB}",
        _to("vision.layers.{i}.{x}.{wb}"),
    ),
    (
        rf"vision_model\.encoder\.layers\.{INDEX}\.(?P<x>layer_norm1|layer_norm2)\.{WB}",
        _to("vision.layers.{i}.{x}.{wb}"),
    ),
    (rf"vision_model\.post_layernorm\.{WB}", _to("vision.post_layernorm.{wb}")),
]


def _qformer(cross_attention_frequency: int) -> list[Rule]:
    layer = rf"qformer\.encoder\.layer\.{INDEX}"

    def cross_kv(which: int) -> Callable[[re.Match[str]], Place]:
        return lambda match: Place(
            f"qformer.cross_kv.{match['wb']}", int(match["i"]) // cross_attention_frequency * 2 + which
        )

    return [
        ("query_tokens", _to("query_tokens")),
        (rf"qformer\.layernorm\.{WB}", _to("qformer.layernorm.{wb}")),
        *(
            (rf"{layer}\.attention\.attention\.{x}\.{WB}", _to("qformer.layers.{i}.qkv.{wb}", part))
            for part, x in enumerate(("query", "key", "value"))
        ),
        (rf"{layer}\.attention\.output\.dense\.{WB}", _to("qformer.layers.{i}.attention_output.{wb}")),
        (rf"{layer}\.attention\.output\.LayerNorm\.{WB}", _to("qformer.layers.{i}.attention_norm.{wb}")),
        (rf"{layer}\.crossattention\.attention\.query\.{WB}", _to("qformer.layers.{i}.cross_query.{wb}")),
        (rf"{layer}\.crossattention\.attention\.key\.{WB}", cross_kv(0)),
        (rf"{layer}\.crossattention\.attention\.value\.{WB}", cross_kv(1)),
        (rf"{layer}\.crossattention\.output\.dense\.{WB}", _to("qformer.layers.{i}.cross_output.{wb}")),
        (rf"{layer}\.crossattention\.output\.LayerNorm\.{WB}", _to("qformer.layers.{i}.cross_norm.{wb}")),
        *(
            rule
            for theirs, ours in (("_query", "query_mlp"), ("", "text_mlp"))
            for rule in (
                (
                    rf"{layer}\.intermediate{theirs}\.dense\.{WB}",
                    _to(f"qformer.layers.{{i}}.{ours}.fc1.{{wb}}"),
                ),
                (rf"{layer}\.output{theirs}\.dense\.{WB}", _to(f"qformer.layers.{{i}}.{ours}.fc2.{{wb}}")),
                (
                    rf"{layer}\.output{theirs}\.LayerNorm\.{WB}",
                    _to(f"qformer.layers.{{i}}.{ours}.norm.{{wb}}"),
                ),
            )
        ),
        (rf"language_projection\.{WB}", _to("language_projection.{wb}")),
    ]


_OPT_LAYER = rf"language_model\.model\.decoder\.layers\.{INDEX}"
_OPT: list[Rule] = [
    (
        r"language_model\.model\.decoder\.(?P<x>embed_tokens|embed_positions|project_in|project_out)\.weight",
        _to("language_model.{x}.weight"),
    ),
    *(
        (rf"{_OPT_LAYER}\.self_attn\.{x}_proj\.{WB}", _to("language_model.layers.{i}.qkv.{wb}", part))
        for part, x in enumerate("qkv")
    ),
    (rf"{_OPT_LAYER}\.self_attn\.out_proj\.{WB}", _to("language_model.layers.{i}.out_proj.{wb}")),
    (
        rf"{_OPT_LAYER}\.(?P<x>self_attn_layer_norm|final_layer_norm|fc1|fc2)\.{WB}",
        _to("language_model.layers.{i}.{x}.{wb}"),
    ),
    (rf"language_model\.model\.decoder\.final_layer_norm\.{WB}", _to("language_model.final_layer_norm.{wb}")),
    (r"language_model\.lm_head\.weight", _to("language_model.lm_head.weight")),
]

_T5_LAYER = rf"language_model\.(?P<stack>encoder|decoder)\.block\.{INDEX}\.layer"
_T5: list[Rule] = [
    (
        r"language_model\.(shared|encoder\.embed_tokens|decoder\.embed_tokens)\.weight",
        _to("language_model.embed_tokens.weight"),
    ),
    (
        r"language_model\.(?P<stack>encoder|decoder)\.block\.0\.layer\.0\.SelfAttention"
        r"\.relative_attention_bias\.weight",
        _to("language_model.{stack}_bias.weight"),
    ),
    *(
        (rf"{_T5_LAYER}\.0\.SelfAttention\.{x}\.weight", _to("language_model.{stack}.{i}.qkv.weight", part))
        for part, x in enumerate("qkv")
    ),
    (rf"{_T5_LAYER}\.0\.SelfAttention\.o\.weight", _to("language_model.{stack}.{i}.out_proj.weight")),
    (rf"{_T5_LAYER}\.0\.layer_norm\.weight", _to("language_model.{stack}.{i}.attention_norm.weight")),
    (rf"{_T5_LAYER}\.1\.EncDecAttention\.q\.weight", _to("language_model.{stack}.{i}.cross_query.weight")),
    *(
        (
            rf"{_T5_LAYER}\.1\.EncDecAttention\.{x}\.weight",
            _to("language_model.{stack}.{i}.cross_kv.weight", part),
        )
        for part, x in enumerate("kv")
    ),
    (rf"{_T5_LAYER}\.1\.EncDecAttention\.o\.weight", _to("language_model.{stack}.{i}.cross_out_proj.weight")),
    (
        rf"language_model\.decoder\.block\.{INDEX}\.layer\.1\.layer_norm\.weight",
        _to("language_model.decoder.{i}.cross_norm.weight"),
    ),
    (rf"{_T5_LAYER}\.[12]\.layer_norm\.weight", _to("language_model.{stack}.{i}.mlp_norm.weight")),
    (rf"{_T5_LAYER}\.[12]\.DenseReluDense\.wi\.weight", _to("language_model.{stack}.{i}.wi.weight")),
    *(
        (
            rf"{_T5_LAYER}\.[12]\.DenseReluDense\.wi_{part}\.weight",
            _to("language_model.{stack}.{i}.wi.weight", part),
        )
        for part in (0, 1)
    ),
    (rf"{_T5_LAYER}\.[12]\.DenseReluDense\.wo\.weight", _to("language_model.{stack}.{i}.wo.weight")),
    (
        r"language_model\.(?P<stack>encoder|decoder)\.final_layer_norm\.weight",
        _to("language_model.{stack}_norm.weight"),
    ),
    (r"language_model\.lm_head\.weight", _to("language_model.lm_head.weight")),
]

_IGNORED = re.compile(
    r".*\.position_ids|.*\.decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
"""Buffers that older versions of transformers stored (0, 1, 2, …), and a table that T5 never reads."""


def opt_rules(cross_attention_frequency: int) -> list[Rule]:
    """The name map of a checkpoint whose language model is OPT."""
    return [*_VISION, *_qformer(cross_attention_frequency), *_OPT]


def t5_rules(cross_attention_frequency: int) -> list[Rule]:
    """The name map of a checkpoint whose language model is T5."""
    return [*_VISION, *_qformer(cross_attention_frequency), *_T5]


def retrieval_rules(cross_attention_frequency: int) -> list[Rule]:
    """The name map of a checkpoint for image-text retrieval."""
    return [
        *_VISION,
        *_qformer(cross_attention_frequency),
        (r"embeddings\.(?P<x>word_embeddings|position_embeddings)\.weight", _to("{x}.weight")),
        (rf"(?P<x>vision_projection|text_projection|itm_head)\.{WB}", _to("{x}.{wb}")),
    ]


def stored_parameters(folder: Path, rules: list[Rule]) -> Iterator[str]:
    """Our names of the parameters that a checkpoint stores.

    Raises:
        OSError: a file is missing or not readable safetensors.
    """
    compiled = [(re.compile(pattern), place) for pattern, place in rules]
    for name in _tensors(folder):
        if place := _find_place(name, compiled):
            yield place.name


def load_weights(model: nn.Module, folder: Path, rules: list[Rule]) -> None:
    """Fill every parameter of `model` from the safetensors files of `folder`.

    Raises:
        ValueError: tensors are missing, unexpected or of another shape; every name is listed, and nothing
            has been read.
        OSError: a file is not readable safetensors.
    """
    compiled = [(re.compile(pattern), place) for pattern, place in rules]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    filled: dict[int, dict[int | None, int]] = {id(p): {} for p in parameters.values()}
    problems: list[str] = []
    targets: dict[str, tuple[StoredTensor, Tensor]] = {}
    repeated: dict[str, tuple[StoredTensor, Tensor]] = {}
    for name, stored in _tensors(folder).items():
        place = _find_place(name, compiled)
        if place is None or place.name not in parameters:
            if not _IGNORED.fullmatch(name):
                problems.append(f"unexpected {name}")
            continue
        parameter = parameters[place.name]
        target = _slice(parameter.data, place.part, stored.shape)
        if target is None:
            problems.append(f"{name} has shape {list(stored.shape)}, does not fit {list(parameter.shape)}")
        elif place.part in filled[id(parameter)]:
            repeated[name] = stored, target
        else:
            targets[name] = stored, target
            filled[id(parameter)][place.part] = target.numel()
    problems += [f"missing {n}" for n, p in parameters.items() if sum(filled[id(p)].values()) != p.numel()]
    _refuse(problems, folder)
    for stored, target in targets.values():
        for start, piece in stored.pieces():
            target[start : start + len(piece)].copy_(piece)
    differing = [name for name, (stored, target) in repeated.items() if not _is_in(stored, target)]
    _refuse([f"{name} differs from the tensor that it should share" for name in differing], folder)


def _is_in(stored: StoredTensor, target: Tensor) -> bool:
    """True where the target holds the stored tensor already."""
    return all(torch.equal(target[i : i + len(piece)], piece.to(target)) for i, piece in stored.pieces())


def _refuse(problems: list[str], folder: Path) -> None:
    if problems:
        listed = "\n  ".join(sorted(set(problems)))
        raise ValueError(f"the tensors of {folder} must be those of its config.json, got\n  {listed}")


def _find_place(
    name: str, rules: list[tuple[re.Pattern[str], Callable[[re.Match[str]], Place]]]
) -> Place | None:
    for pattern, place in rules:
        if match := pattern.fullmatch(name):
            return place(match)
    return None


def _slice(parameter: Tensor, part: int | None, shape: tuple[int, ...]) -> Tensor | None:
    """The elements of `parameter` that a tensor of `shape` fills, flat, or None where it does not fit."""
    if part is None:
        fits = parameter.numel() == prod(shape) and parameter.shape[:1] == shape[:1]
        return parameter.view(-1) if fits else None
    rows = shape[0] if shape else 0
    target = parameter[part * rows : (part + 1) * rows]
    return target.view(-1) if target.shape == shape else None


def _tensors(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor by name; the index, where there is one, says which files count."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = ["model.safetensors"]
    found: dict[str, StoredTensor] = {}
    for path in (folder / name for name in names):
        if not path.exists():
            raise FileNotFoundError(
                f"{path} must exist, it is part of the checkpoint; fetch the checkpoint again "
                "(weights must be safetensors: convert older .bin files with transformers' save_pretrained)"
            )
        found |= list_tensors(path)
    return found
