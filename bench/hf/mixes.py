"""Random mixes of requests: an answer may not depend on who shares its batch.

What is expected comes from a worker without a batch, one request at a time.
"""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bench.client import Answer, Asked, Client, body_of
from bench.pool import Case, cases
from bench.processes import Harness, Running, is_batched
from bench.results import Keep, record

SMALLEST, LARGEST = 2, 8
LEAVE = 0.15  # the share of clients that leave early
LOGPROBS_AGREE = 1e-3  # in float32; rounding alone makes about 1e-5


@dataclass(frozen=True, slots=True)
class Member:
    """A place in a mix: which case, when it comes, and how long its client stays at most."""

    case: int
    delay_s: float
    leave_s: float | None


def drawn_mix(rng: random.Random, durations_s: Sequence[float]) -> list[Member]:
    """A random mix of cases that last ``durations_s`` alone."""
    typical_s = statistics.median(durations_s)
    return [
        Member(
            case=(case := rng.randrange(len(durations_s))),
            delay_s=rng.uniform(0, typical_s),
            leave_s=rng.uniform(0, 3 * durations_s[case]) if rng.random() < LEAVE else None,
        )
        for _ in range(rng.randint(SMALLEST, LARGEST))
    ]


def difference(expected: Answer, got: Answer, *, logprobs_agree: float) -> str:
    """What is wrong with ``got``, in a few words; nothing if it is as ``expected``.

    Of an answer whose client left, what came until then must be right. Logprobs may differ by
    ``logprobs_agree``.
    """
    left = got.end == "left"
    ids = expected.token_ids[: len(got.token_ids)] if left else expected.token_ids
    if got.token_ids != ids:
        pairs = zip(expected.token_ids, got.token_ids, strict=False)
        at = next((i for i, (want, have) in enumerate(pairs) if want != have), None)
        if at is not None:
            return f"token {at} is {got.token_ids[at]}, not {expected.token_ids[at]}"
        if left or got.end == expected.end:
            return f"{len(got.token_ids)} tokens, not {len(expected.token_ids)}"
    if not left and got.end != expected.end:
        return f"it ended by {got.end}, not {expected.end}. {got.message}".strip()
    text = expected.text[: len(got.text)] if left else expected.text
    if got.text != text:
        return f"its text is {got.text!r}, not {text!r}"
    if len(got.logprobs) != (len(ids) if expected.logprobs else 0):
        return f"{len(got.logprobs)} logprobs for {len(ids)} tokens"
    apart = [abs(want - have) for want, have in zip(expected.logprobs, got.logprobs, strict=False)]
    if max(apart, default=0.0) > logprobs_agree:
        return f"the logprob of token {apart.index(max(apart))} differs by {max(apart):.2g}"
    return ""


def beside_others(answers: Sequence[Answer]) -> int:
    """How many of ``answers`` got tokens while another one did, too."""
    spans = [(min(a.token_at), max(a.token_at)) for a in answers if a.token_at]
    return sum(
        any(first <= end and begin <= last for i, (begin, end) in enumerate(spans) if i != own)
        for own, (first, last) in enumerate(spans)
    )


def run(
    harness: Harness,
    keep: Keep,
    *,
    dtypes: Sequence[tuple[str, int]],
    adapters: dict[str, str],
    seed: int,
) -> None:
    """Play mixes for each of ``dtypes`` (with how many), print, and keep the lines of results.

    Args:
        adapters: path by name, of those the requests may choose.

    Raises:
        ProcessFailed: a worker did not start, or died.
    """
    flags = [f for name, path in adapters.items() for f in ("--adapter", f"{name}={path}")]
    for dtype, number in dtypes:
        if not number:
            continue
        precision = ("--dtype", dtype, *flags)
        with Client() as client:
            with harness.worker("--batching", "off", *precision) as alone:
                pool = cases(alone.status(), tuple(adapters), seed)
                expected, unsteady = _expected(harness, client, alone, pool)
            with harness.worker("--batching", "auto", *precision) as batched:
                status, is_one = batched.status(), is_batched(harness, batched)
                found = _play(harness, client, batched, pool, expected, number, seed, dtype)
        found = {
            "precision": status.precision,
            "batched": is_one,
            "reference_unsteady": unsteady,
            **found,
        }
        if found["mixes"]:
            harness.console.print(table(found))
            keep(record("hf_mixes", status, found))
        if found["interrupted"]:
            raise KeyboardInterrupt


