"""The name map: which parameter of our model each tensor of a Hugging Face BLIP-2 checkpoint fills.

A rule is a name in the checkpoint, our name, and the index of the part if several tensors are stacked in one
fused parameter. In both names `{i}` stands for the number of a layer and `{wb}` for "weight" or "bias".

A tensor that matches no rule is an error (see `load_weights.py`), unless its name is in `UNUSED`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

_PLACEHOLDERS = {"{i}": r"(?P<i>\d+)", "{wb}": r"(?P<wb>weight|bias)"}

UNUSED = re.compile(
    r".*\.position_ids|.*\.decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight"
)
"""Buffers that older versions of transformers stored (0, 1, 2, …), and a table that T5 never reads."""


@dataclass(frozen=True)
class Target:
    """Where a tensor goes: a parameter, and which of the equal parts that are stacked in it."""

    name: str
    part: int | None = None


@dataclass(frozen=True)
class Rule:
    """One line of the name map."""

    theirs: str
    ours: str
    part: int | Callable[[int], int] | None = None
    """Index of the part in a fused parameter, or a function from the number of the layer to it."""

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        pieces = re.split(r"(\{\w+\})", self.theirs)
        return re.compile("".join(_PLACEHOLDERS.get(piece, re.escape(piece)) for piece in pieces))

    def target(self, name: str) -> Target | None:
        """Return where the tensor called `name` goes, or None if this rule is not for it."""
        match = self._pattern.fullmatch(name)
        if match is None:
            return None
        part = self.part(int(match["i"])) if callable(self.part) else self.part
        return Target(self.ours.format(**match.groupdict()), part)


def find_target(name: str, rules: list[Rule]) -> Target | None:
    """Return where the tensor called `name` goes, by the first rule that matches."""
    return next((target for rule in rules if (target := rule.target(name)) is not None), None)


def name_map(reader: str, cross_attention_frequency: int) -> list[Rule]:
    """Return the name map of a checkpoint.

    Args:
        reader: model that reads the text: "opt", "t5", or "bert" for the Q-Former of a retrieval checkpoint.
        cross_attention_frequency: as in the configuration of the Q-Former.
    """
    return [*_VISION, *_qformer_rules(cross_attention_frequency), *_RULES_OF_READERS[reader]()]


_VISION = [
    Rule("vision_model.embeddings.class_embedding", "vision.class_embedding"),
    Rule("vision_model.embeddings.position_embedding", "vision.position_embedding"),
    Rule("vision_model.embeddings.patch_embedding.{wb}", "vision.patch_embedding.{wb}"),
    Rule("vision_model.encoder.layers.{i}.layer_norm1.{wb}", "vision.layers.{i}.layer_norm1.{wb}"),
    Rule("vision_model.encoder.layers.{i}.self_attn.qkv.{wb}", "vision.layers.{i}.qkv.{wb}"),
    Rule("vision_model.encoder.layers.{i}.self_attn.projection.{wb}", "vision.layers.{i}.projection.{wb}"),
    Rule("vision_model.encoder.layers.{i}.layer_norm2.{wb}", "vision.layers.{i}.layer_norm2.{wb}"),
    Rule("vision_model.encoder.layers.{i}.mlp.fc1.{wb}", "vision.layers.{i}.fc1.{wb}"),
    Rule("vision_model.encoder.layers.{i}.mlp.fc2.{wb}", "vision.layers.{i}.fc2.{wb}"),
    Rule("vision_model.post_layernorm.{wb}", "vision.post_layernorm.{wb}"),
]


def _qformer_rules(cross_attention_frequency: int) -> list[Rule]:
    """Return the rules of the Q-Former, whose cross-attentions share one fused key-value projection."""
    theirs, ours = "qformer.encoder.layer.{i}", "qformer.layers.{i}"

    def cross_part(offset: int) -> Callable[[int], int]:
        return lambda layer: layer // cross_attention_frequency * 2 + offset

    return [
        Rule("query_tokens", "query_tokens"),
        Rule("qformer.layernorm.{wb}", "qformer.layernorm.{wb}"),
        Rule(theirs + ".attention.attention.query.{wb}", ours + ".qkv.{wb}", 0),
        Rule(theirs + ".attention.attention.key.{wb}", ours + ".qkv.{wb}", 1),
        Rule(theirs + ".attention.attention.value.{wb}", ours + ".qkv.{wb}", 2),
        Rule(theirs + ".attention.output.dense.{wb}", ours + ".attention_output.{wb}"),
        Rule(theirs + ".attention.output.LayerNorm.{wb}", ours + ".attention_norm.{wb}"),
        Rule(theirs + ".crossattention.attention.query.{wb}", ours + ".cross_query.{wb}"),
        Rule(theirs + ".crossattention.attention.key.{wb}", "qformer.cross_kv.{wb}", cross_part(0)),
        Rule(theirs + ".crossattention.attention.value.{wb}", "qformer.cross_kv.{wb}", cross_part(1)),
        Rule(theirs + ".crossattention.output.dense.{wb}", ours + ".cross_output.{wb}"),
        Rule(theirs + ".crossattention.output.LayerNorm.{wb}", ours + ".cross_norm.{wb}"),
        Rule(theirs + ".intermediate_query.dense.{wb}", ours + ".query_mlp.fc1.{wb}"),
        Rule(theirs + ".output_query.dense.{wb}", ours + ".query_mlp.fc2.{wb}"),
        Rule(theirs + ".output_query.LayerNorm.{wb}", ours + ".query_mlp.norm.{wb}"),
        Rule(theirs + ".intermediate.dense.{wb}", ours + ".text_mlp.fc1.{wb}"),
        Rule(theirs + ".output.dense.{wb}", ours + ".text_mlp.fc2.{wb}"),
        Rule(theirs + ".output.LayerNorm.{wb}", ours + ".text_mlp.norm.{wb}"),
    ]


def _opt_rules() -> list[Rule]:
    theirs, ours = "language_model.model.decoder", "language_model"
    their_layer, our_layer = theirs + ".layers.{i}", ours + ".layers.{i}"
    return [
        Rule("language_projection.{wb}", "language_projection.{wb}"),
        Rule(theirs + ".embed_tokens.weight", ours + ".embed_tokens.weight"),
        Rule(theirs + ".embed_positions.weight", ours + ".embed_positions.weight"),
        Rule(their_layer + ".self_attn_layer_norm.{wb}", our_layer + ".self_attn_layer_norm.{wb}"),
        Rule(their_layer + ".self_attn.q_proj.{wb}", our_layer + ".qkv.{wb}", 0),
        Rule(their_layer + ".self_attn.k_proj.{wb}", our_layer + ".qkv.{wb}", 1),
        Rule(their_layer + ".self_attn.v_proj.{wb}", our_layer + ".qkv.{wb}", 2),
        Rule(their_layer + ".self_attn.out_proj.{wb}", our_layer + ".out_proj.{wb}"),
        Rule(their_layer + ".final_layer_norm.{wb}", our_layer + ".final_layer_norm.{wb}"),
        Rule(their_layer + ".fc1.{wb}", our_layer + ".fc1.{wb}"),
        Rule(their_layer + ".fc2.{wb}", our_layer + ".fc2.{wb}"),
        Rule(theirs + ".final_layer_norm.{wb}", ours + ".final_layer_norm.{wb}"),
        Rule("language_model.lm_head.weight", "language_model.lm_head.weight"),
    ]


def _t5_rules() -> list[Rule]:
    """Return the rules of T5. The embeddings may be stored up to three times, and must then agree."""
    embeddings = "language_model.embed_tokens.weight"
    return [
        Rule("language_projection.{wb}", "language_projection.{wb}"),
        Rule("language_model.shared.weight", embeddings),
        Rule("language_model.encoder.embed_tokens.weight", embeddings),
        Rule("language_model.decoder.embed_tokens.weight", embeddings),
        *_t5_stack_rules("encoder", mlp=1),
        *_t5_cross_attention_rules(),
        *_t5_stack_rules("decoder", mlp=2),
        Rule("language_model.lm_head.weight", "language_model.lm_head.weight"),
    ]


def _t5_stack_rules(stack: str, mlp: int) -> list[Rule]:
    """Return the rules that encoder and decoder share; `mlp` is the index of the MLP in a block."""
    bias = f"language_model.{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
    attention = f"language_model.{stack}.block.{{i}}.layer.0"
    feed_forward = f"language_model.{stack}.block.{{i}}.layer.{mlp}"
    ours = f"language_model.{stack}.{{i}}"
    return [
        Rule(bias, f"language_model.{stack}_bias.weight"),
        Rule(attention + ".layer_norm.weight", ours + ".attention_norm.weight"),
        Rule(attention + ".SelfAttention.q.weight", ours + ".qkv.weight", 0),
        Rule(attention + ".SelfAttention.k.weight", ours + ".qkv.weight", 1),
        Rule(attention + ".SelfAttention.v.weight", ours + ".qkv.weight", 2),
        Rule(attention + ".SelfAttention.o.weight", ours + ".out_proj.weight"),
        Rule(feed_forward + ".layer_norm.weight", ours + ".mlp_norm.weight"),
        Rule(feed_forward + ".DenseReluDense.wi.weight", ours + ".wi.weight"),
        Rule(feed_forward + ".DenseReluDense.wi_0.weight", ours + ".wi.weight", 0),
        Rule(feed_forward + ".DenseReluDense.wi_1.weight", ours + ".wi.weight", 1),
        Rule(feed_forward + ".DenseReluDense.wo.weight", ours + ".wo.weight"),
        Rule(f"language_model.{stack}.final_layer_norm.weight", f"language_model.{stack}_norm.weight"),
    ]


def _t5_cross_attention_rules() -> list[Rule]:
    theirs, ours = "language_model.decoder.block.{i}.layer.1", "language_model.decoder.{i}"
    return [
        Rule(theirs + ".layer_norm.weight", ours + ".cross_norm.weight"),
        Rule(theirs + ".EncDecAttention.q.weight", ours + ".cross_query.weight"),
        Rule(theirs + ".EncDecAttention.k.weight", ours + ".cross_kv.weight", 0),
        Rule(theirs + ".EncDecAttention.v.weight", ours + ".cross_kv.weight", 1),
        Rule(theirs + ".EncDecAttention.o.weight", ours + ".cross_out_proj.weight"),
    ]


def _retrieval_rules() -> list[Rule]:
    return [
        Rule("embeddings.word_embeddings.weight", "word_embeddings.weight"),
        Rule("embeddings.position_embeddings.weight", "position_embeddings.weight"),
        Rule("vision_projection.{wb}", "vision_projection.{wb}"),
        Rule("text_projection.{wb}", "text_projection.{wb}"),
        Rule("itm_head.{wb}", "itm_head.{wb}"),
    ]


_RULES_OF_READERS = {"opt": _opt_rules, "t5": _t5_rules, "bert": _retrieval_rules}
