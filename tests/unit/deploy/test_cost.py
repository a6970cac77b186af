"""What a request costs: a beam is a slot, and a request without texts still takes a step per image."""

from __future__ import annotations

from typing import Any

from blip2_actor import GenerationOptions
from deploy.guard.cost import Cost, cost_of
from deploy.work import ImageWork, TextToGenerate, TextToScore


def texts(*options: dict[str, Any]) -> ImageWork:
    made = (GenerationOptions(**given).resolve() for given in options)
    return ImageWork(texts=tuple(TextToGenerate(prompt=None, options=one) for one in made))


def test_beams_samples_and_texts_are_slots() -> None:
    assert cost_of(texts({"max_new_tokens": 10})).slot_steps == 10
    assert cost_of(texts({"max_new_tokens": 180, "num_beams": 16})).slot_steps == 16 * 180
    sampled = {"max_new_tokens": 10, "do_sample": True, "num_return_sequences": 4}
    assert cost_of(texts(sampled, {"max_new_tokens": 12, "num_beams": 3})) == Cost(slots=7, steps=12)


def test_scores_and_features_cost_a_step_per_image() -> None:
    for work in (ImageWork(scores=(TextToScore(text="a dog"),)), ImageWork(features=True), ImageWork()):
        assert cost_of(work, num_images=5) == Cost(slots=5, steps=1)
