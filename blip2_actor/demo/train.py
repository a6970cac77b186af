"""Train the demonstration checkpoint: `python -m blip2_actor.demo.train --output FOLDER`.

There are three stages. In "look" the vision encoder learns alone which object is under each patch. In "tell"
the Q-Former and the language model learn from its output, which is computed once. In "finish", a short stage,
all parts learn together. Training runs on two CPU cores in bfloat16 autocast; the saved weights are float32,
in ordinary Hugging Face files next to a log.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from blip2_actor.demo.architecture import NUM_QUERY_TOKENS, WIDTH, build_model
from blip2_actor.demo.evaluation import CaptionAccuracy, generate_captions, score_captions
from blip2_actor.demo.examples import NUM_PATCHES, Examples, make_examples
from blip2_actor.demo.objectives import Heads, caption_loss, encode_captions, to_pixel_values
from blip2_actor.demo.saving import save_checkpoint
from blip2_actor.demo.tokenizer import build_tokenizer

logger = logging.getLogger("blip2_actor.demo.train")

Losses = tuple[Tensor, dict[str, float]]
"""The loss to minimize, and figures for the log."""


class Training:
    """One training run: data, model, heads, and the log that is saved with the checkpoint.

    It is created once and then forked into workers of one thread each. On few and busy cores, processes that
    synchronize once per step train faster than threads that synchronize in every matrix product.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.start = time.monotonic()
        self.log: list[dict[str, Any]] = []
        self.rank = 0
        torch.manual_seed(args.seed)
        self.tokenizer = build_tokenizer()
        self.model = build_model(self.tokenizer)
        self.heads = Heads()
        self.examples = make_examples("train", args.seed + 1, args.examples, args.workers)
        self.patches = torch.from_numpy(self.examples.patches)
        self.attributes = torch.from_numpy(self.examples.attributes)
        self.input_ids = encode_captions(self.tokenizer, self.examples)
        self.test_examples = {
            split: make_examples(split, args.seed + 2, 500) for split in ("held_out", "unseen")
        }
        # Output of the vision encoder for every example; all workers fill it after the first stage.
        self.vision_output = torch.empty(
            args.examples, NUM_PATCHES + 1, WIDTH, dtype=torch.bfloat16
        ).share_memory_()
        self._note("examples drawn", examples=args.examples)

    def run(self, rank: int = 0, rendezvous: str = "") -> None:
        """Train as one of `workers` processes, which average their gradients; the first one also saves."""
        args, model = self.args, self.model
        self.rank = rank
        torch.set_num_threads(1)
        dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=args.workers)
        self._stage("look", args.look_steps, args.look_rate, [model.vision_model], self._look)
        self._encode_all()
        language = [model.qformer, model.language_projection, model.language_model]
        self._stage("tell", args.tell_steps, args.tell_rate, language, self._tell, [model.query_tokens])
        self._stage("finish", args.finish_steps, args.finish_rate, [model], self._finish)
        dist.destroy_process_group()

    def save(self) -> None:
        """Measure the accuracy of the model and replace the checkpoint."""
        scores = {name: self._score(examples) for name, examples in self.test_examples.items()}
        for name, score in scores.items():
            self._note(f"score {name}", exact=score.exact, **score.by_kind)
        about = {
            "options": {name: value for name, value in vars(self.args).items() if name != "output"},
            "wall_s": round(time.monotonic() - self.start),
            "scores": {name: asdict(score) for name, score in scores.items()},
        }
        save_checkpoint(self.args.output, self.model, self.tokenizer, about, self.log)

    def _stage(
        self,
        name: str,
        steps: int,
        rate: float,
        modules: list[nn.Module],
        losses: Callable[[np.ndarray], Losses],
        more: Sequence[nn.Parameter] = (),
    ) -> None:
        args = self.args
        rng = np.random.default_rng([args.seed, self.rank, *name.encode()])
        parameters = [p for module in [*modules, self.heads] for p in module.parameters()] + [*more]
        optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, steps))
        recent: list[dict[str, float]] = []
        for step in range(1, steps + 1):
            chosen = rng.integers(len(self.input_ids), size=args.batch // args.workers)
            with torch.autocast("cpu", torch.bfloat16):
                loss, figures = losses(chosen)
            loss.backward()
            self._average_gradients(parameters)
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            recent.append(figures)
            if step % 50 == 0 or step == steps:
                self._note(name, step=step, **_means(recent))
                recent.clear()
            if self.rank == 0 and name != "look" and (step % args.save_every == 0 or step == steps):
                self.save()

    def _look(self, chosen: np.ndarray) -> Losses:
        """Return the loss of the vision encoder alone."""
        return self._patch_losses(self._image_embeds(chosen), chosen)

    def _tell(self, chosen: np.ndarray) -> Losses:
        """Return the loss of Q-Former and language model over the stored output of the vision encoder."""
        return self._language_losses(self.vision_output[chosen], chosen)

    def _finish(self, chosen: np.ndarray) -> Losses:
        """Return the loss of all parts together; the patches also learn which object is named first."""
        image_embeds = self._image_embeds(chosen)
        patch_loss, patch_figures = self._patch_losses(image_embeds, chosen)
        place_loss = self.heads.place_loss(image_embeds, self.patches[chosen], self.attributes[chosen])
        language_loss, language_figures = self._language_losses(image_embeds, chosen)
        figures = patch_figures | {"place_loss": place_loss.item()} | language_figures
        return language_loss + 0.5 * patch_loss + place_loss, figures

    def _image_embeds(self, chosen: np.ndarray) -> Tensor:
        """Return float[B, P + 1, D] of the vision encoder."""
        return self.model.vision_model(to_pixel_values(self.examples.images[chosen])).last_hidden_state

    def _patch_losses(self, image_embeds: Tensor, chosen: np.ndarray) -> Losses:
        loss, shapes = self.heads.patch_loss(image_embeds, self.patches[chosen], self.attributes[chosen])
        return loss, {"patch_loss": loss.item(), "patch_shapes_right": shapes.item()}

    def _language_losses(self, image_embeds: Tensor, chosen: np.ndarray) -> Losses:
        model, input_ids = self.model, self.input_ids[chosen]
        queries = model.query_tokens.expand(len(image_embeds), -1, -1)
        query_output = model.qformer(
            query_embeds=queries, encoder_hidden_states=image_embeds
        ).last_hidden_state
        words = model.get_input_embeddings()(input_ids[:, NUM_QUERY_TOKENS:])
        inputs_embeds = torch.cat([model.language_projection(query_output), words], dim=1)
        logits = model.language_model(inputs_embeds=inputs_embeds).logits
        words_loss = caption_loss(logits, input_ids, model.config.text_config.pad_token_id)
        query_loss = self.heads.query_loss(query_output, self.attributes[chosen])
        return words_loss + query_loss, {"caption_loss": words_loss.item(), "query_loss": query_loss.item()}

    def _average_gradients(self, parameters: list[nn.Parameter]) -> None:
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.args.workers
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    @torch.no_grad()
    def _encode_all(self) -> None:
        for chosen in torch.arange(self.rank, len(self.vision_output), self.args.workers).split(200):
            with torch.autocast("cpu", torch.bfloat16):
                self.vision_output[chosen] = self._image_embeds(chosen.numpy()).bfloat16()
        dist.barrier()
        self._note("examples seen")

    def _score(self, examples: Examples) -> CaptionAccuracy:
        self.model.eval()
        captions = generate_captions(self.model, self.tokenizer, to_pixel_values(examples.images))
        self.model.train()
        return score_captions(captions, [str(caption) for caption in examples.captions])

    def _note(self, what: str, **figures: float) -> None:
        entry = {"what": what, "seconds": round(time.monotonic() - self.start, 1)}
        self.log.append(entry | {name: round(value, 5) for name, value in figures.items()})
        if self.rank == 0:
            logger.info("%s", json.dumps(self.log[-1]))


def _rate(step: int, steps: int) -> float:
    """Return the factor of the learning rate: 150 steps of warm-up, constant until half, then linear to 0."""
    return min(1.0, (step + 1) / 150, 2 * (1 - step / steps))


def _means(parts: list[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="folder of the checkpoint; it is replaced")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="number of processes, of one thread each")
    parser.add_argument("--examples", type=int, default=40_000, help="number of scenes drawn for training")
    parser.add_argument("--batch", type=int, default=96, help="examples per step, of all processes together")
    for stage, steps, rate in (("look", 1000, 2e-3), ("tell", 3000, 1e-3), ("finish", 900, 8e-4)):
        parser.add_argument(f"--{stage}-steps", type=int, default=steps, help=f"steps of the stage {stage}")
        parser.add_argument(f"--{stage}-rate", type=float, default=rate, help="its maximum learning rate")
    parser.add_argument("--save-every", type=int, default=600, help="number of steps between checkpoints")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(1)
    training = Training(args)
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = os.path.join(folder, "rendezvous")
        # The workers are forked, so that they share the examples.
        mp.start_processes(training.run, (rendezvous,), nprocs=args.workers, start_method="fork")


if __name__ == "__main__":
    main()
