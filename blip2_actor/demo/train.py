"""Train the demonstration checkpoint: `python -m blip2_actor.demo.train --output FOLDER`.

Three stages. The vision encoder learns to see alone (which object lies under each patch); Q-Former and
language model learn to tell from what it sees, computed once; a short last stage trains everything. Runs on
two CPU cores in bfloat16 autocast; float32 weights are saved, as ordinary Hugging Face files beside a log.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from blip2_actor.demo.architecture import build_model, build_processor
from blip2_actor.demo.evaluation import Score, generate_captions, score_captions
from blip2_actor.demo.examples import Examples, make_examples
from blip2_actor.demo.objectives import Heads, Losses, Objectives, encode_captions, to_pixel_values
from blip2_actor.demo.tokenizer import build_tokenizer

logger = logging.getLogger("blip2_actor.demo.train")


class Training:
    """One run: data, model, heads, and the log that is saved with the checkpoint."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.start = time.monotonic()
        self.log: list[dict[str, Any]] = []
        torch.manual_seed(args.seed)
        self.rng = np.random.default_rng(args.seed)
        self.tokenizer = build_tokenizer()
        self.model = build_model(self.tokenizer)
        self.heads = Heads()
        self.objectives = Objectives(self.model, self.heads)
        self.examples = make_examples("train", args.seed + 1, args.examples)
        self.patches = torch.from_numpy(self.examples.patches)
        self.attributes = torch.from_numpy(self.examples.attributes)
        self.input_ids = encode_captions(self.tokenizer, self.examples)
        self.checked = {split: make_examples(split, args.seed + 2, 500) for split in ("held_out", "unseen")}
        self._note("examples drawn", examples=args.examples)

    def run(self) -> None:
        """Train and save; a checkpoint is saved after every `save_every` steps that can caption."""
        args, model = self.args, self.model
        self._stage("look", args.look_steps, args.look_rate, [model.vision_model], self._look)
        self.seen = self._see_all()
        language = [model.qformer, model.language_projection, model.language_model]
        self._stage("tell", args.tell_steps, args.tell_rate, language, self._tell, [model.query_tokens])
        del self.seen
        self._stage("finish", args.finish_steps, args.finish_rate, [model], self._finish)

    def save(self) -> None:
        """Put the checkpoint in place whole: the folder is replaced, never half written."""
        scores = {name: self._score(examples) for name, examples in self.checked.items()}
        for name, score in scores.items():
            self._note(f"score {name}", exact=score.exact, **score.by_kind)
        output = self.args.output.resolve()
        new, old = output.with_name(output.name + ".new"), output.with_name(output.name + ".old")
        for folder in (new, old):
            shutil.rmtree(folder, ignore_errors=True)
        self.model.save_pretrained(new)
        processor = build_processor(self.tokenizer)
        processor.save_pretrained(new)
        processor.image_processor.save_pretrained(new)  # preprocessor_config.json, which most tools read
        self._write_log(new, scores)
        if output.exists():
            os.rename(output, old)
        os.rename(new, output)
        shutil.rmtree(old, ignore_errors=True)

    def _stage(
        self,
        name: str,
        steps: int,
        rate: float,
        modules: list[nn.Module],
        losses: Callable[[np.ndarray], Losses],
        more: Sequence[nn.Parameter] = (),
    ) -> None:
        parameters = [p for module in [*modules, self.heads] for p in module.parameters()] + [*more]
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        recent: list[dict[str, float]] = []
        for step in range(1, steps + 1):
            chosen = self.rng.integers(len(self.input_ids), size=self.args.batch)
            with torch.autocast("cpu", torch.bfloat16):
                loss, figures = losses(chosen)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            recent.append(figures)
            if step % 50 == 0 or step == steps:
                self._note(name, step=step, **_means(recent))
                recent.clear()
            if name != "look" and (step % self.args.save_every == 0 or step == steps):
                self.save()

    def _look(self, chosen: np.ndarray) -> Losses:
        return self.objectives.look(self._pixels(chosen), self.patches[chosen], self.attributes[chosen])

    def _tell(self, chosen: np.ndarray) -> Losses:
        return self.objectives.tell(self.seen[chosen], self.input_ids[chosen], self.attributes[chosen])

    def _finish(self, chosen: np.ndarray) -> Losses:
        return self.objectives.finish(
            self._pixels(chosen), self.patches[chosen], self.input_ids[chosen], self.attributes[chosen]
        )

    def _pixels(self, chosen: np.ndarray) -> Tensor:
        return to_pixel_values(self.examples.images[chosen])

    @torch.no_grad()
    def _see_all(self) -> Tensor:
        """bfloat16[N, P + 1, D]: what the vision encoder makes of every example."""
        seen = []
        with torch.autocast("cpu", torch.bfloat16):
            for chosen in np.array_split(np.arange(len(self.input_ids)), len(self.input_ids) // 200):
                seen.append(self.model.vision_model(self._pixels(chosen)).last_hidden_state.bfloat16())
        self._note("examples seen")
        return torch.cat(seen)

    def _score(self, examples: Examples) -> Score:
        self.model.eval()
        captions = generate_captions(self.model, self.tokenizer, to_pixel_values(examples.images))
        self.model.train()
        return score_captions(captions, [str(caption) for caption in examples.captions])

    def _note(self, what: str, **figures: float) -> None:
        entry = {"what": what, "seconds": round(time.monotonic() - self.start, 1)}
        self.log.append(entry | {name: round(value, 5) for name, value in figures.items()})
        logger.info("%s", json.dumps(self.log[-1]))

    def _write_log(self, folder: Path, scores: dict[str, Score]) -> None:
        about = {
            "command": vars(self.args) | {"output": self.args.output.name},
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "hardware": f"{torch.get_num_threads()} threads of {_processor_name()}",
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
            "wall_s": round(time.monotonic() - self.start),
            "scores": {name: asdict(score) for name, score in scores.items()},
            "log": self.log,
        }
        (folder / "training_log.json").write_text(json.dumps(about, indent=1) + "\n")
        (folder / "training_log.txt").write_text("".join(json.dumps(entry) + "\n" for entry in self.log))


def _rate(step: int, steps: int) -> float:
    """Warm up over 150 steps, hold until half, then fall linearly to zero."""
    return min(1.0, (step + 1) / 150, 2 * (1 - step / steps))


def _means(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder that becomes the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--examples", type=int, default=40_000, help="scenes drawn for training")
    parser.add_argument("--batch", type=int, default=128)
    for stage, steps, rate in (("look", 900, 2e-3), ("tell", 3000, 1e-3), ("finish", 700, 6e-4)):
        parser.add_argument(f"--{stage}-steps", type=int, default=steps)
        parser.add_argument(f"--{stage}-rate", type=float, default=rate, help="highest learning rate")
    parser.add_argument("--save-every", type=int, default=1000, help="steps between checkpoints")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(args.threads)
    Training(args).run()


if __name__ == "__main__":
    main()
