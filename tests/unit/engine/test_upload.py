"""Batches on their way to the device: they hold the right pixels, whatever was sent ahead."""

from __future__ import annotations

import numpy as np
import torch

from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.upload import Upload


def make_images(*values: int) -> list[EncodedImage]:
    return [EncodedImage(np.full((2, 2, 3), value, np.uint8)) for value in values]


def seen(batch: torch.Tensor) -> list[int]:
    assert batch.dtype is torch.uint8
    assert batch.shape[1:] == (2, 2, 3)
    return batch[:, 1, 1, 2].tolist()


def test_what_was_sent_ahead_is_taken_once() -> None:
    upload, images = Upload(torch.device("cpu")), make_images(1, 2, 3)
    upload.send(images)
    assert upload.has_sent
    assert seen(upload.take(images)) == [1, 2, 3]
    assert not upload.has_sent


def test_another_batch_than_the_one_sent_ahead_is_sent_again() -> None:
    """A request may be cancelled, or the batch halved; then the old pixels would be captioned."""
    upload, images = Upload(torch.device("cpu")), make_images(1, 2, 3, 4)
    upload.send(images)
    assert seen(upload.take([images[0], images[2], images[3]])) == [1, 3, 4]
    upload.send(images)
    assert seen(upload.take(images[:2])) == [1, 2]
    assert seen(upload.take(images[2:])) == [3, 4]


def test_larger_batches_than_the_first() -> None:
    upload = Upload(torch.device("cpu"))
    assert seen(upload.take(make_images(9))) == [9]
    assert seen(upload.take(make_images(*range(7)))) == list(range(7))
    assert seen(upload.take(make_images(5, 6))) == [5, 6]
