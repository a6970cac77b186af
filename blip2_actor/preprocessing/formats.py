"""The formats that are read, and the plugins of Pillow that read them.

The content decides, never a file's extension. Pillow's other plugins stay unused, because some of them run
other programs.
"""

from __future__ import annotations

# Importing a plugin registers it, so that Image.open does not load Pillow's other forty plugins.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""Names as Pillow knows them."""


def import_all() -> None:
    """Import what Pillow imports while it reads these formats; a process without files cannot do it later."""
    Image.preinit()
    from PIL import ImageCms, ImageColor, ImagePalette, MpoImagePlugin  # noqa: F401
