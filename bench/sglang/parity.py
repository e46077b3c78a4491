"""The same prompts to both kinds: how many answers are the same tokens, and why the others are not.

Each kind is asked twice, one prompt at a time and eight at once: what a kind differs in from itself
is rounding that depends on the batch, and no smaller difference between the kinds can be expected.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from rich.table import Table

from bench.client import Answer, Asked, Client, body_of
from bench.processes import ROOT, Harness, ProcessFailed, Running, tail
from bench.prompts import Prompt, prompts
from bench.results import Keep, record

KINDS = ("hf", "sglang")
AT_ONCE = 8
ADAPTERS = {name: str(ROOT / "models" / "adapters" / name) for name in ("formal", "terse")}
TOP = 5  # of the likeliest tokens, to see how close the two were that differ


def run(
    harness: Harness,
    keep: Keep,
    *,
    dtypes: Sequence[str],
    adapters: bool,
    number: int,
    seed: int,
) -> None:
    """Ask, compare, print and keep a line of results for each of ``dtypes``.

    Raises:
        ProcessFailed: a worker did not start, or died.
    """
    chosen = ADAPTERS if adapters else {}
    flags = [flag for name, path in chosen.items() for flag in ("--adapter", f"{name}={path}")]
    for dtype in dtypes:
        answers: dict[str, list[Answer]] = {}
        for kind in KINDS:
            with harness.worker("--dtype", dtype, *flags, kind=kind) as worker, Client() as client:
                status = worker.status()
                asked = prompts(status.model_names[0], tuple(chosen), number=number, seed=seed)
                for at_once in (1, AT_ONCE):
                    name = f"{kind}, {at_once} at once"
                    answers[name] = _ask(harness, client, worker, asked, at_once, f"{dtype} {name}")
        found = {
            "precision": status.precision,
            "prompts": number,
            "pairs": {
                f"{one} / {other}": compared(asked, answers[one], answers[other])
                for one, other in combinations(answers, 2)
            },
        }
        harness.console.print(table(found))
        keep(record("parity", status, found))


def _ask(
    harness: Harness,
    client: Client,
    worker: Running,
    asked: Sequence[Prompt],
    at_once: int,
    words: str,
) -> list[Answer]:
    """The answers, in order.

    Raises:
        ProcessFailed: one was not answered.
    """
    bodies = [
        Asked(body_of(prompt.request.model_copy(update={"logprobs": TOP}))) for prompt in asked
    ]
    waves = [bodies[at : at + at_once] for at in range(0, len(bodies), at_once)]
    found = [
        answer
        for wave in harness.track(waves, words)
        for answer in client.together(worker.address, wave)
    ]
    for answer in found:
        if answer.end not in ("stop", "length"):
            why = f"A prompt ended by {answer.end}: {answer.message}"
            raise ProcessFailed(f"{why}\n{tail(worker.log)}")
    return found


def compared(
    asked: Sequence[Prompt], ones: Sequence[Answer], others: Sequence[Answer]
) -> dict[str, Any]:
    """How many pairs are equal, and of each other pair where and by how little it parted."""
    differences = [
        {"sort": prompt.sort, **difference}
        for prompt, one, other in zip(asked, ones, others, strict=True)
        if (difference := parting(one, other)) is not None
    ]
    margins = [found["margin"] for found in differences if found["margin"] is not None]
    return {
        "equal": len(asked) - len(differences),
        "different": len(differences),
        "unexplained": len(differences) - len(margins),
        "margin_median": statistics.median(margins) if margins else None,
        "margin_max": max(margins, default=None),
        "differences": differences,
    }


def parting(one: Answer, other: Answer) -> dict[str, Any] | None:
    """Where two answers part; ``None`` if they are equal.

    ``margin`` is how much likelier ``one`` held its own token than the other's, in nats: what
    rounding had to bridge. It is ``None`` if the other's was not among the likeliest, or if the
    answers differ in their end alone: then rounding is not the reason.
    """
    if (one.token_ids, one.text, one.end) == (other.token_ids, other.text, other.end):
        return None
    pairs = enumerate(zip(one.token_ids, other.token_ids, strict=False))
    at = next((at for at, (mine, its) in pairs if mine != its), None)
    if at is None:
        return {"at": min(len(one.token_ids), len(other.token_ids)), "margin": None}
    its = one.likeliest[at].get(other.token_ids[at]) if one.likeliest else None
    return {"at": at, "margin": None if its is None else one.logprobs[at] - its}


def as_it_must_be(line: dict[str, Any]) -> bool:
    """Whether float32 shows no difference, and other precisions none that rounding is not."""
    pairs = line["pairs"].values()
    if line["precision"] == "float32":
        return not any(pair["different"] for pair in pairs)
    return not any(pair["unexplained"] for pair in pairs)


def table(found: dict[str, Any]) -> Table:
    title = f"{found['precision']}: the same tokens for {found['prompts']} prompts"
    drawn = Table("pair", title=title, title_justify="left")
    for column in ("equal", "different", "margin", "largest", "not rounding"):
        drawn.add_column(column, justify="right")
    for name, pair in found["pairs"].items():
        drawn.add_row(
            name,
            str(pair["equal"]),
            str(pair["different"]),
            *("" if value is None else f"{value:.3f}" for value in _margins(pair)),
            str(pair["unexplained"]),
        )
    drawn.caption = "margin: how much likelier the one token was than the other, in nats: median"
    return drawn


def _margins(pair: dict[str, Any]) -> tuple[float | None, float | None]:
    return pair["margin_median"], pair["margin_max"]
