"""Images as clients send them, turned into pictures an engine can trust.

A picture is refused by the pixel count in its header, before anything is decompressed, so a
decompression bomb costs nothing.
"""

from __future__ import annotations

import base64
import binascii
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageOps

from protocol.errors import BadImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One decoded image: upright RGB pixels."""

    pixels: Image.Image

    @classmethod
    def blank(cls) -> Picture:
        """A small gray one."""
        return cls(Image.new("RGB", (64, 64), "gray"))

    def data_uri(self) -> str:
        """As a client would send it."""
        return f"data:image/png;base64,{base64.b64encode(self.png()).decode()}"

    def png(self) -> bytes:
        """The same pixels as a PNG made by us: what leaves this process is never what came in."""
        buffer = io.BytesIO()
        self.pixels.save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()


def decode(images: Sequence[str], *, max_pixels: int) -> list[Picture]:
    """Decode base64 or ``data:`` URIs; blocking, so call it in a thread.

    Raises:
        BadImage: one of them is not a complete image of a known format, or has too many pixels.
    """
    return [_decode(image, number, max_pixels) for number, image in enumerate(images, start=1)]


def _decode(image: str, number: int, max_pixels: int) -> Picture:
    if image.startswith("data:"):
        header, comma, image = image.partition(",")
        if not comma or not header.endswith(";base64"):
            raise BadImage(f"Image {number} is a data URI that is not base64.")
    elif image.startswith(("http:", "https:", "file:")):
        raise BadImage(f"Image {number} is an address; only the image itself is taken.")
    try:
        data = base64.b64decode("".join(image.split()), validate=True)
    except (binascii.Error, ValueError) as exc:
        raise BadImage(f"Image {number} is not valid base64.") from exc
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            opened = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = opened.size
        if width * height > max_pixels:
            raise BadImage(
                f"Image {number} has {width} x {height} pixels; this worker takes {max_pixels}.",
                remedy="Scale it down before sending it.",
            )
        pixels = ImageOps.exif_transpose(opened).convert("RGB")
    except BadImage:
        raise
    except Image.DecompressionBombError as exc:
        raise BadImage(
            f"Image {number} has too many pixels; this worker takes {max_pixels}.",
            remedy="Scale it down before sending it.",
        ) from exc
    except Exception as exc:  # Pillow raises about anything on mutated bytes
        raise BadImage(f"Image {number} cannot be decoded: {type(exc).__name__}.") from exc
    return Picture(pixels)
