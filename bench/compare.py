"""One comparison: the truth first, then every load with every target in turn, round by round."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench import figures as fig
from bench import load, machine, parity, targets, usage, workloads
from bench.figures import Limits
from bench.load import Run, Sending
from bench.targets import Target
from bench.wire import Ask, Reply, reply_of
from bench.workloads import WORKLOADS

Mode = Literal["closed", "open", "trace"]

BEYOND_KNEE = 1.6
"""A target is not asked at more than this many times what it answers in a closed loop."""

DEFAULT_LIMITS = Limits(ttft_s=1.0, itl_s=0.2)
_RATE_STEPS = (0.6, 1.0, 1.4)
_LAST_STEP = 1.2
_CALIBRATION_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, and how much of it.

    ``rates`` are requests a second of the open loop on the first workload; ``None`` chooses them
    around what the targets answered in the closed loop, and none at all means no open loop.
    """

    workloads: tuple[str, ...] = ("vqa", "chat", "random")
    levels: tuple[int, ...] = (1, 4, 12)
    rates: tuple[float, ...] | None = None
    rounds: int = 3
    requests: int = 8
    waves: int = 2
    open_s: float = 2.0
    questions: int = parity.QUESTIONS
    max_new_tokens: int | None = None
    seed: int = 0
    limits: Limits = DEFAULT_LIMITS


@dataclass(slots=True)
class Cell:
    """One workload under one load with one target."""

    workload: str
    mode: Mode
    level: float
    target: str
    rounds: dict[int, dict[str, Any]] = field(default_factory=dict)
    timeline: list[dict[str, Any]] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "workload": self.workload,
            "mode": self.mode,
            "level": self.level,
            "target": self.target,
            "rounds": self.rounds,
            "summary": fig.summary(list(self.rounds.values())),
            "timeline": self.timeline,
        }


@dataclass(frozen=True, slots=True)
class Step:
    """One measurement to make."""

    number: int
    workload: str
    mode: Mode
    level: float
    target: Target


