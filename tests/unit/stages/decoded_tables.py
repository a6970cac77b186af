"""Tables as the decode stage passes them to the caption stage."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import pyarrow as pa

from blip2_actor.testing import FakeEngineConfig
from pipeline.stages.decode import PIXELS

SIZE_PX = FakeEngineConfig().image_size_px


def pixels_of(n: int) -> np.ndarray:
    """Return uint8[S, S, 3] of one color, a different one for every n."""
    return np.full((SIZE_PX, SIZE_PX, 3), n, np.uint8)


def decoded(images: Iterable[np.ndarray], **columns: Any) -> pa.Table:
    """Return a table with decoded images; the given columns replace its own or are added."""
    images = list(images)
    table = {
        "status": pa.array(["ok"] * len(images)),
        "error": pa.nulls(len(images), pa.string()),
        "width": pa.array([1] * len(images), pa.int32()),
        "height": pa.array([2] * len(images), pa.int32()),
        "sha256": pa.array([image.tobytes()[:32] for image in images], pa.binary()),
        PIXELS: pa.array([image.tobytes() for image in images], pa.binary()),
    }
    return pa.table(table | columns)
