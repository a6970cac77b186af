"""What quantization changes: the captions of a sample with it and without it, side by side."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

import pyarrow as pa

from blip2_actor import EngineConfig, Status
from pipeline.plan.cost import Cost
from pipeline.settings.caption_spec import CaptionSpec

MAX_SHOWN = 3


@dataclass(frozen=True)
class Captioned:
    """A sample that one engine has captioned."""

    rows: pa.Table
    """Rows of the caption stage."""
    cost: Cost
    """The cost of one row."""
    start: Cost
    """The cost of starting the engine."""
    engine_bytes: int
    """Memory of the tensors that the engine keeps, on all devices; 0 if they were not counted."""


@dataclass(frozen=True, kw_only=True)
class QuantizationEffect:
    """What is different with `--quantize`."""

    method: str
    num_identical: int | None
    """Captions that are the same; None if none are made."""
    num_changed: int | None
    mean_logprob_change: float | None
    """Mean change of the log-probability of the captions that are the same; None if there are none."""
    changed: tuple[tuple[str, str, str], ...]
    """Key, caption without and caption with quantization, of the first changed rows."""
    images_per_s: float
    plain_images_per_s: float
    engine_bytes: int
    plain_engine_bytes: int

    def lines(self) -> Iterator[str]:
        """Yield lines for the terminal."""
        name = f"{self.method:9} "
        if self.num_identical is not None:
            change = self.mean_logprob_change
            mean = (
                "" if change is None else f"; log-probability of the same captions changes by {change:+.3f}"
            )
            yield f"{name}{self.num_identical:,} captions as without it, {self.num_changed:,} changed{mean}"
            yield from (
                f"          {key}: {before!r} becomes {after!r}" for key, before, after in self.changed
            )
            name = " " * 10
        gib = 1 << 30
        yield (
            f"{name}{self.images_per_s:,.1f} images/s per actor instead of {self.plain_images_per_s:,.1f}; "
            f"{self.engine_bytes / gib:.2f} GiB instead of {self.plain_engine_bytes / gib:.2f}"
        )


def plain_spec(spec: CaptionSpec) -> CaptionSpec | None:
    """Return the spec without quantization, or None if it has none."""
    engine = spec.engine
    if not isinstance(engine, EngineConfig) or engine.quantize is None:
        return None
    plain = dataclasses.replace(engine, quantize=None, quantization_choice=None)
    return dataclasses.replace(spec, engine=plain)


def compare(spec: CaptionSpec, quantized: Captioned, plain: Captioned) -> QuantizationEffect:
    """Compare what two engines have made of the same rows.

    Args:
        spec: of the quantized engine.
    """
    assert isinstance(spec.engine, EngineConfig) and spec.engine.quantize is not None
    columns = [name for name in ("key", "status", "caption", "logprob") if name in plain.rows.column_names]
    pairs = [
        (before, after)
        for before, after in zip(
            plain.rows.select(columns).to_pylist(), quantized.rows.select(columns).to_pylist(), strict=True
        )
        if before["status"] == after["status"] == Status.OK.value
    ]
    makes_captions = spec.outputs.caption
    captioned = pairs if makes_captions else []
    same = [(b, a) for b, a in captioned if b["caption"] == a["caption"]]
    changed = [(b["key"], b["caption"], a["caption"]) for b, a in captioned if b["caption"] != a["caption"]]
    return QuantizationEffect(
        method=spec.engine.quantize,
        num_identical=len(same) if makes_captions else None,
        num_changed=len(changed) if makes_captions else None,
        mean_logprob_change=fmean(a["logprob"] - b["logprob"] for b, a in same) if same else None,
        changed=tuple(changed[:MAX_SHOWN]),
        images_per_s=1 / quantized.cost.wall_s,
        plain_images_per_s=1 / plain.cost.wall_s,
        engine_bytes=quantized.engine_bytes,
        plain_engine_bytes=plain.engine_bytes,
    )


def tensor_bytes() -> int:
    """Return the memory of all tensors of this process.

    The memory of the process grows by imports with its first engine, keeps what an engine has freed for the
    next one, and is none of an accelerator's.
    """
    import torch  # It takes seconds, and the engine needs it.

    gc.collect()
    sizes = {}
    for found in gc.get_objects():
        # Tensors of other classes have no memory, or tensors in them that have it.
        if type(found) not in (torch.Tensor, torch.nn.Parameter) or found.is_meta:
            continue
        if found.layout == torch.strided:
            storage = found.untyped_storage()  # which views share
            sizes[found.device, storage.data_ptr()] = storage.nbytes()
        else:  # packed for oneDNN
            sizes[found.device, id(found)] = found.nbytes
    return sum(sizes.values())
