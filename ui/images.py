"""Pictures that people attach: checked once when they come, encoded once when they are sent."""

from __future__ import annotations

import base64
import hashlib
import io
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

MEDIA_TYPES = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "GIF": "image/gif",
    "BMP": "image/bmp",
}
MAX_PIXELS = 100_000_000
SHRUNK_SIDE = 2048


class NotAnImage(Exception):
    """The message says what it is not."""


@dataclass(frozen=True, slots=True)
class Picture:
    """An attached image that a worker can read."""

    name: str
    data: bytes
    media_type: str
    width: int
    height: int

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()


def read(name: str, data: bytes) -> Picture:
    """The picture of a file; only its head is looked at.

    Raises:
        NotAnImage: it is none of the formats workers read, or has too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the pixels; they are counted here
            image = Image.open(io.BytesIO(data), formats=list(MEDIA_TYPES))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise NotAnImage(
            f"“{name}” is not an image the workers read: use PNG, JPEG, WebP, GIF or BMP."
        ) from None
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise NotAnImage(
            f"“{name}” has {width} × {height} pixels; {MAX_PIXELS // 1_000_000} million are the "
            "most. Attach a smaller copy."
        )
    return Picture(name, data, MEDIA_TYPES[image.format or "PNG"], width, height)


def shrink(picture: Picture, limit_bytes: int) -> Picture:
    """A copy that is small enough to send; slow, so to be called in a thread.

    Raises:
        NotAnImage: it cannot be decoded, or not be made that small.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(picture.data)))
            image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise NotAnImage(f"“{picture.name}” is damaged and cannot be shrunk.") from None
    side = SHRUNK_SIDE
    while side >= 64:
        small = image.copy()
        small.thumbnail((side, side))
        out = io.BytesIO()
        small.save(out, "WEBP", quality=90)
        if out.tell() <= limit_bytes:
            return Picture(picture.name, out.getvalue(), "image/webp", *small.size)
        side //= 2
    raise NotAnImage(f"“{picture.name}” cannot be made smaller than {limit_bytes} bytes.")


def encoded(data: bytes) -> str:
    """As requests carry it."""
    return base64.b64encode(data).decode()
