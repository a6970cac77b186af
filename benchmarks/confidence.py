"""How good the confidence of a caption is, on drawn scenes degraded by noise, blur and occlusion.

The demonstration checkpoint captions scenes outside its training set, so that the right caption of each
is known. A calibration is fitted on one half of the captions and measured on the other.

    python -m benchmarks.confidence
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from benchmarks.command_line import make_parser
from benchmarks.measure import report
from blip2_actor import EngineConfig, Result, fit_calibration
from blip2_actor.confidence.fitting import auroc, expected_calibration_error
from blip2_actor.demo.examples import make_examples

NUM_SCENES = 8000
KINDS = ("noise", "blur", "occlusion")
MAX_NOISE, MAX_BLUR_PX, MAX_COVERED = 50.0, 6.0, 0.45
"""Standard deviation of the noise, radius of the blur, and side of the covered square as a fraction."""
LIMITS = (0.5, 0.8, 0.9, 0.95)


def degrade(image: np.ndarray, kind: str, strength: float, draw: np.random.Generator) -> np.ndarray:
    """Return uint8[S, S, 3] degraded in one way; the strength is from 0 to 1."""
    if kind == "blur":
        blurred = Image.fromarray(image).filter(ImageFilter.GaussianBlur(MAX_BLUR_PX * strength))
        return np.asarray(blurred)
    if kind == "noise":
        noisy = image + draw.normal(0, MAX_NOISE * strength, image.shape)
        return np.clip(noisy + 0.5, 0, 255).astype(np.uint8)
    side = max(1, int(len(image) * MAX_COVERED * strength))
    left, top = draw.integers(0, len(image) - side + 1, 2)
    covered = image.copy()
    covered[top : top + side, left : left + side] = draw.integers(0, 256, 3)
    return covered


def captions(num_scenes: int, threads: int | None) -> tuple[list[Result], np.ndarray, np.ndarray]:
    """Return the captions of degraded scenes, whether each is right, and its kind of degradation."""
    examples = make_examples("held_out", 1, num_scenes, num_processes=1)
    draw = np.random.default_rng(0)
    kinds = draw.choice(KINDS, num_scenes)
    images = [
        degrade(image, kind, draw.random(), draw) for image, kind in zip(examples.images, kinds, strict=True)
    ]
    config = EngineConfig(
        model="demo", device="cpu", dtype="float32", num_threads=threads, skip_self_test=True
    )
    with config.build() as engine:
        results = engine.generate(images)
    right = [result.text == str(caption) for result, caption in zip(results, examples.captions, strict=True)]
    return results, np.array(right), kinds


def measure(num_scenes: int = NUM_SCENES, threads: int | None = None) -> dict[str, Any]:
    """Return calibration error and AUROC on the held-out half, and the cost of abstention."""
    results, right, kinds = captions(num_scenes, threads)
    is_fitted = np.arange(num_scenes) % 2 == 0
    texts = [(float(result.logprob or 0.0), len(result.token_ids)) for result in results]
    fitted = [text for text, is_one in zip(texts, is_fitted, strict=True) if is_one]
    calibration = fit_calibration(fitted, right[is_fitted].tolist(), {"model": "demo"})
    sure = np.array([calibration.probability(*text) for text in texts])[~is_fitted]
    plain = np.exp([logprob for logprob, _ in texts])[~is_fitted]
    held_out, of_kind = right[~is_fitted], kinds[~is_fitted]
    return {
        "benchmark": "confidence",
        "num_fitted": int(is_fitted.sum()),
        "num_held_out": len(held_out),
        **figures(sure, held_out),
        "by_kind": {kind: figures(sure[of_kind == kind], held_out[of_kind == kind]) for kind in KINDS},
        "probability_of_the_text": figures(plain, held_out),
        "abstention": abstention(sure, held_out, LIMITS),
    }


def figures(confidence: np.ndarray, is_right: np.ndarray) -> dict[str, float]:
    """Return accuracy, calibration error in 10 and in 15 bins, and AUROC."""
    return {
        "accuracy": float(is_right.mean()),
        "calibration_error_10_bins": expected_calibration_error(confidence, is_right, 10),
        "calibration_error_15_bins": expected_calibration_error(confidence, is_right, 15),
        "auroc": auroc(confidence, is_right),
    }


def abstention(
    confidence: np.ndarray, is_right: np.ndarray, limits: Sequence[float]
) -> Mapping[str, Mapping[str, float]]:
    """Return how many captions a limit keeps, and how many of them are right."""
    kept = {f"{limit:g}": confidence >= limit for limit in limits}
    return {
        limit: {"kept": float(is_kept.mean()), "accuracy": float(is_right[is_kept].mean())}
        for limit, is_kept in kept.items()
        if is_kept.any()
    }


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--num-scenes", type=int, default=NUM_SCENES)
    arguments = parser.parse_args()
    report(measure(arguments.num_scenes, arguments.threads), arguments.output)


if __name__ == "__main__":
    main()
