"""Images as clients send them, turned into pictures an engine can trust.

A picture is refused by the pixel count in its header, before anything is decompressed, so a
decompression bomb costs nothing.
"""

from __future__ import annotations

import base64
import binascii
import io
import threading
import warnings
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass

from PIL import Image, ImageOps

from protocol.errors import BadImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")

SLENDERNESS = 200
"""How many times longer than the other a side may be: processors scale by the shorter one, so a
line of a few bytes would become gigabytes."""


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


def decode(
    images: Sequence[str], *, max_pixels: int, cancelled: threading.Event | None = None
) -> list[Picture]:
    """Decode base64 or ``data:`` URIs; blocking, so call it in a thread.

    Raises:
        BadImage: one of them is not a complete image of a known format, or has too many pixels,
            or is a mere line; or ``cancelled`` was set meanwhile.
    """
    event = cancelled or threading.Event()
    return [_decode(image, number, max_pixels, event) for number, image in enumerate(images, 1)]


class _File(io.BytesIO):
    """Pillow decodes between reads, so these are where a decoding can end early."""

    def __init__(self, data: bytes, cancelled: threading.Event) -> None:
        super().__init__(data)
        self._cancelled = cancelled

    def read(self, size: int | None = -1, /) -> bytes:
        if self._cancelled.is_set():
            raise OSError("nobody waits for this picture any more")
        return super().read(size)


def _decode(image: str, number: int, max_pixels: int, cancelled: threading.Event) -> Picture:
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
            opened = Image.open(_File(data, cancelled), formats=FORMATS)
        # Who refuses a picture is kept for a while by its traceback; the pixels are not.
        with closing(opened):
            _check_size(opened.size, number, max_pixels)
            ImageOps.exif_transpose(opened, in_place=True)
            pixels = opened.convert("RGB")
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


def _check_size(size: tuple[int, int], number: int, max_pixels: int) -> None:
    """Raises BadImage: too many pixels, or a mere line."""
    width, height = size
    if width * height > max_pixels:
        raise BadImage(
            f"Image {number} has {width} x {height} pixels; this worker takes {max_pixels}.",
            remedy="Scale it down before sending it.",
        )
    if max(width, height) > SLENDERNESS * min(width, height):
        raise BadImage(
            f"Image {number} has {width} x {height} pixels; one side may be {SLENDERNESS} "
            "times the other at most.",
            remedy="Cut it into parts, or add a border.",
        )
