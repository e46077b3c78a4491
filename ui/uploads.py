"""Files between the composer and the database; everything here blocks."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from pathlib import Path

from ui import images, states
from ui.settings import UiSettings


def attached(
    settings: UiSettings, files: Sequence[str], shrink: bool
) -> tuple[list[images.Picture], str | None]:
    """The images of a message, or the card that says why they cannot be sent."""
    if len(files) > settings.max_images:
        return [], states.not_sent(
            f"{len(files)} images are too many",
            f"One message may have {settings.max_images}. Remove some; your text is kept.",
        )
    found = []
    try:
        for file in files:
            path = Path(file)
            picture = images.read(path.name, path.read_bytes())
            size = len(picture.data)
            if size > settings.max_image_bytes:
                if not shrink:
                    return [], states.too_large(path.name, size, settings.max_image_bytes)
                picture = images.shrink(picture, settings.max_image_bytes)
            found.append(picture)
    except images.NotAnImage as exc:
        return [], states.not_sent("This file cannot be sent", str(exc))
    except OSError:
        return [], states.not_sent("An upload is gone", "Attach the image again, then send.")
    return found, None


def unpack(folder: Path, name: str, data: bytes) -> str:
    """A file of an image below ``folder``, for the composer."""
    place = folder / secrets.token_hex(16)
    place.mkdir(parents=True)
    path = place / (Path(name).name or "image")
    path.write_bytes(data)
    return str(path)
