"""The drawn scenes: if a caption is not the one true caption of its picture, accuracy means nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from blip2_actor.demo.examples import IMAGE_SIDE_PX, PATCH_PX, make_examples
from blip2_actor.demo.scenes import (
    ARRANGEMENTS,
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    UNSEEN_PAIRS,
    SceneSampler,
    all_captions,
    draw,
)

SPLITS = ("train", "held_out", "unseen")


def test_grammar_is_large_and_every_caption_is_distinct() -> None:
    texts = [str(caption) for caption in all_captions()]
    assert len(set(texts)) == len(texts)
    assert len(texts) >= 20_000
    assert len(COLOURS) >= 6 and len(SHAPES) >= 4 and len(ARRANGEMENTS) >= 4 and len(BACKGROUNDS) >= 3


def test_splits_share_no_caption_and_lose_none() -> None:
    texts = {split: {str(c) for c in all_captions() if c.split == split} for split in SPLITS}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == len(list(all_captions()))
    assert min(map(len, texts.values())) >= 1000


def test_training_stream_holds_neither_unseen_pairs_nor_held_out_captions() -> None:
    """A leak here would turn the held-out figures into a memory test."""
    drawn = SceneSampler("train", seed=1).sample(20_000).captions
    assert not UNSEEN_PAIRS.intersection(thing for caption in drawn for thing in caption.things)
    held_out = {str(c) for c in all_captions() if c.split == "held_out"}
    assert held_out.isdisjoint(map(str, drawn))
    # Every other pair does occur, or it would be unseen without being counted as such.
    assert len({thing for caption in drawn for thing in caption.things}) == len(COLOURS) * len(SHAPES) - len(
        UNSEEN_PAIRS
    )


@pytest.mark.parametrize("split", SPLITS)
def test_at_least_half_of_the_scenes_hold_two_objects(split: str) -> None:
    captions = SceneSampler(split, seed=2).sample(2000).captions  # type: ignore[arg-type]
    assert sum(caption.second is not None for caption in captions) >= 1000
    if split != "train":
        arrangements = Counter(c.arrangement for c in captions if c.arrangement)
        assert min(arrangements[a] for a in ARRANGEMENTS) > 200


def test_places_tell_the_arrangement_and_who_is_named_first() -> None:
    """Derived anew from where the objects stand: top before bottom, left before right."""
    scenes = SceneSampler("held_out", seed=3).sample(3000)
    for caption, centres, sizes in zip(scenes.captions, scenes.centres, scenes.sizes, strict=True):
        if caption.second is None:
            continue
        dx, dy = centres[1] - centres[0]
        reach = sizes.sum() / 2
        assert abs(dx) > reach or abs(dy) > reach, "the objects touch"
        level, upright = abs(dy) <= 0.13, abs(dx) <= 0.13
        assert level or abs(dy) > reach
        assert upright or abs(dx) > reach
        seen = "left of" if level else "above" if upright else f"above and {'left' if dx > 0 else 'right'} of"
        assert caption.arrangement == seen
        assert dx > 0 if level else dy > 0, "the wrong one is named first"


def test_objects_lie_inside_the_image() -> None:
    scenes = SceneSampler("train", seed=4).sample(3000)
    half = scenes.sizes[..., None] / 2
    there = np.broadcast_to(scenes.sizes[..., None] > 0, scenes.centres.shape)
    assert (scenes.centres - half)[there].min() >= 0
    assert (scenes.centres + half)[there].max() <= 1


def test_picture_shows_what_the_caption_says() -> None:
    """Colours swapped between objects, or channels swapped, would be learned without complaint."""
    scenes = SceneSampler("train", seed=5).sample(300)
    images = draw(scenes, IMAGE_SIDE_PX).astype(int)
    for image, caption, centres in zip(images, scenes.captions, scenes.centres, strict=True):
        assert np.abs(image[0, 0] - BACKGROUNDS[caption.background]).max() < 25
        for (colour, shape), centre in zip(caption.things, centres, strict=False):
            x, y = (centre * IMAGE_SIDE_PX).astype(int)
            middle = BACKGROUNDS[caption.background] if shape == "ring" else COLOURS[colour]
            assert np.abs(image[y, x] - middle).max() < 25, str(caption)


def test_a_scene_is_the_same_at_every_size() -> None:
    scenes = SceneSampler("train", seed=6).sample(20)
    for small, large in zip(draw(scenes, 64), draw(scenes, 256), strict=True):
        resized = np.asarray(Image.fromarray(large).resize((64, 64), Image.Resampling.BICUBIC))
        assert np.abs(resized.astype(int) - small).mean() < 1.5


def test_examples_do_not_depend_on_the_number_of_processes() -> None:
    one, two = (make_examples("train", 7, 600, num_processes=n) for n in (1, 2))
    assert [*map(str, one.captions)] == [*map(str, two.captions)]
    np.testing.assert_array_equal(one.images, two.images)


def test_patch_labels_lie_on_their_objects() -> None:
    """A transposed grid would teach the vision encoder a mirrored world."""
    examples = make_examples("train", 8, 100, num_processes=1)
    palette = [*COLOURS.values()]
    side = IMAGE_SIDE_PX // PATCH_PX
    agree = []
    for image, labels in zip(examples.images, examples.patches.reshape(-1, side, side, 3), strict=True):
        middles = image.astype(int)[PATCH_PX // 2 :: PATCH_PX, PATCH_PX // 2 :: PATCH_PX]
        for y, x in np.argwhere(labels[1:-1, 1:-1, 0] > 0) + 1:
            colour, shape, _ = labels[y, x]
            inside = (labels[[y - 1, y + 1, y, y], [x, x, x - 1, x + 1], 0] == colour).all()
            if inside and SHAPES[shape - 1] in ("square", "circle"):
                agree.append(np.abs(middles[y, x] - palette[colour - 1]).max() < 40)
    assert len(agree) > 50
    assert np.mean(agree) > 0.95
