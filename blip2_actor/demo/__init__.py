"""The demonstration: drawn scenes with one true caption each, and the checkpoint trained on them.

`scenes` needs NumPy and Pillow only; `train` needs torch and transformers and is run once.
"""

from blip2_actor.demo.scenes import SceneSampler, draw

__all__ = ["SceneSampler", "draw"]
