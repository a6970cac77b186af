"""The drawn scenes: if a picture had a second correct caption, the measured accuracy would mean nothing."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from blip2_actor.demo.examples import IMAGE_SIDE_PX, PATCH_PX, make_examples
from blip2_actor.demo.grammar import (
    ARRANGEMENTS,
    BACKGROUNDS,
    COLORS,
    SHAPES,
    UNSEEN_PAIRS,
    Split,
    all_captions,
)
from blip2_actor.demo.scenes import SceneSampler, draw

SPLITS: tuple[Split, ...] = ("train", "held_out", "unseen")


def test_grammar_is_large_and_every_caption_is_distinct() -> None:
    texts = [str(caption) for caption in all_captions()]
    assert len(set(texts)) == len(texts)
    assert len(texts) >= 20_000
    assert len(COLORS) >= 6 and len(SHAPES) >= 4 and len(ARRANGEMENTS) >= 4 and len(BACKGROUNDS) >= 3


def test_splits_share_no_caption_and_lose_none() -> None:
    texts = {split: {str(c) for c in all_captions() if c.split == split} for split in SPLITS}
    assert sum(map(len, texts.values())) == len(set().union(*texts.values())) == len(list(all_captions()))
    assert min(map(len, texts.values())) >= 1000


def test_training_stream_holds_neither_unseen_pairs_nor_held_out_captions() -> None:
    """Otherwise the held-out figures would measure memory."""
    drawn = SceneSampler("train", seed=1).sample(20_000).captions
    assert not UNSEEN_PAIRS.intersection(thing for caption in drawn for thing in caption.things)
    held_out = {str(c) for c in all_captions() if c.split == "held_out"}
    assert held_out.isdisjoint(map(str, drawn))
    # Every other pair occurs, or it would be unseen too.
    assert len({thing for caption in drawn for thing in caption.things}) == len(COLORS) * len(SHAPES) - len(
        UNSEEN_PAIRS
    )


@pytest.mark.parametrize("split", SPLITS)
def test_at_least_half_of_the_scenes_have_two_objects(split: Split) -> None:
    captions = SceneSampler(split, seed=2).sample(2000).captions
    assert sum(caption.second is not None for caption in captions) >= 1000
    if split != "train":
        arrangements = Counter(c.arrangement for c in captions if c.arrangement)
        assert min(arrangements[a] for a in ARRANGEMENTS) > 200


def test_positions_agree_with_the_arrangement_and_the_order_of_names() -> None:
    """The caption is derived again from the positions: top before bottom, left before right."""
    scenes = SceneSampler("held_out", seed=3).sample(3000)
    for caption, centers, sizes in zip(scenes.captions, scenes.centers, scenes.sizes, strict=True):
        if caption.second is None:
            continue
        dx, dy = centers[1] - centers[0]
        touching = sizes.sum() / 2
        assert abs(dx) > touching or abs(dy) > touching, "the objects touch"
        level, upright = abs(dy) <= 0.13, abs(dx) <= 0.13
        assert level or abs(dy) > touching
        assert upright or abs(dx) > touching
        seen = "left of" if level else "above" if upright else f"above and {'left' if dx > 0 else 'right'} of"
        assert caption.arrangement == seen
        assert dx > 0 if level else dy > 0, "the wrong object is named first"


def test_objects_are_inside_the_image() -> None:
    scenes = SceneSampler("train", seed=4).sample(3000)
    half = scenes.sizes[..., None] / 2
    exists = np.broadcast_to(scenes.sizes[..., None] > 0, scenes.centers.shape)
    assert (scenes.centers - half)[exists].min() >= 0
    assert (scenes.centers + half)[exists].max() <= 1


def test_picture_shows_what_the_caption_says() -> None:
    """The model would learn swapped colors or channels without any error."""
    scenes = SceneSampler("train", seed=5).sample(300)
    images = draw(scenes, IMAGE_SIDE_PX).astype(int)
    for image, caption, centers in zip(images, scenes.captions, scenes.centers, strict=True):
        assert np.abs(image[0, 0] - BACKGROUNDS[caption.background]).max() < 25
        for (color, shape), center in zip(caption.things, centers, strict=False):
            x, y = (center * IMAGE_SIDE_PX).astype(int)
            middle = BACKGROUNDS[caption.background] if shape == "ring" else COLORS[color]
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


def test_patch_labels_are_on_their_objects() -> None:
    """A transposed grid would teach the vision encoder mirrored pictures."""
    examples = make_examples("train", 8, 100, num_processes=1)
    palette = [*COLORS.values()]
    side = IMAGE_SIDE_PX // PATCH_PX
    agree = []
    for image, labels in zip(examples.images, examples.patches.reshape(-1, side, side, 3), strict=True):
        middles = image.astype(int)[PATCH_PX // 2 :: PATCH_PX, PATCH_PX // 2 :: PATCH_PX]
        for y, x in np.argwhere(labels[1:-1, 1:-1, 0] > 0) + 1:
            color, shape, _ = labels[y, x]
            inside = (labels[[y - 1, y + 1, y, y], [x, x, x - 1, x + 1], 0] == color).all()
            if inside and SHAPES[shape - 1] in ("square", "circle"):
                agree.append(np.abs(middles[y, x] - palette[color - 1]).max() < 40)
    assert len(agree) > 50
    assert np.mean(agree) > 0.95
