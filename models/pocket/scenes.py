"""Pictures with known content: one to four coloured shapes on a plain background.

A scene is drawn from a ``random.Random`` alone, so that a seed is a data set.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from io import BytesIO
from random import Random

from PIL import Image, ImageDraw

Color = tuple[int, int, int]

# Several tints per name: people who say "green" do not agree on one. Gray is a background only.
COLORS: dict[str, tuple[Color, ...]] = {
    "red": ((255, 0, 0), (220, 20, 40), (230, 57, 70)),
    "green": ((0, 128, 0), (0, 180, 0), (40, 170, 70), (0, 230, 0)),
    "blue": ((0, 0, 255), (30, 80, 230), (30, 100, 200)),
    "yellow": ((255, 255, 0), (250, 225, 30), (255, 215, 0)),
    "orange": ((255, 165, 0), (255, 140, 0), (250, 120, 20)),
    "purple": ((128, 0, 128), (120, 40, 180), (150, 50, 200)),
    "pink": ((255, 192, 203), (255, 105, 180), (255, 150, 190)),
    "brown": ((139, 69, 19), (120, 70, 30), (101, 67, 33)),
    "black": ((0, 0, 0), (15, 15, 15)),
    "white": ((255, 255, 255), (245, 245, 245)),
}
BACKGROUNDS: dict[str, tuple[Color, ...]] = {
    "white": ((255, 255, 255), (250, 250, 248)),
    "gray": ((128, 128, 128), (150, 150, 150), (180, 180, 180), (200, 200, 200)),
    "black": ((0, 0, 0), (20, 20, 20)),
}
SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
MAX_THINGS = 4

_GAP = 0.02  # between the circles around two things, of the picture's side
_OUTLINED = 0.12  # share of things with a black outline
_SUPERSAMPLING = 2


@dataclass(frozen=True, slots=True)
class Thing:
    """A coloured shape; the circle around it has its centre at ``x``, ``y`` and this ``radius``.

    ``x`` is a share of the picture's width, ``y`` of its height, ``radius`` of its shorter side.
    """

    shape: str
    color: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True, slots=True)
class Scene:
    """What is in a picture; ``things`` from left to right."""

    background: str
    things: tuple[Thing, ...]


def random_scene(random: Random, *, count: int | None = None) -> Scene:
    """A scene of ``count`` things, or of one to four."""
    background = random.choices(list(BACKGROUNDS), (60, 22, 18))[0]
    count = count or random.randint(1, MAX_THINGS)
    colors = [color for color in COLORS if color != background]
    alike = random.random() < 0.45  # things that share a shape or a color make questions harder
    while True:
        things: list[Thing] = []
        for _ in range(200):  # a crowded start may leave no room: begin again
            radius = _radius(random, count)
            x, y = (random.uniform(radius + 0.01, 0.99 - radius) for _ in range(2))
            if any(
                math.hypot(x - other.x, y - other.y) < radius + other.radius + _GAP
                for other in things
            ):
                continue
            shape, color = random.choice(SHAPES), random.choice(colors)
            if alike and things and random.random() < 0.6:
                model = random.choice(things)
                what = random.random()
                shape = shape if what < 0.3 else model.shape
                color = color if 0.3 <= what < 0.7 else model.color
            things.append(Thing(shape, color, x, y, radius))
            if len(things) == count:
                return Scene(background, tuple(sorted(things, key=lambda thing: thing.x)))


def _radius(random: Random, count: int) -> float:
    if count == 1 and random.random() < 0.4:
        return random.uniform(0.14, 0.40)
    return random.uniform(0.09, 0.20 if count <= 3 else 0.17)


def draw(scene: Scene, random: Random, size: tuple[int, int] = (112, 112)) -> Image.Image:
    """Draw ``scene`` in tints that ``random`` chooses.

    Returns:
        An RGB picture of ``size`` (width, height) pixels.
    """
    scale = _SUPERSAMPLING if random.random() < 0.75 else 1  # some pictures have hard edges
    width, height = (side * scale for side in size)
    picture = Image.new("RGB", (width, height), _tint(random, BACKGROUNDS[scene.background], 5))
    pencil = ImageDraw.Draw(picture)
    for thing in scene.things:
        fill = _tint(random, COLORS[thing.color], 10)
        outlined = random.random() < _OUTLINED and scene.background != "black"
        outline = (0, 0, 0) if outlined else None
        x, y, radius = thing.x * width, thing.y * height, thing.radius * min(width, height)
        if thing.shape == "circle":
            pencil.ellipse((x - radius, y - radius, x + radius, y + radius), fill, outline)
            continue
        turn = random.gauss(0, 0.1) if random.random() < 0.5 else 0.0  # radians
        cos, sin = math.cos(turn) * radius, math.sin(turn) * radius
        corners = [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _CORNERS[thing.shape]]
        pencil.polygon(corners, fill, outline)
    return picture.reduce(scale) if scale > 1 else picture


def png(picture: Image.Image) -> bytes:
    """The file of ``picture``."""
    file = BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def _tint(random: Random, tints: tuple[Color, ...], jitter: int) -> Color:
    red, green, blue = (
        max(0, min(255, value + random.randint(-jitter, jitter))) for value in random.choice(tints)
    )
    return red, green, blue


def _ring(corners: int, start: float, *radii: float) -> list[tuple[float, float]]:
    """Corners on circles of ``radii`` in turn, from the angle ``start`` on, in a unit circle."""
    angles = (start + 2 * math.pi * index / corners for index in range(corners))
    return [
        (radii[index % len(radii)] * math.cos(angle), radii[index % len(radii)] * math.sin(angle))
        for index, angle in enumerate(angles)
    ]


_ARM = 0.34  # half the width of the cross's arms
_CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": _ring(4, math.pi / 4, 1),
    "triangle": _ring(3, -math.pi / 2, 1),
    "star": _ring(10, -math.pi / 2, 1, 0.42),
    "diamond": [(0, -1), (0.72, 0), (0, 1), (-0.72, 0)],
    "cross": [
        *((-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM), (1, _ARM), (_ARM, _ARM)),
        *((_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM), (-1, -_ARM), (-_ARM, -_ARM)),
    ],
}
