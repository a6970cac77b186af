"""What a request asks of the service, known before any of it is done.

Requests differ a thousandfold: 30 tokens in one slot against 512 tokens in 16. Admission therefore counts
slots and steps, never requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from blip2_actor import GenerationOptions


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The engine's share of one request."""

    slots: int
    """Slots of the engine that the request holds at once; a text has one slot per beam."""
    steps: int
    """Maximum number of decode steps until its last text ends."""

    @property
    def slot_steps(self) -> int:
        return self.slots * self.steps


def cost_of(options: GenerationOptions, *, num_texts: int = 1, num_images: int = 1) -> Cost:
    """Return what a request can cost at most.

    Args:
        options: how each text is generated.
        num_texts: texts to generate, such as one per image and question; 0 if the request asks only for
            scores or features, which costs one step per image.
        num_images: images of the request.
    """
    if num_texts == 0:
        return Cost(slots=num_images, steps=1)
    per_text = max(options.num_beams, options.num_return_sequences)
    return Cost(slots=num_texts * per_text, steps=options.max_new_tokens)
