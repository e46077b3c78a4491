"""What the controller adds to a direct connection, over echo workers that cost next to nothing.

Paced: each stream brings a token now and then, and requests come evenly, so that about as many
streams as asked for are open; that shows the time to the first token and the processor time of a
token. Flat out: as fast as everything here can, one request after the other on each stream; the
client, the workers and the controller share the cores, so that shows what is left to clients.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from bench import figures as fig
from bench import load, machine, usage
from bench.figures import Limits, median_of
from bench.load import Run, Sending
from bench.processes import Harness
from bench.results import spread
from bench.tables import number, over_rounds
from bench.targets import Target
from bench.wire import Ask, reply_of

SIDES = ("direct", "controller")
WAYS = ("paced", "flat_out")
_LIMITS = Limits(ttft_s=1.0, itl_s=1.0)
_MIN_DELAY_S = 0.02


@dataclass(frozen=True, slots=True)
class Plan:
    """``tokens_per_s`` is what all paced streams bring together."""

    levels: tuple[int, ...] = (1, 64, 256, 1000)
    rounds: int = 3
    tokens: int = 30
    waves: int = 2
    least: int = 12
    workers: int = 2
    tokens_per_s: float = 3000.0

    def delay_s(self, streams: int) -> float:
        """Between two tokens of a paced stream."""
        return max(_MIN_DELAY_S, streams / self.tokens_per_s)

    def requests(self, streams: int) -> int:
        return max(self.least, self.waves * streams)


Doors = dict[tuple[str, str], list[Target]]
"""Where requests go, by way and side."""


@contextmanager
def _doors(harness: Harness, plan: Plan, streams: int, controller: str) -> Iterator[Doors]:
    """Echo workers for both ways, and their doors.

    Raises:
        ProcessFailed: one did not start.
    """
    delays = {"paced": plan.delay_s(streams), "flat_out": 0.0}
    ways = [way for way in WAYS for _ in range(plan.workers)]
    commands = [
        (
            "workers.echo",
            (
                *("--model-name", f"{way}-{streams}", "--delay-s", str(delays[way])),
                *("--limit-model-concurrency", str(2 * streams), "--max-waiting", "100000"),
                *("--controller-address", controller),
            ),
        )
        for way in ways
    ]
    with harness.processes(*commands) as workers:
        doors: Doors = {}
        for way in WAYS:
            model = f"{way}-{streams}"
            direct = [w.address for w, its in zip(workers, ways, strict=True) if its == way]
            doors[way, "direct"] = [Target("direct", a, "tandem", model) for a in direct]
            doors[way, "controller"] = [Target("controller", controller, "tandem", model)]
        yield doors


class Overhead:
    """Measures as it is told and holds what has been measured, also when it is stopped."""

    def __init__(self, plan: Plan, harness: Harness) -> None:
        self._plan = plan
        self._harness = harness
        self._levels: dict[int, dict[str, dict[str, list[dict[str, Any]]]]] = {}
        self.interrupted = False

    def run(self) -> None:
        """Measure; Ctrl-C ends it with the rounds there are, ``interrupted``.

        Raises:
            ProcessFailed: a process did not start.
        """
        _raise_open_files()
        try:
            with self._harness.process("controller", "--max-waiting", "100000") as controller:
                for streams in self._plan.levels:
                    self._level(streams, controller.address)
        except KeyboardInterrupt:
            self.interrupted = True

    def _level(self, streams: int, controller: str) -> None:
        with _doors(self._harness, self._plan, streams, controller) as doors:
            rounds = list(range(self._plan.rounds + 1))
            for round_number in self._harness.track(rounds, f"{streams} streams"):
                order = SIDES if round_number % 2 else SIDES[::-1]
                done = {
                    way: {name: self._measure(doors, way, name, streams) for name in order}
                    for way in WAYS
                }
                if round_number:  # the first one warms up
                    kept = self._levels.setdefault(streams, {})
                    for way, by_name in done.items():
                        for name, found in by_name.items():
                            kept.setdefault(way, {}).setdefault(name, []).append(found)

    def _measure(self, all_doors: Doors, way: str, name: str, streams: int) -> dict[str, Any]:
        doors = all_doors[way, name]
        family = usage.family([all_doors[way, "controller"][0].address])
        before = usage.cpu_s(family)
        run = self._paced(doors, streams) if way == "paced" else self._flat_out(doors, streams)
        spent_s = sum(usage.cpu_s(family).values()) - sum(before.values())
        found = fig.figures([reply_of("tandem", e) for e in run.exchanges], _LIMITS)
        found["generator"] = {"lag_s": fig.quantiles(run.lag_s), "cpu_s": run.cpu_s}
        if name == "controller" and found["output_tokens"]:
            found["controller_cpu_us_per_token"] = 1e6 * spent_s / found["output_tokens"]
        return found

    def _paced(self, doors: Sequence[Target], streams: int) -> Run:
        plan = self._plan
        every_s = plan.tokens * plan.delay_s(streams) / streams
        sendings = self._sendings(doors, plan.requests(streams))
        return load.opened([(index * every_s, one) for index, one in enumerate(sendings)])

    def _flat_out(self, doors: Sequence[Target], streams: int) -> Run:
        return load.closed([self._sendings(doors, max(streams, 256))] * streams)

    def _sendings(self, doors: Sequence[Target], requests: int) -> Iterator[Sending]:
        """Requests for ``tokens`` tokens, to the doors in turn."""
        ask = Ask((("user", "x" * self._plan.tokens),), max_new_tokens=self._plan.tokens)
        bodies = [Sending(door.url, door.headers, door.body(ask)) for door in doors]
        return iter([bodies[index % len(bodies)] for index in range(requests)])

    def results(self) -> dict[str, Any]:
        return {
            "interrupted": self.interrupted,
            "machine": machine.facts(usage.Gpus()),
            "plan": asdict(self._plan),
            "levels": [
                {"streams": streams, **{way: _summary(way, found) for way, found in ways.items()}}
                for streams, ways in self._levels.items()
            ],
        }


def _summary(way: str, sides: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    found: dict[str, Any] = {name: fig.summary(rounds) for name, rounds in sides.items()}
    pairs = list(zip(sides["controller"], sides["direct"], strict=True))
    if way == "paced":
        found["added_ttft_s"] = {
            share: spread([c["ttft_s"][share] - d["ttft_s"][share] for c, d in pairs])
            for share in fig.SHARES
            if all(c["ttft_s"] and d["ttft_s"] for c, d in pairs)
        }
    found["rate_ratio"] = spread(
        [c["output_tokens_per_s"] / d["output_tokens_per_s"] for c, d in pairs]
    )
    return found


def failures(found: dict[str, Any]) -> int:
    """How many requests were refused or failed."""
    sides = (level[way][name] for level in found["levels"] for way in WAYS for name in SIDES)
    return sum(sum(side[key].values()) for side in sides for key in ("refused", "failed"))


def table(found: dict[str, Any]) -> Table:
    """What the controller adds, for people."""
    drawn = Table(title="what the controller adds to a direct connection", title_justify="left")
    for column in (
        *("streams", "TTFT direct ms", "added ms p50", "added ms p99", "CPU µs/token"),
        *("flat out direct tok/s", "through it", "share", "refused", "failed"),
    ):
        drawn.add_column(column, justify="right")
    for level in found["levels"]:
        paced, flat = level["paced"], level["flat_out"]
        added = paced["added_ttft_s"]
        sides = [level[way][name] for way in WAYS for name in SIDES]
        drawn.add_row(
            str(level["streams"]),
            number(1e3 * (median_of(paced["direct"], "ttft_s", "p50") or 0)),
            over_rounds(added.get("p50"), 1e3),
            over_rounds(added.get("p99"), 1e3),
            over_rounds(paced["controller"].get("controller_cpu_us_per_token")),
            over_rounds(flat["direct"]["output_tokens_per_s"]),
            over_rounds(flat["controller"]["output_tokens_per_s"]),
            over_rounds(flat["rate_ratio"]),
            *(str(sum(sum(s[key].values()) for s in sides)) for key in ("refused", "failed")),
        )
    plan = found["plan"]
    drawn.caption = (
        f"TTFT and CPU: paced, at most {plan['tokens_per_s']:.0f} tokens/s of all streams; "
        "flat out: client, workers and controller share the cores"
    )
    return drawn


def _raise_open_files() -> None:
    """A thousand streams are more than 1024 files; processes started later get the same."""
    with suppress(ValueError, OSError):
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