class Comparison:
    """Measures as it is told and holds what has been measured, also when it is stopped."""

    def __init__(
        self,
        plan: Plan,
        found: Sequence[Target],
        console: Console,
        trace: Sequence[tuple[float, Ask]] = (),
    ) -> None:
        self._plan = plan
        self._targets = {target.name: target for target in found}
        self._console = console
        self._trace = trace
        self._gpus = usage.Gpus()
        self._families = {t.name: usage.family(t.served_by) for t in found}
        self._unflushed: dict[str, tuple[str, ...]] = {}
        self._cells: dict[tuple[str, Mode, float, str], Cell] = {}
        self._truth: dict[str, Any] | None = None
        self.dead: dict[str, str] = {}
        self.interrupted = False

    def run(self) -> None:
        """Measure; Ctrl-C ends it with what there is, ``interrupted``."""
        try:
            self._tell_truth()
            self._warm_up()
            self._measure(list(self._closed_steps()), "closed loop")
            self._measure(list(self._open_steps()), "open loop")
        except KeyboardInterrupt:
            self.interrupted = True

    # ---- the truth

    def _tell_truth(self) -> None:
        asked = workloads.truth(self._plan.questions)
        answers: dict[str, list[Reply]] = {}
        for target in self._living():
            sendings = iter(
                [self._sending(target, ask, number) for number, (_, ask) in enumerate(asked)]
            )
            with self._bar(len(asked), f"{target.name}: the same {len(asked)} questions") as told:
                # They share the questions: whoever is free takes the next.
                run = load.closed([sendings] * parity.AT_ONCE, told)
            exchanges = sorted(run.exchanges, key=lambda exchange: exchange.number)
            answers[target.name] = [reply_of(target.api, exchange) for exchange in exchanges]
            self._look(target, answers[target.name])
        if answers:
            self._truth = parity.compared(asked, answers)

    def _warm_up(self) -> None:
        """What a target does only once, it does here: uncounted requests of every workload."""
        most = max(self._plan.levels, default=1)
        steps = [(name, target) for name in self._plan.workloads for target in self._living()]
        with self._bar(len(steps), "warming up") as told:
            for name, target in steps:
                if target.name not in self.dead:
                    asks = workloads.plan(
                        WORKLOADS[name],
                        seed=self._plan.seed,
                        round_number=-1,
                        users=min(most, 8),
                        requests=_CALIBRATION_REQUESTS,
                    )
                    run = load.closed(self._written(target, asks))
                    self._look(target, _replies(target, run))
                told()

    # ---- the loads

    def _closed_steps(self) -> Iterator[Step]:
        for number in range(self._plan.rounds):
            for name in self._plan.workloads:
                for level in self._plan.levels:
                    for target in self._in_turn(number):
                        yield Step(number, name, "closed", level, target)

    def _open_steps(self) -> Iterator[Step]:
        plan = self._plan
        for number in range(plan.rounds):
            for rate in self._rates() if plan.workloads else ():
                for target in self._in_turn(number):
                    peak = self._peak(target)
                    if plan.rates is not None or (peak and rate <= BEYOND_KNEE * peak):
                        yield Step(number, plan.workloads[0], "open", rate, target)
            if self._trace:
                seconds = max(self._trace[-1][0], 1.0)
                for target in self._in_turn(number):
                    yield Step(number, "trace", "trace", len(self._trace) / seconds, target)

    def _in_turn(self, number: int) -> list[Target]:
        """The targets; who goes first takes turns."""
        names = list(self._targets)
        first = number % len(names)
        return [self._targets[name] for name in (*names[first:], *names[:first])]

    def _rates(self) -> Sequence[float]:
        if self._plan.rates is not None:
            return self._plan.rates
        peaks = [peak for target in self._living() if (peak := self._peak(target))]
        return chosen_rates(peaks)

    def _peak(self, target: Target) -> float | None:
        """Most requests a second that it answered in the closed loop of the first workload."""
        rates = [
            found["requests_per_s"]
            for cell in self._cells.values()
            if (cell.workload, cell.mode, cell.target)
            == (self._plan.workloads[0], "closed", target.name)
            for found in cell.rounds.values()
        ]
        return max(rates, default=None)

    def _measure(self, steps: Sequence[Step], words: str) -> None:
        if not steps:
            return
        with self._bar(len(steps), words) as told:
            for step in steps:
                if step.target.name not in self.dead:
                    self._cell(step)
                told()

    def _cell(self, step: Step) -> None:
        target = step.target
        self._unflushed[target.name] = targets.flush(target)
        with usage.Watch(self._families[target.name], self._gpus) as watch:
            run = self._loaded(step)
        replies = _replies(target, run)
        found = fig.figures(replies, self._plan.limits)
        found |= watch.figures
        found["generator"] = {"lag_s": fig.quantiles(run.lag_s), "cpu_s": run.cpu_s}
        if tokens := found["output_tokens"]:
            found["cpu_ms_per_token"] = {
                role: 1e3 * seconds / tokens for role, seconds in found["cpu_s"].items()
            }
        key = step.workload, step.mode, step.level, target.name
        cell = self._cells.setdefault(key, Cell(*key))
        cell.rounds[step.number] = found
        cell.timeline = fig.timeline(replies)
        self._look(target, replies)

    def _loaded(self, step: Step) -> Run:
        plan = self._plan
        if step.mode == "trace":
            return load.opened(
                [(at_s, self._sending(step.target, ask)) for at_s, ask in self._trace]
            )
        workload = WORKLOADS[step.workload]
        if step.mode == "closed":
            users = int(step.level)
            requests = max(plan.requests, plan.waves * users)
        else:
            users = max(8, round(step.level * plan.open_s / workloads.TURNS))
            requests = max(8, round(step.level * plan.open_s))
        asks = workloads.plan(
            workload, seed=plan.seed, round_number=step.number, users=users, requests=requests
        )
        if step.mode == "closed":
            return load.closed(self._written(step.target, asks))
        mixed = [ask for together in zip(*asks, strict=True) for ask in together][:requests]
        due = workloads.arrivals(mixed, rate=step.level, seed=plan.seed + step.number)
        return load.opened([(at_s, self._sending(step.target, ask)) for at_s, ask in due])

    # ---- what they share

    def _written(self, target: Target, asks: Sequence[Sequence[Ask]]) -> list[list[Sending]]:
        return [[self._sending(target, ask) for ask in user] for user in asks]

    def _sending(self, target: Target, ask: Ask, number: int = 0) -> Sending:
        if self._plan.max_new_tokens is not None:
            ask = replace(ask, max_new_tokens=self._plan.max_new_tokens)
        return Sending(target.url, target.headers, target.body(ask), len(ask.images), number)

    def _living(self) -> list[Target]:
        return [target for name, target in self._targets.items() if name not in self.dead]

    def _look(self, target: Target, replies: Sequence[Reply]) -> None:
        """Whether a target that failed is dead; the others go on without it."""
        if all(reply.answered for reply in replies):
            return
        if why := targets.death(target):
            self.dead[target.name] = f"{why}, at {time.strftime('%H:%M:%S')}"
            self._console.print(f"{target.name} is dead: {why}", style="bold red", markup=False)

    @contextmanager
    def _bar(self, steps: int, words: str) -> Iterator[Callable[[], None]]:
        columns = (
            *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()),
            TimeRemainingColumn(),
        )
        console = Console(stderr=True)
        with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
            task = progress.add_task(words, total=steps)
            yield lambda: progress.advance(task)

    # ---- the results

    def results(self) -> dict[str, Any]:
        """All that was measured; cells of a target without its truth are left out."""
        told = self._truth["targets"] if self._truth else {}
        cells = [cell for cell in self._cells.values() if cell.target in told]
        plan = asdict(self._plan)
        return {
            "interrupted": self.interrupted,
            "machine": machine.facts(self._gpus),
            "plan": plan,
            "workloads": {
                name: {"what": WORKLOADS[name].what, "shares": WORKLOADS[name].shares}
                for name in self._plan.workloads
            },
            "targets": {
                name: {
                    "address": target.address,
                    "api": target.api,
                    "model": target.model,
                    "kind": target.kind,
                    **target.facts,
                    "commands": usage.command_lines(self._families[name]),
                    "not_flushed": self._unflushed.get(name, ()),
                    "dead": self.dead.get(name),
                }
                for name, target in self._targets.items()
            },
            "parity": self._truth,
            "cells": [cell.as_json() for cell in cells],
            "ratios": ratios(cells),
        }


