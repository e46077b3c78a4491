"""Our figures beside those of SGLang's own benchmark, on the same server with the same prompts.

Both send the same prompts to ``/generate`` of one server, as many at once, for answers of the same
length; in turn, round by round, with an emptied cache.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import Any

from rich.table import Table

from bench import figures as fig
from bench import load, machine, targets, usage
from bench.figures import Limits, median_of
from bench.load import Sending
from bench.processes import Harness
from bench.results import spread
from bench.tables import number
from bench.targets import Target
from bench.wire import Ask, reply_of
from models.pocket import talk

TOOL = "sglang.benchmark.serving"
_TOOL_S = 900.0
_SAME = {
    "output_tokens": ("total_output_tokens", 1.0),
    "requests_per_s": ("request_throughput", 1.0),
    "output_tokens_per_s": ("output_throughput", 1.0),
    "ttft_s": ("median_ttft_ms", 1e-3),
    "tpot_s": ("median_tpot_ms", 1e-3),
    "duration_s": ("median_e2e_latency_ms", 1e-3),
}
"""Our figure, theirs and what turns theirs into ours; of latencies the median."""

# An answer that goes on after its end has tokens without text, which theirs does not count.
_SWITCHES = ("--disable-ignore-eos", "--flush-cache", "--disable-tqdm")
_LONGEST = "Count from 1 to 100."  # 101 tokens of the embedded model


class ToolFailed(Exception):
    """SGLang's benchmark gave no figures; the text is a sentence and the end of what it said."""


@dataclass(frozen=True, slots=True)
class Plan:
    requests: int = 96
    users: int = 8
    tokens: int = 64
    rounds: int = 3
    seed: int = 0


def asked(seed: int, number: int, tokens: int) -> Ask:
    """A conversation of some 100 tokens that no other begins as, and whose answer is long."""
    random = Random(f"cross-check {seed} {number}")
    turns: list[tuple[str, str]] = [("user", f"My number is {number}."), ("assistant", "I see.")]
    for fact in random.sample(talk.facts(), 3):
        turns += [("user", random.choice(fact.seen)), ("assistant", fact.answer)]
    return Ask((*turns, ("user", _LONGEST)), max_new_tokens=tokens)


class CrossCheck:
    """Measures one SGLang server with both, and holds what has been measured."""

    def __init__(self, plan: Plan, target: Target, harness: Harness) -> None:
        self._plan = plan
        self._target = target
        self._harness = harness
        self._asks = [asked(plan.seed, number, plan.tokens) for number in range(plan.requests)]
        self._rounds: dict[str, list[dict[str, float]]] = {"ours": [], "theirs": []}
        self.interrupted = False

    def run(self) -> None:
        """Measure; Ctrl-C ends it with the rounds there are, ``interrupted``.

        Raises:
            ToolFailed: SGLang's benchmark gave no figures.
        """
        sides: dict[str, Callable[[], dict[str, float]]] = {
            "ours": self._ours,
            "theirs": self._theirs,
        }
        steps = [
            (round_number, name)
            for round_number in range(self._plan.rounds + 1)
            for name in (sides if round_number % 2 else reversed(sides))
        ]
        try:
            for round_number, name in self._harness.track(steps, "in turn"):
                targets.flush(self._target)
                found = sides[name]()
                if round_number:  # the first one warms up
                    self._rounds[name].append(found)
        except KeyboardInterrupt:
            self.interrupted = True

    def _ours(self) -> dict[str, float]:
        plan = self._plan
        sendings = iter([self._sending(ask) for ask in self._asks])
        run = load.closed([sendings] * plan.users)
        replies = [reply_of(self._target.api, exchange) for exchange in run.exchanges]
        found = fig.figures(replies, Limits(1.0, 1.0))
        same = {name: found[name] for name in _SAME}
        medians = {
            name: value["p50"] if isinstance(value, dict) else value for name, value in same.items()
        }
        return medians | {"answered": found["answered"]}

    def _sending(self, ask: Ask) -> Sending:
        return Sending(self._target.url, self._target.headers, self._target.body(ask))

    def _theirs(self) -> dict[str, float]:
        plan, folder = self._plan, self._harness.folder
        prompts, out = folder / "prompts.jsonl", folder / "theirs.jsonl"
        assert self._target.template is not None
        lines = [
            {"conversations": [{"content": self._target.template(ask)}, {"content": "An answer."}]}
            for ask in self._asks
        ]
        prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
        out.unlink(missing_ok=True)
        flags = {
            "--backend": "sglang",
            "--base-url": self._target.address,
            "--model": self._target.facts["model_path"],
            "--dataset-name": "custom",
            "--dataset-path": prompts,
            "--sharegpt-output-len": plan.tokens,
            "--num-prompts": plan.requests,
            "--max-concurrency": plan.users,
            "--seed": plan.seed,
            "--output-file": out,
        }
        line = [str(part) for pair in flags.items() for part in pair]
        done = subprocess.run(
            [sys.executable, "-m", TOOL, *line, *_SWITCHES],
            capture_output=True,
            text=True,
            timeout=_TOOL_S,
            check=False,
        )
        if done.returncode or not out.exists():
            said = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
            raise ToolFailed(f"{TOOL} ended with {done.returncode}.\n{said}")
        told = json.loads(out.read_text().splitlines()[-1])
        found = {name: told[theirs] * scale for name, (theirs, scale) in _SAME.items()}
        return found | {"answered": told["completed"]}

    def results(self) -> dict[str, Any]:
        rounds = {name: found for name, found in self._rounds.items() if found}
        return {
            "interrupted": self.interrupted,
            "machine": machine.facts(usage.Gpus()),
            "plan": asdict(self._plan),
            "target": {"api": self._target.api, **self._target.facts},
            "rounds": self._rounds,
            "summary": {
                side: {name: spread([one[name] for one in found]) for name in found[0]}
                for side, found in rounds.items()
            },
            "difference": differences(self._rounds["ours"], self._rounds["theirs"]),
        }


def differences(
    ours: Sequence[dict[str, float]], theirs: Sequence[dict[str, float]]
) -> dict[str, Any]:
    """By how much of theirs our figures are larger: of the medians, and within each round."""
    found = {}
    for name in _SAME:
        pairs = [(a[name], b[name]) for a, b in zip(ours, theirs, strict=False)]
        if pairs:
            mine, its = (spread(side)["median"] for side in zip(*pairs, strict=True))
            rounds = spread([a / b - 1 for a, b in pairs])
            found[name] = {"of_medians": mine / its - 1, "rounds": rounds}
    return found


def table(found: dict[str, Any]) -> Table:
    plan = found["plan"]
    title = (
        f"{plan['requests']} requests, {plan['users']} at once, {plan['tokens']} tokens each, "
        f"{len(found['rounds']['theirs'])} rounds: medians"
    )
    drawn = Table("figure", title=title, title_justify="left")
    for column in ("ours", TOOL, "difference", "within a round"):
        drawn.add_column(column, justify="right")
    for name, difference in found["difference"].items():
        each = difference["rounds"]
        drawn.add_row(
            name,
            *(number(median_of(found["summary"][side], name), 4) for side in ("ours", "theirs")),
            f"{100 * difference['of_medians']:+.1f} %",
            f"{100 * each['min']:+.1f} to {100 * each['max']:+.1f} %",
        )
    return drawn
