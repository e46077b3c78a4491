"""Pictures from strangers."""

from __future__ import annotations

import base64
import io
import random
import threading

import pytest
from PIL import Image

from protocol.errors import BadImage
from tests.pictures import encoded, picture
from workers.images import decode

LIMIT = 1_000_000


def test_a_data_uri_and_plain_base64_are_the_same_picture() -> None:
    plain = encoded(picture())
    wrapped = "data:image/png;base64," + plain[:40] + "\n" + plain[40:]
    a, b = decode([plain, wrapped], max_pixels=LIMIT)
    assert a.pixels.tobytes() == b.pixels.tobytes() == picture().tobytes()


def test_the_png_that_leaves_has_the_same_pixels() -> None:
    (one,) = decode([encoded(picture())], max_pixels=LIMIT)
    assert Image.open(io.BytesIO(one.png())).tobytes() == one.pixels.tobytes()


def test_a_photograph_is_turned_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees to display
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    (one,) = decode([base64.b64encode(buffer.getvalue()).decode()], max_pixels=LIMIT)
    assert one.pixels.size == (20, 40)


def test_too_many_pixels_are_refused_with_both_numbers() -> None:
    big = encoded(Image.new("1", (1200, 1000)), "PNG")
    with pytest.raises(BadImage, match=r"Image 2 has 1200 x 1000 pixels.* takes 1000000"):
        decode([encoded(picture()), big], max_pixels=LIMIT)


@pytest.mark.parametrize(
    "image",
    [
        "",
        "=",
        "data:image/png;base64",
        "data:image/png,rawbytes",
        "file:///etc/passwd",
        "https://127.0.0.1/a.png",
        base64.b64encode(b"%PDF-1.7").decode(),
        base64.b64encode(b"<svg xmlns='http://www.w3.org/2000/svg'/>").decode(),
    ],
    ids=lambda image: image[:24] or "empty",
)
def test_what_is_no_picture_is_a_bad_image(image: str) -> None:
    with pytest.raises(BadImage):
        decode([image], max_pixels=LIMIT)


def test_mutated_pictures_are_decoded_or_refused_and_nothing_else() -> None:
    source = random.Random(3)
    for image_format in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        good = base64.b64decode(encoded(picture(size=48), image_format))
        for _ in range(60):
            data = bytearray(good)
            for _ in range(source.randrange(1, 6)):
                data[source.randrange(len(data))] = source.randrange(256)
            text = base64.b64encode(bytes(data[: source.randrange(1, len(data) + 1)])).decode()
            try:
                (one,) = decode([text], max_pixels=LIMIT)
            except BadImage:
                continue
            assert one.pixels.mode == "RGB"


def test_a_decoding_nobody_waits_for_ends_at_its_next_read() -> None:
    cancelled = threading.Event()
    cancelled.set()
    with pytest.raises(BadImage):
        decode([encoded(picture())], max_pixels=LIMIT, cancelled=cancelled)


def test_a_line_is_refused() -> None:
    """A processor that makes the shorter side 336 pixels would make 600 million of it."""
    with pytest.raises(BadImage, match="1 x 5000"):
        decode([encoded(Image.new("RGB", (1, 5000)))], max_pixels=LIMIT)
    assert decode([encoded(Image.new("RGB", (10, 2000)))], max_pixels=LIMIT)


def test_a_refused_picture_keeps_no_pixels() -> None:
    """Its error, and with it the frames it has been through, may live on for a while."""
    data = base64.b64decode(encoded(picture(size=200), "BMP"))
    with pytest.raises(BadImage) as caught:
        decode([base64.b64encode(data[:-1000]).decode()], max_pixels=LIMIT)
    frame = caught.value.__traceback__
    while frame is not None and "opened" not in frame.tb_frame.f_locals:
        frame = frame.tb_next
    assert frame is not None
    with pytest.raises(ValueError, match="closed"):
        frame.tb_frame.f_locals["opened"].getpixel((0, 0))