def chosen_rates(peaks: Sequence[float]) -> tuple[float, ...]:
    """Rates on both sides of every target's peak, the slowest's and the fastest's."""
    if not peaks:
        return ()
    lowest, highest = min(peaks), max(peaks)
    around = [lowest * step for step in _RATE_STEPS]
    if highest * _LAST_STEP > around[-1]:
        around.append(highest * _LAST_STEP)
    return tuple(sorted({float(f"{rate:.2g}") for rate in around}))


def ratios(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """How many times the first target's figures the others' are, within a round."""
    found = []
    first = cells[0].target if cells else ""
    by_key = {(c.workload, c.mode, c.level, c.target): c for c in cells}
    for cell in cells:
        base = by_key.get((cell.workload, cell.mode, cell.level, first))
        if base is None or cell.target == first:
            continue
        entry: dict[str, Any] = {
            "workload": cell.workload,
            "mode": cell.mode,
            "level": cell.level,
            "target": cell.target,
            "to": first,
        }
        for name in ("requests_per_s", "output_tokens_per_s"):
            entry[name] = fig.ratio(cell.rounds, base.rounds, name)
        found.append(entry)
    return found


def _replies(target: Target, run: Run) -> list[Reply]:
    return [reply_of(target.api, exchange) for exchange in run.exchanges]
