"""Lines over the last three minutes as SVG: they take the page's colours, dark or light."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

WIDTH, HEIGHT, LEFT, TOP, BOTTOM = 460, 150, 42, 8, 18
COLOURS = ("var(--ac)", "var(--am)")

Values = Sequence[float | None]


def ceiling(value: float) -> float:
    """The round number above ``value`` at which an axis ends."""
    if value <= 0:
        return 1.0
    power: float = 10.0 ** math.floor(math.log10(value))
    return next(k * power for k in (1, 2, 4, 6, 8, 10, 20) if k * power >= value * 1.02)


def lines(
    title: str, names: Sequence[str], series: Sequence[Values], say: Callable[[float], str],
    *, slots: int, filled: bool = False, least: float = 0.0,
) -> str:  # fmt: skip
    """A chart; each of ``series`` is right-aligned in ``slots`` places, ``None`` is a gap.

    Its axis ends at ``least`` or above.
    """
    largest = max((v for values in series for v in values if v is not None), default=0.0)
    top = max(least, ceiling(largest))

    def x(place: float) -> float:
        return LEFT + (WIDTH - LEFT - 4) * place / max(1, slots - 1)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(value, top) / top)

    drawn = []
    for share in (0, 0.25, 0.5, 0.75, 1):
        at = y(top * share)
        drawn.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 4}" y1="{at:.1f}" y2="{at:.1f}" '
            'stroke="var(--ln)" stroke-width="1"/>'
        )
        if share in (0, 0.5, 1):
            drawn.append(
                f'<text x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">'
                f"{say(top * share)}</text>"
            )
    for place, text, anchor in ((0.0, "3 min ago", "start"), (slots - 1.0, "now", "end")):
        drawn.append(
            f'<text x="{x(place):.0f}" y="{HEIGHT - 2}" text-anchor="{anchor}">{text}</text>'
        )
    for values, colour in zip(series, COLOURS, strict=False):
        for stretch in _stretches(values, slots):
            points = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in stretch)
            if filled:
                first, last = x(stretch[0][0]), x(stretch[-1][0])
                drawn.append(
                    f'<polygon points="{first:.1f},{y(0):.1f} {points} {last:.1f},{y(0):.1f}" '
                    f'fill="{colour}" opacity=".09"/>'
                )
            drawn.append(
                f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.75" '
                'stroke-linejoin="round" stroke-linecap="round"/>'
            )
    now = " and ".join(
        f"{name} {say(values[-1]) if values and values[-1] is not None else 'unknown'}"
        for name, values in zip(names, series, strict=True)
    )
    legend = "".join(
        f'<span><i style="background:{colour}"></i>{escape(name)}</span>'
        for name, colour in zip(names, COLOURS, strict=False)
    )
    return (
        f'<div class="ch"><h2>{escape(title)}<span>{legend}</span></h2>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{escape(title)}, now: {escape(now)}">{"".join(drawn)}</svg></div>'
    )


def _stretches(values: Values, slots: int) -> list[list[tuple[int, float]]]:
    """The runs of values without a gap, each with its places; a lone value gets a width."""
    found: list[list[tuple[int, float]]] = [[]]
    for place, value in enumerate(values, start=slots - len(values)):
        if value is None:
            found.append([])
        else:
            found[-1].append((place, value))
    return [run if len(run) > 1 else [*run, (run[0][0] + 1, run[0][1])] for run in found if run]
