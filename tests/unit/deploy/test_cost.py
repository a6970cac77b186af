"""What a request costs: a beam is a slot, and a request without texts still takes a step per image."""

from __future__ import annotations

from blip2_actor import GenerationOptions
from deploy.guard.cost import Cost, cost_of


def test_beams_samples_and_texts_are_slots() -> None:
    greedy = GenerationOptions(max_new_tokens=10).resolve()
    assert cost_of(greedy).slot_steps == 10
    assert cost_of(GenerationOptions(max_new_tokens=180, num_beams=16).resolve()).slot_steps == 16 * 180
    sampled = GenerationOptions(max_new_tokens=10, do_sample=True, num_return_sequences=4).resolve()
    assert cost_of(sampled, num_texts=3).slots == 12


def test_scores_and_features_cost_a_step_per_image() -> None:
    cost = cost_of(GenerationOptions().resolve(), num_texts=0, num_images=5)
    assert cost == Cost(slots=5, steps=1)
