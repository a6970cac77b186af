"""`ResultSheet`: images next to an engine's results, as a notebook shows them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator, Sequence

from PIL import Image

from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.refusal import RequestRefused
from blip2_actor.inputs.image_input import to_pixels
from blip2_actor.request import ImageLike, Result

SIZE_PX = 160
MAX_SHOWN = 200
"""Images of one sheet; more would make a notebook of many megabytes."""


class ResultSheet:
    """Images and their texts side by side: the last line of a notebook's cell.

    Each image is the square that the model sees. Nothing is fetched: an image at a URL has its text alone.

    Examples:
        >>> results = engine.generate(pictures)
        >>> ResultSheet(pictures, results)
        ResultSheet(24 results, 24 ok)
    """

    def __init__(self, images: Sequence[ImageLike], results: Sequence[Result]) -> None:
        """Take the images, in any form that an engine takes, and their results in the same order.

        Raises:
            ValueError: there are more of one than of the other.
        """
        if len(images) != len(results):
            raise ValueError(
                f"results must be as many as the images ({len(images)}), got {len(results)}; give both of "
                "the same call"
            )
        self._images, self._results = list(images), list(results)

    def __repr__(self) -> str:
        num_ok = sum(result.ok for result in self._results)
        return f"ResultSheet({len(self._results):,} results, {num_ok:,} ok)"

    def _repr_html_(self) -> str:
        """Return what Jupyter shows; texts are escaped."""
        return "".join(
            [
                '<div style="display:flex;flex-wrap:wrap;gap:12px">',
                *self._cells(),
                "</div>",
                f"<p>the first {MAX_SHOWN} of {len(self._results):,}</p>"
                if len(self._results) > MAX_SHOWN
                else "",
            ]
        )

    def _cells(self) -> Iterator[str]:
        for image, result in list(zip(self._images, self._results, strict=True))[:MAX_SHOWN]:
            said = result.text if result.ok else f"{result.status}: {result.error}"
            color = "" if result.ok else ";color:#b3261e"
            logprob = "" if result.logprob is None else f"<br><small>{result.logprob:.2f}</small>"
            yield (
                f'<figure style="margin:0;width:{SIZE_PX}px">{_picture(image)}'
                f'<figcaption style="overflow-wrap:anywhere{color}">{html.escape(said or "")}{logprob}'
                "</figcaption></figure>"
            )


def _picture(image: ImageLike) -> str:
    """Return an image as an element that holds its own bytes, or a gray square if there is none."""
    try:
        pixels = to_pixels(image.pixels if isinstance(image, EncodedImage) else image, SIZE_PX)
    except RequestRefused:
        return f'<div style="width:{SIZE_PX}px;height:{SIZE_PX}px;background:#ccc"></div>'
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=85)
    return (
        f'<img width="{SIZE_PX}" src="data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}">'
    )
