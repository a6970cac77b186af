"""The adapter_config.json of a PEFT adapter: what it asks for, and whether it can be merged.

A merged adapter is a sum of low rank for each matrix and nothing that depends on the input. So LoRA can be
merged, and what PEFT builds on it only where this module says so: every other field that is set is refused by
its name, because leaving it out would silently give other captions.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blip2_actor.checkpoints.json_file import read_json_object

ADAPTER_CONFIG = "adapter_config.json"
_READ = {
    "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "peft_type",
    "base_model_name_or_path", "revision",
}  # fmt: skip
"""Fields that this module reads."""
_IN_THE_TENSORS = {
    "bias", "lora_bias", "modules_to_save", "target_modules", "exclude_modules", "layers_to_transform",
    "layers_pattern",
}  # fmt: skip
"""Fields that say which tensors were trained; the names of the stored tensors say the same."""
_WITHOUT_EFFECT = {
    "auto_mapping", "corda_config", "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config",
    "lora_dropout", "lora_ga_config", "megatron_config", "megatron_core", "peft_version",
    "qalora_group_size", "runtime_config", "task_type",
}  # fmt: skip
"""Fields for training, or for fields that are refused. PEFT itself leaves out fan_in_fan_out here: it is for
layers that store their matrix transposed, and BLIP-2 has none."""
_PLAIN_INITS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the weights of the base as they are."""


@dataclass(frozen=True)
class AdapterConfig:
    """The adapter in a folder."""

    folder: Path
    fields: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Read the configuration of an adapter that can be merged.

        Raises:
            FileNotFoundError: the folder has no adapter_config.json.
            ValueError: the file is broken, or the adapter cannot be merged; the message names the field.
        """
        path = folder / ADAPTER_CONFIG
        fields = read_json_object(path)
        if fields is None:
            raise FileNotFoundError(
                f"adapter must be the folder of a PEFT adapter, got {folder}, which has no {path.name}"
            )
        config = cls(folder, fields)
        config._require_mergeable()
        return config

    @property
    def base_model(self) -> str:
        """The model that it adapts: a hub name or a folder.

        Raises:
            ValueError: the file does not name it.
        """
        base = self.fields.get("base_model_name_or_path")
        if not base:
            raise ValueError(
                f"{self.folder / ADAPTER_CONFIG} must name a base_model_name_or_path, got {base!r}; set "
                f"--model to the model that it adapts, and --adapter to {self.folder}"
            )
        return str(base)

    def require_model(self, base: Path) -> None:
        """Refuse a folder of an adapter alone, perhaps this one, as what this adapter is merged into.

        Raises:
            ValueError: it is such a folder.
        """
        if (base / ADAPTER_CONFIG).exists() and not (base / "config.json").exists():
            raise ValueError(
                f"the adapter in {self.folder} must adapt a model, got {base}, which holds an adapter alone; "
                f"set --model to the model that was adapted, and --adapter to {self.folder}"
            )

    def scaling(self, module: str, rank: int) -> float:
        """Return the factor of the product of a module's two matrices.

        Args:
            module: its name in transformers' model.
            rank: rows of its matrix A.

        Raises:
            ValueError: the configuration gives it another rank, or no factor.
        """
        expected = self._for_module("rank_pattern", module, self.fields.get("r", 8))
        if rank != expected:
            raise ValueError(
                f"{module} in {self.folder} must have the rank {expected} of {ADAPTER_CONFIG}, got {rank}; "
                "save the adapter again with save_pretrained"
            )
        alpha = self._for_module("alpha_pattern", module, self.fields.get("lora_alpha", 8))
        if type(alpha) not in (int, float):
            raise ValueError(
                f"lora_alpha and alpha_pattern in {self.folder / ADAPTER_CONFIG} must give a number for "
                f"{module}, got {alpha!r}; save the adapter again with save_pretrained"
            )
        return alpha / (math.sqrt(rank) if self.fields.get("use_rslora") else rank)

    def _for_module(self, field: str, module: str, default: Any) -> Any:
        """Return the value of the first pattern that matches the end of a module's name, as PEFT does."""
        patterns = self.fields.get(field) or {}
        try:
            return next((patterns[p] for p in patterns if re.match(rf"(.*\.)?({p})$", module)), default)
        except (re.error, TypeError) as error:
            raise ValueError(
                f"{field} in {self.folder / ADAPTER_CONFIG} must be an object with regular expressions as "
                f"its names, got {patterns!r}; save the adapter again with save_pretrained"
            ) from error

    def _require_mergeable(self) -> None:
        path = self.folder / ADAPTER_CONFIG
        advice = "merge it with PEFT's merge_and_unload(), and name the folder of the saved model"
        kind = self.fields.get("peft_type")
        if kind != "LORA":
            raise ValueError(f"peft_type in {path} must be LORA, got {kind!r}; {advice} if it can be merged")
        init = self.fields.get("init_lora_weights", True)
        if init not in _PLAIN_INITS:
            raise ValueError(
                f"init_lora_weights in {path} must leave the weights of the base as they are, got "
                f"{init!r}; {advice}"
            )
        known = _READ | _IN_THE_TENSORS | _WITHOUT_EFFECT
        others = [f"{name} = {value!r}" for name, value in self.fields.items() if value and name not in known]
        if others:
            raise ValueError(f"{path} must ask for a plain LoRA, got {', '.join(others)}; {advice}")
