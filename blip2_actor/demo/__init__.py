"""The demonstration: drawn scenes with exactly one correct caption each, and a checkpoint trained on them.

`grammar` and `scenes` need NumPy only. Everything that `train` needs, torch and transformers included, is
used only to train the checkpoint again.
"""

from blip2_actor.demo.grammar import Caption, all_captions
from blip2_actor.demo.scenes import Scenes, SceneSampler, draw

__all__ = ["Caption", "SceneSampler", "Scenes", "all_captions", "draw"]
