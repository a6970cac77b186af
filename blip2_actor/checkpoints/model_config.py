"""The config.json of a BLIP-2 checkpoint, refused if no model can be built from it."""

from __future__ import annotations

from operator import attrgetter
from pathlib import Path
from typing import Any

from transformers import Blip2Config

from blip2_actor.checkpoints.json_file import read_json_object
from blip2_actor.models.layers import ACTIVATIONS

MAX_SIZES = {
    **dict.fromkeys(("num_layers", "num_decoder_layers", "num_hidden_layers"), 1 << 10),
    "image_size": 1 << 13,
    **dict.fromkeys(("d_model", "d_kv", "d_ff", "num_heads", "relative_attention_num_buckets"), 1 << 16),
    **dict.fromkeys(("hidden_size", "intermediate_size", "ffn_dim", "max_position_embeddings"), 1 << 16),
}
"""Maximum sizes of each part, several times those of the largest models; damaged files ask for far more."""


def read_model_config(folder: Path) -> Blip2Config:
    """Return the configuration in a checkpoint's folder.

    Raises:
        ValueError: it is missing, broken, of another model or of quantized weights, or its sizes contradict
            each other, or a part has an activation that is not supported; the message names the field.
    """
    path = folder / "config.json"
    raw = read_json_object(path)
    if raw is None:
        raise ValueError(f"{folder} has no config.json; name the folder of a checkpoint")
    if raw.get("model_type") != "blip-2":
        raise ValueError(f"the model must be BLIP-2, got model_type {raw.get('model_type')!r} in {folder}")
    _refuse_quantized(raw.get("quantization_config"), folder)
    if name := raw.get("transformers_weights"):
        raise ValueError(
            f"transformers_weights in {path} must be left out, got {name!r}; rename that file to "
            "model.safetensors"
        )
    try:
        config = Blip2Config.from_dict(raw)
    except Exception as error:  # transformers raises errors of many classes for a value that it cannot use
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} must describe a BLIP-2, got {reason}; fetch it again") from error
    _require_values(config, path)
    return config


def _refuse_quantized(quantization: Any, folder: Path) -> None:
    if not quantization:
        return
    method = repr(quantization)
    if isinstance(quantization, dict):
        bits = next((f", {n} bits" for n in (4, 8) if quantization.get(f"load_in_{n}bit")), "")
        method = f"{quantization.get('quant_method')}{bits}"
    raise ValueError(
        f"the weights in {folder} must not be quantized, got quantization_config (of {method}); "
        "name the model that this one was made from, or save this one after transformers' dequantize()"
    )


def _require_values(config: Blip2Config, path: Path) -> None:
    """Check what no shape of a tensor shows."""

    def require(holds: bool, name: str, rule: str, advice: str = "fetch the file again") -> None:
        if not holds:
            got = attrgetter(name)(config)
            raise ValueError(f"{name} in {path} must be {rule}, got {got!r}; {advice}")

    require(isinstance(config.architectures, list | None), "architectures", "a list of names")
    vision, qformer, text = config.vision_config, config.qformer_config, config.text_config
    patch_px = vision.patch_size
    require(type(patch_px) is int and patch_px > 0, "vision_config.patch_size", "a number of pixels")
    has_patches = type(vision.image_size) is int and vision.image_size >= patch_px
    require(has_patches, "vision_config.image_size", f"a number of pixels, at least patch_size ({patch_px})")
    require(config.num_query_tokens > 0, "num_query_tokens", "at least 1")
    require(config.num_query_tokens <= 1 << 16, "num_query_tokens", f"at most {1 << 16}")
    for part_name in ("vision_config", "qformer_config", "text_config"):
        for name, most in MAX_SIZES.items():
            size = getattr(getattr(config, part_name), name, None) or 0
            require(size <= most, f"{part_name}.{name}", f"at most {most}")
    require(qformer.cross_attention_frequency > 0, "qformer_config.cross_attention_frequency", "at least 1")
    parts = {"vision_config": vision, "qformer_config": qformer}
    activations = ["vision_config.hidden_act", "qformer_config.hidden_act"]
    if text.model_type == "opt":  # the heads of a T5 have a width of their own
        parts["text_config"] = text
        activations.append("text_config.activation_function")
    if text.model_type == "t5":  # the rows of the position bias: half for one distance each, half for ranges
        num_rows, max_distance = text.relative_attention_num_buckets, text.relative_attention_max_distance
        require(num_rows >= 4, "text_config.relative_attention_num_buckets", "at least 4")
        rule = f"above half of relative_attention_num_buckets ({num_rows})"
        require(max_distance > num_rows // 2, "text_config.relative_attention_max_distance", rule)
        activations.append("text_config.dense_act_fn")
    widths = ("ffn_dim",) if text.model_type == "opt" else ("d_model", "d_kv", "d_ff", "num_heads")
    of_text = [f"text_config.{width}" for width in widths if text.model_type in ("opt", "t5")]
    for name in ("vision_config.intermediate_size", "qformer_config.intermediate_size", *of_text):
        require(attrgetter(name)(config) > 0, name, "at least 1")
    for name, part in parts.items():
        heads, width = part.num_attention_heads, part.hidden_size
        fits = heads > 0 and width % heads == 0
        require(fits, f"{name}.num_attention_heads", f"a divisor of hidden_size ({width})")
    for name in activations:
        rule, advice = f"one of {', '.join(sorted(ACTIVATIONS))}", "no other activation is supported"
        require(attrgetter(name)(config) in list(ACTIVATIONS), name, rule, advice)
