"""Pictures as nobody should send them, from a source of randomness; plain functions."""

from __future__ import annotations

import base64
import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from random import Random
from typing import Any

from PIL import Image, ImageDraw

MODES = ("RGB", "RGBA", "L", "LA", "P", "1", "I;16", "CMYK", "I", "F", "YCbCr")
ENCODERS = {
    "RGB": ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "ICO", "PPM"),
    "RGBA": ("PNG", "WEBP", "GIF", "TIFF", "ICO"),
    "L": ("PNG", "JPEG", "BMP", "GIF"),
    "LA": ("PNG", "TIFF"),
    "P": ("PNG", "GIF", "BMP"),
    "1": ("PNG", "BMP"),
    "I;16": ("PNG", "TIFF"),
    "CMYK": ("JPEG", "TIFF"),
    "I": ("TIFF",),
    "F": ("TIFF",),
    "YCbCr": ("JPEG", "TIFF"),
}
"""Pillow's formats that take a mode; the last ones of some are none that a worker takes."""

_MAGICS = (
    *(b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0\x00\x10JFIF", b"GIF89a", b"BM", b"II*\x00"),
    *(b"RIFF\xff\xff\xff\xffWEBPVP8 ", b"\x00\x00\x01\x00", b"%PDF-1.7", b"<svg xmlns", b"MZ"),
)


@dataclass(frozen=True, slots=True)
class Case:
    """An ``images`` field, and what was done to it."""

    what: str
    images: list[Any]


def drawn(rng: Random, size: tuple[int, int] | None = None) -> Image.Image:
    """A picture with something on it."""
    width, height = size or (rng.randint(1, 160), rng.randint(1, 160))
    image = Image.new("RGB", (width, height), rng.choice(("white", "gray", "black")))
    box = sorted(rng.randint(0, width) for _ in "xx") + sorted(rng.randint(0, height) for _ in "yy")
    pen = ImageDraw.Draw(image)
    pen.ellipse((box[0], box[2], box[1], box[3]), fill=rng.choice(("red", "green", "blue")))
    return image


def red_circle() -> str:
    """A picture that every worker must take, whatever came before."""
    image = Image.new("RGB", (112, 112), "white")
    ImageDraw.Draw(image).ellipse((28, 28, 84, 84), fill=(220, 40, 40))
    return text(encoded(image, "PNG"))


def encoded(image: Image.Image, image_format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def a_file(rng: Random) -> tuple[str, bytes]:
    """Some complete file, as a rule of a format that is taken."""
    mode = rng.choice(MODES)
    image = drawn(rng)
    image = image.convert("I").convert(mode) if mode in ("I;16", "F") else image.convert(mode)
    image_format = rng.choice(ENCODERS[mode])
    return f"{mode} {image_format}", encoded(image, image_format)


# ---------------------------------------------------------------- files that are wrong


def flipped(rng: Random) -> tuple[str, bytes]:
    what, data = a_file(rng)
    changed = bytearray(data)
    for _ in range(rng.choice((1, 2, 8, 50))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return f"flipped bits of {what}", bytes(changed)


def flipped_header(rng: Random) -> tuple[str, bytes]:
    what, data = a_file(rng)
    changed = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        changed[rng.randrange(min(64, len(changed)))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF))
    return f"bytes of the header of {what}", bytes(changed)


def cut(rng: Random) -> tuple[str, bytes]:
    what, data = a_file(rng)
    return f"cut {what}", data[: rng.randrange(len(data))]


def lengthened(rng: Random) -> tuple[str, bytes]:
    what, data = a_file(rng)
    at = rng.randrange(len(data))
    piece = data[at : at + rng.randint(1, 200)]
    return f"repeated piece of {what}", data[:at] + piece * rng.randint(2, 50) + data[at:]


def renamed(rng: Random) -> tuple[str, bytes]:
    what, data = a_file(rng)
    magic = rng.choice(_MAGICS)
    return f"{what} under another's header", magic + data[len(magic) :]


def noise(rng: Random) -> tuple[str, bytes]:
    return "noise behind a header", rng.choice(_MAGICS) + rng.randbytes(rng.randint(0, 4000))


def nothing(rng: Random) -> tuple[str, bytes]:
    return "next to nothing", rng.choice((b"", b"\0", b"\n", *_MAGICS))


# ---------------------------------------------------------------- sizes that are not meant


def png_chunk(kind: bytes, data: bytes) -> bytes:
    check = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


def png(width: int, height: int, pixels: bytes, *, depth: int = 8, colour: int = 2) -> bytes:
    """A PNG that says it is so large, whatever ``pixels`` (compressed) hold."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", pixels), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*chunk) for chunk in chunks)


def checked(rng: Random) -> tuple[str, bytes]:
    """A PNG with wrong bytes whose checksums are right, so that they are looked at."""
    data = encoded(drawn(rng).convert(rng.choice(("RGB", "P", "LA", "1"))), "PNG")
    made, at = data[:8], 8
    while at < len(data):
        (length,) = struct.unpack(">I", data[at : at + 4])
        kind, inside = data[at + 4 : at + 8], bytearray(data[at + 8 : at + 8 + length])
        if inside and rng.random() < 0.5:
            inside[rng.randrange(len(inside))] = rng.choice((0, 1, 2, 7, 0x80, 0xFF))
        if rng.random() < 0.1:
            kind = rng.choice((b"IDAT", b"PLTE", b"tRNS", b"eXIf", b"fdAT", b"acTL", b"IHDR"))
        made += png_chunk(kind, bytes(inside)) * rng.choice((1, 1, 1, 1, 2))
        at += 12 + length
    return "PNG with wrong bytes and right checksums", made


def declared(rng: Random) -> tuple[str, bytes]:
    """Few bytes that say they are a picture of up to 2**31 x 2**31."""
    sizes = (0, 1, 7071, 10_000, 65_535, 100_000, 2**31 - 1)
    width, height = rng.choice(sizes), rng.choice(sizes)
    small = zlib.compress(rng.randbytes(64))
    kind = rng.choice(("PNG", "BMP", "GIF", "JPEG"))
    if kind == "PNG":
        depth, colour = rng.choice(((8, 2), (16, 6), (1, 0), (8, 3), (3, 7)))
        data = png(width, height, small, depth=depth, colour=colour)
    elif kind == "BMP":
        bmp = bytearray(encoded(drawn(rng), "BMP"))
        bmp[18:26] = struct.pack("<ii", width, rng.choice((height, -height)))
        data = bytes(bmp)
    elif kind == "GIF":
        gif = bytearray(encoded(drawn(rng), "GIF"))
        gif[6:10] = struct.pack("<HH", width & 0xFFFF, height & 0xFFFF)
        data = bytes(gif)
    else:
        jpeg = bytearray(encoded(drawn(rng), "JPEG"))
        at = jpeg.find(b"\xff\xc0")
        jpeg[at + 5 : at + 9] = struct.pack(">HH", height & 0xFFFF, width & 0xFFFF)
        data = bytes(jpeg)
    return f"{kind} that declares {width} x {height}", data


@cache
def _zeros(megabytes: int) -> bytes:
    packer = zlib.compressobj(9)
    block = bytes(1 << 20)
    return b"".join(packer.compress(block) for _ in range(megabytes)) + packer.flush()


def bomb(rng: Random) -> tuple[str, bytes]:
    """A small file that would become a large picture, or a large something else."""
    kind = rng.choice(("pixels", "more than declared", "text", "profile"))
    if kind == "pixels":
        side = rng.choice((5000, 7000, 7072, 12_000))
        return f"bomb of {side} x {side}", png(side, side, _zeros(side * (side * 3 + 1) >> 20))
    if kind == "more than declared":
        return "bomb of more pixels than declared", png(8, 8, _zeros(256))
    chunk = {
        "text": png_chunk(b"zTXt", b"Comment\0\0" + _zeros(256)),
        "profile": png_chunk(b"iCCP", b"icc\0\0" + _zeros(256)),
    }[kind]
    data = encoded(drawn(rng), "PNG")
    return f"bomb of {kind}", data[:33] + chunk * rng.randint(1, 4) + data[33:]


def line(rng: Random) -> tuple[str, bytes]:
    length = rng.choice((1, 2, 199, 201, 5000, 60_000))
    size = (1, length) if rng.random() < 0.5 else (length, 1)
    image_format = rng.choice(("PNG", "BMP", "JPEG", "GIF"))
    return f"line of {size[0]} x {size[1]} {image_format}", encoded(drawn(rng, size), image_format)


# ---------------------------------------------------------------- rare, and right


def animated(rng: Random) -> tuple[str, bytes]:
    image_format = rng.choice(("GIF", "WEBP", "PNG"))
    size = (rng.randint(1, 80), rng.randint(1, 80))
    first, *others = (drawn(rng, size) for _ in range(rng.randint(2, 8)))
    data = encoded(first, image_format, save_all=True, append_images=others, duration=50)
    return f"animated {image_format}", data


def turned(rng: Random) -> tuple[str, bytes]:
    """With an EXIF orientation, or what is none."""
    exif = Image.Exif()
    exif[0x0112] = value = rng.choice((0, 1, 3, 5, 6, 8, 9, 65_535))
    raw = exif.tobytes()
    if rng.random() < 0.5:
        broken = bytearray(raw)
        for _ in range(rng.randint(1, 6)):
            broken[rng.randrange(6, len(broken))] = rng.randrange(256)
        raw = bytes(broken)
    image_format = rng.choice(("JPEG", "PNG", "WEBP"))
    return f"{image_format} turned by {value}", encoded(drawn(rng), image_format, exif=raw)


FILES: dict[Callable[[Random], tuple[str, bytes]], int] = {
    **{a_file: 10, flipped: 20, flipped_header: 15, cut: 12, lengthened: 6, renamed: 6},
    **{checked: 10, noise: 5, nothing: 2, declared: 10, bomb: 1, line: 4, animated: 4, turned: 8},
}
"""What makes a file, and how often."""


# ---------------------------------------------------------------- text around the file


def plain(_: Random, encoded_file: str) -> str:
    return encoded_file


def bad_alphabet(rng: Random, encoded_file: str) -> str:
    at = rng.randrange(len(encoded_file) + 1)
    wrong = rng.choice(("-", "_", "!", "\0", "é", "☃", "\ud83d", "%2B", "\u2028", '"', "="))
    return encoded_file[:at] + wrong * rng.randint(1, 3) + encoded_file[at:]


def spaced(rng: Random, encoded_file: str) -> str:
    every = rng.choice((1, 4, 76))
    space = rng.choice(("\n", "\r\n", " ", "\t", "\u00a0", "\u3000"))
    return space.join(encoded_file[at : at + every] for at in range(0, len(encoded_file), every))


def unpadded(rng: Random, encoded_file: str) -> str:
    bare = encoded_file.rstrip("=")
    return rng.choice((bare, bare + "=", bare + "===", bare[:-1], "=" + bare))


def data_uri(rng: Random, encoded_file: str) -> str:
    kind = rng.choice(("png", "jpeg", "svg+xml", "", "png;charset=utf-8", "x" * 5000))
    return f"data:image/{kind};base64,{encoded_file}"


def wrong_uri(rng: Random, encoded_file: str) -> str:
    form = rng.choice(
        (
            *("data:", "data:,{0}", "data:image/png,{0}", "data:;base64,{0}", "data:;base64;{0}"),
            *(
                "DATA:image/png;base64,{0}",
                "data:image/png;base64{0}",
                " data:image/png;base64,{0}",
            ),
            *("data:text/html;base64,{0}", "data:image/png;base64,data:image/png;base64,{0}"),
            *("http://127.0.0.1:9/{0}", "https://example.invalid/a.png", "file:///etc/passwd"),
            *("/etc/passwd", "ftp://example.invalid/a", "gopher:", "image", "blob:{0}"),
        )
    )
    return form.format(encoded_file)


TEXTS: dict[Callable[[Random, str], str], int] = {
    **{plain: 60, data_uri: 15},
    **{bad_alphabet: 6, spaced: 5, unpadded: 6, wrong_uri: 8},
}
"""What is done to a file's base64, and how often."""

HUGE_BYTES = 50 << 20


def images(rng: Random) -> Case:
    """The ``images`` of one request."""
    chance = rng.random()
    if chance < 0.002:
        return Case("50 MB of base64", ["A" * HUGE_BYTES])
    if chance < 0.02:
        odd: list[Any] = [None, 7, True, {}, {"url": red_circle()}, [red_circle()], ""]
        return Case("no text", [rng.choice(odd)])
    made = [_image(rng) for _ in range(rng.choice((1, 1, 1, 1, 2, 3)))]
    return Case("; ".join(what for what, _ in made), [image for _, image in made])


def _image(rng: Random) -> tuple[str, str]:
    (make,) = rng.choices(list(FILES), list(FILES.values()))
    what, data = make(rng)
    (spell,) = rng.choices(list(TEXTS), list(TEXTS.values()))
    spelt = spell(rng, text(data))
    name = spell.__name__.replace("_", " ")
    return (what if name == "plain" else f"{what}, {name}"), spelt
