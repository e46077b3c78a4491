"""Tokens a second and time to the first token, with one batch and with a thread a request."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from rich.table import Table

from bench.client import Asked, Client, body_of
from bench.pool import drawn_picture
from bench.processes import Harness, ProcessFailed, Running, is_batched, tail
from bench.rates import Measured, measured, shown_rate, shown_ratio, shown_ttft, summary
from bench.results import Keep, record, spread
from protocol.messages import GenerateRequest

ON, OFF = "on", "off"
PROMPT = "Count from 1 to 100."  # the embedded model answers it with 101 tokens, picture or not
ALSO_WITHOUT = 2  # a level for threads alone: their best is often near the number of cores


def plan(round_number: int, levels: Sequence[int]) -> Iterator[tuple[int, str]]:
    """The measurements of a round: level and worker, who goes first taking turns."""
    order = (ON, OFF) if round_number % 2 == 0 else (OFF, ON)
    for level in sorted({*levels, ALSO_WITHOUT}):
        for name in order:
            if name == OFF or level in levels:
                yield level, name


def bodies(model: str, number: int, *, tokens: int, pictures: bool) -> list[bytes]:
    """Greedy requests for ``tokens`` tokens; with ``pictures`` every second one has one."""
    made = []
    for index in range(number):
        seen = pictures and index % 2 == 1
        request = GenerateRequest.model_validate(
            {
                "model": model,
                "messages": [{"role": "user", "content": "<image>" * seen + PROMPT}],
                "images": [drawn_picture(index, (336, 336))] if seen else [],
                "temperature": 0,
                "max_new_tokens": tokens,
            }
        )
        made.append(body_of(request))
    return made


def figures(rounds: Sequence[dict[tuple[int, str], Measured]]) -> dict[str, Any]:
    """Medians over complete rounds, ratios within a round, and the threads' own best level.

    Raises:
        ValueError: there is no round.
    """
    if not rounds:
        raise ValueError("no round was completed")
    by_key = defaultdict(list)
    for done in rounds:
        for key, found in done.items():
            by_key[key].append(found)
    best = max(
        (level for level, name in by_key if name == OFF),
        key=lambda level: statistics.median(found.rate for found in by_key[level, OFF]),
    )
    levels = {}
    for level in sorted({level for level, _ in by_key}):
        entry: dict[str, Any] = {
            name: summary(by_key[level, name]) for name in (ON, OFF) if (level, name) in by_key
        }
        if ON in entry:
            both = [(done[level, ON], done[level, OFF]) for done in rounds]
            entry["ratio"] = spread([on.rate / off.rate for on, off in both])
            entry["ratio_to_best"] = spread(
                [done[level, ON].rate / done[best, OFF].rate for done in rounds]
            )
        levels[str(level)] = entry
    return {"rounds": len(rounds), "best_level_off": best, "levels": levels}


def run(
    harness: Harness,
    keep: Keep,
    *,
    levels: Sequence[int],
    rounds: int,
    requests: int,
    tokens: int,
) -> None:
    """Measure, print, and keep the lines of results; Ctrl-C keeps the complete rounds.

    Raises:
        ProcessFailed: a worker did not start, or answers nothing.
    """
    # No request may be refused: the same doors for both.
    flags = ("--limit-model-concurrency", str(max(*levels, ALSO_WITHOUT)), "--max-wait-s", "600")
    with (
        harness.worker("--batching", "auto", *flags) as on,
        harness.worker("--batching", "off", *flags) as off,
        Client() as client,
    ):
        status = on.status()
        batched = is_batched(harness, on)
        sets = ["text", *(["pictures"] if status.capabilities.images else [])]
        for name in sets:
            done, interrupted = _rounds(
                harness,
                client,
                {ON: on, OFF: off},
                bodies(
                    status.model_names[0],
                    max(*levels, ALSO_WITHOUT),
                    tokens=tokens,
                    pictures=name == "pictures",
                ),
                *(levels, rounds, requests, name),
            )
            if done:
                found = {"set": name, "max_new_tokens": tokens, **figures(done)}
                harness.console.print(table(found))
                how = {
                    "precision": status.precision,
                    "batched": batched,
                    "interrupted": interrupted,
                }
                keep(record("hf_speed", status, how | found))
            if interrupted:
                raise KeyboardInterrupt


def _rounds(
    harness: Harness,
    client: Client,
    workers: dict[str, Running],
    asked: Sequence[bytes],
    levels: Sequence[int],
    rounds: int,
    requests: int,
    name: str,
) -> tuple[list[dict[tuple[int, str], Measured]], bool]:
    """The complete rounds after one that warms up, and whether Ctrl-C ended them.

    Raises:
        ProcessFailed: a worker answers nothing.
    """
    done = []
    try:
        steps = [(number, *step) for number in range(rounds + 1) for step in plan(number, levels)]
        found: dict[tuple[int, str], Measured] = {}
        for number, level, which in harness.track(steps, f"speed, {name}"):
            waves = -(-requests // level) if number else 1
            wave = [Asked(body) for body in asked[:level]]
            answers = [client.together(workers[which].address, wave) for _ in range(waves)]
            try:
                found[level, which] = measured(answers)
            except ValueError as exc:
                why = f"No answer came from {workers[which].address}: {answers[0][0].message}"
                raise ProcessFailed(f"{why}\n{tail(workers[which].log)}") from exc
            if len(found) == len(steps) // (rounds + 1):
                if number:
                    done.append(found)
                found = {}
    except KeyboardInterrupt:
        return done, True
    return done, False


def table(found: dict[str, Any]) -> Table:
    """The figures for people: median (least to most) over the rounds."""
    title = f"{found['set']}: tokens/s of all requests together, {found['rounds']} rounds"
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("at once", justify="right")
    columns = ("batch", "threads", "ratio", "to best", "TTFT batch", "TTFT threads")
    for column in (*columns, "short, failed"):
        drawn.add_column(column, justify="right")
    for level, entry in found["levels"].items():
        sides = [entry[name] for name in (ON, OFF) if name in entry]
        drawn.add_row(
            level,
            *(shown_rate(entry.get(name)) for name in (ON, OFF)),
            *(shown_ratio(entry.get(name)) for name in ("ratio", "ratio_to_best")),
            *(shown_ttft(entry.get(name)) for name in (ON, OFF)),
            ", ".join(str(sum(side[name] for side in sides)) for name in ("short", "failed")),
        )
    best = found["best_level_off"]
    drawn.caption = f"median (least-most); TTFT in ms: median, 95 %; threads are best at {best}"
    return drawn
