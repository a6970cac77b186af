"""What a request asks of the service, known before any of it is done.

Requests differ a thousandfold: 30 tokens in one slot against 512 tokens in 16. Admission therefore counts
slots and steps, never requests.
"""

from __future__ import annotations

from dataclasses import dataclass

from deploy.work import ImageWork


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


def cost_of(work: ImageWork, *, num_images: int = 1) -> Cost:
    """Return what a request can cost at most.

    Args:
        work: what is made of each image; without texts, such as scores alone, it costs one step.
        num_images: images of the request.
    """
    options = [text.options for text in work.texts]
    slots = sum(max(one.num_beams, one.num_return_sequences) for one in options) or 1
    steps = max((one.max_new_tokens for one in options), default=1)
    return Cost(slots=num_images * slots, steps=steps)