def _expected(
    harness: Harness, client: Client, worker: Running, pool: Sequence[Case]
) -> tuple[list[Answer], int]:
    """The answers of a worker without a batch, and how many differ when asked again."""
    expected = []
    unsteady = 0
    for case in harness.track(pool, "answers alone"):
        body = body_of(case.request)
        answer, again = client.one(worker.address, body), client.one(worker.address, body)
        if differs := difference(answer, again, logprobs_agree=LOGPROBS_AGREE):
            unsteady += 1
            say = f"the reference answers {case.sort} in two ways: {differs}"
            harness.console.print(say, markup=False)
        expected.append(answer)
    return expected, unsteady


def _play(
    harness: Harness,
    client: Client,
    worker: Running,
    pool: Sequence[Case],
    expected: Sequence[Answer],
    number: int,
    seed: int,
    precision: str,
) -> dict[str, Any]:
    """Mixes until there are ``number`` of them or Ctrl-C.

    Raises:
        ProcessFailed: the worker died.
    """
    logprobs_agree = LOGPROBS_AGREE if precision == "float32" else math.inf
    rng = random.Random(seed)
    bodies = [body_of(case.request) for case in pool]
    durations_s = [answer.ended_at - answer.sent_at for answer in expected]
    done = asked = left = together = tokens = 0
    mismatches: list[dict[str, Any]] = []
    interrupted = False
    try:
        for mix_number in harness.track(range(number), f"mixes in {precision}"):
            mix = drawn_mix(rng, durations_s)
            requests = [Asked(bodies[m.case], m.delay_s, m.leave_s) for m in mix]
            answers = client.together(worker.address, requests)
            for place, (member, got) in enumerate(zip(mix, answers, strict=True)):
                asked += 1
                left += got.end == "left"
                tokens += len(got.token_ids)
                what = difference(expected[member.case], got, logprobs_agree=logprobs_agree)
                if what:
                    sort = pool[member.case].sort
                    mismatch = {"mix": mix_number, "place": place, "sort": sort, "what": what}
                    mismatches.append(mismatch | {"case": member.case})
                    harness.console.print(
                        f"mix {mix_number}: case {member.case} ({sort}) beside "
                        f"{[pool[m.case].sort for m in mix]}: {what}",
                        markup=False,
                    )
            together += beside_others(answers)
            if any(got.end == "upstream_lost" for got in answers):
                worker.status()  # raises if it has died
            done += 1
    except KeyboardInterrupt:
        interrupted = True
    return {
        "mixes": done,
        "requests": asked,
        "distinct": len(pool),
        "beside_others": together,
        "left_early": left,
        "tokens": tokens,
        "mismatches": len(mismatches),
        "held_after": worker.wait_idle(),
        "seed": seed,
        "interrupted": interrupted,
        "refused_alone": sum(answer.end not in ("stop", "length") for answer in expected),
        "examples": mismatches[:20],
    }


def table(found: dict[str, Any]) -> Table:
    """The counts for people."""
    drawn = Table(title=f"mixes in {found['precision']}", title_justify="left")
    names = (
        *("mixes", "requests", "distinct", "beside_others", "left_early"),
        *("tokens", "mismatches", "held_after"),
    )
    for name in names:
        drawn.add_column(name.replace("_", " "), justify="right")
    drawn.add_row(*(str(found[name]) for name in names))
    return drawn


def as_it_must_be(line: dict[str, Any]) -> bool:
    """Whether a line of results holds no failure; rounding may change answers below float32."""
    exact = line["precision"] == "float32"
    return not (line["held_after"] or (exact and line["mismatches"]))
