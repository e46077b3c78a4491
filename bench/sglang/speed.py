"""Two sides under the same load: what the worker costs SGLang, and what SGLang gains."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from bench.client import Answer, Asked, Client
from bench.processes import Harness, ProcessFailed, Running, tail
from bench.rates import Measured, measured, shown_rate, shown_ratio, shown_ttft, summary
from bench.results import Keep, record, spread
from bench.sglang import direct
from bench.sglang.workload import Ask, Workload
from bench.usage import role_below
from protocol.messages import WorkerStatus


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two: where it is asked, how, and the process whose family works for it."""

    name: str
    address: str
    spell: Callable[[Ask], Asked]
    running: Running


Round = dict[tuple[int, str], tuple[Measured, dict[str, float]]]


def overhead(
    harness: Harness, keep: Keep, *, workload: Callable[[WorkerStatus], Workload], **how: Any
) -> None:
    """The worker beside its own SGLang server, asked directly.

    Raises:
        ProcessFailed: a process did not start, or answers nothing.
    """
    with harness.worker(*_open_door(how["levels"]), kind="sglang") as worker:
        sides = (
            Side("worker", worker.address, _to_worker, worker),
            Side("direct", server_of(worker), lambda ask: direct.asked(ask.direct), worker),
        )
        status = worker.status()
        _compare(harness, keep, "sglang_overhead", sides, status, workload(status), **how)


def gain(
    harness: Harness, keep: Keep, *, workload: Callable[[WorkerStatus], Workload], **how: Any
) -> None:
    """The SGLang worker beside the Hugging Face worker with a thread a request, as in LLaVA.

    Raises:
        ProcessFailed: a process did not start, or answers nothing.
    """
    door = _open_door(how["levels"])
    # A thread a request is at its best with few: the others wait for one of its usual slots.
    with (
        harness.worker(*door, kind="sglang") as sglang,
        harness.worker(*_waiting_room(how["levels"]), "--batching", "off", kind="hf") as hf,
    ):
        sides = (
            Side("sglang", sglang.address, _to_worker, sglang),
            Side("hf", hf.address, _to_worker, hf),
        )
        status = sglang.status()
        _compare(harness, keep, "sglang_gain", sides, status, workload(status), **how)


def _open_door(levels: Sequence[int]) -> tuple[str, ...]:
    return "--limit-model-concurrency", str(max(levels)), *_waiting_room(levels)


def _waiting_room(levels: Sequence[int]) -> tuple[str, ...]:
    return "--max-waiting", str(max(levels)), "--max-wait-s", "600"


def _to_worker(ask: Ask) -> Asked:
    return Asked(ask.worker)


def server_of(worker: Running) -> str:
    """Where the SGLang server of ``worker`` listens.

    Raises:
        ProcessFailed: it has none.
    """
    for child in worker.process.children():
        line = child.cmdline()
        if "--port" in line:
            return f"http://127.0.0.1:{line[line.index('--port') + 1]}"
    raise ProcessFailed(f"{worker.address} has no SGLang server of its own.\n{tail(worker.log)}")


def _compare(
    harness: Harness,
    keep: Keep,
    kind: str,
    sides: tuple[Side, Side],
    status: WorkerStatus,
    workload: Workload,
    *,
    levels: Sequence[int],
    rounds: int,
    requests: int,
) -> None:
    done: list[Round] = []
    interrupted = False
    with Client() as client:
        try:
            for number in harness.track(range(rounds + 1), kind):
                found = _round(client, sides, number, workload, levels, requests if number else 1)
                if number:  # the first one warms up
                    done.append(found)
        except KeyboardInterrupt:
            interrupted = True
    if done:
        names = sides[0].name, sides[1].name
        found_figures = figures(done, names)
        harness.console.print(table(kind, found_figures, names))
        facts = {"precision": status.precision, "interrupted": interrupted, **workload.facts}
        keep(record(kind, status, facts | found_figures))
    if interrupted:
        raise KeyboardInterrupt


def _round(
    client: Client,
    sides: tuple[Side, Side],
    number: int,
    workload: Workload,
    levels: Sequence[int],
    requests: int,
) -> Round:
    """Every level with both sides, one right after the other; who goes first takes turns.

    Raises:
        ProcessFailed: one answers nothing.
    """
    found: Round = {}
    for level in levels:
        for side in sides if number % 2 else reversed(sides):
            waves = [workload.take(level) for _ in range(-(-requests // level))]
            before = _cpu_s(side.running)
            answers = [
                client.together(side.address, [side.spell(ask) for ask in wave]) for wave in waves
            ]
            after = _cpu_s(side.running)
            found[level, side.name] = (
                _measured(side, answers),
                {role: after[role] - before.get(role, 0.0) for role in after},
            )
    return found


def _measured(side: Side, answers: Sequence[Sequence[Answer]]) -> Measured:
    try:
        return measured(answers)
    except ValueError as exc:
        why = f"No answer came from {side.address}: {answers[0][0].message}"
        raise ProcessFailed(f"{why}\n{tail(side.running.log)}") from exc


def _cpu_s(running: Running) -> dict[str, float]:
    """Processor seconds of a worker and of what it has started, by what they do."""
    found: dict[str, float] = defaultdict(float)
    for process in (running.process, *running.process.children(recursive=True)):
        times = process.cpu_times()
        own = process.pid == running.process.pid
        found["worker" if own else role_below(process)] += times.user + times.system
    return found


def figures(rounds: Sequence[Round], names: tuple[str, str]) -> dict[str, Any]:
    """Medians over the rounds, ratios of the first side to the second within a round.

    Raises:
        ValueError: there is no round.
    """
    first, second = names
    levels = {}
    for level in sorted({level for level, _ in rounds[0]}):
        entry: dict[str, Any] = {}
        for name in names:
            found = [done[level, name] for done in rounds]
            entry[name] = summary([one for one, _ in found])
            entry[name]["cpu_ms_per_token"] = {
                role: statistics.median(1e3 * cpu[role] / one.tokens for one, cpu in found)
                for role in found[0][1]
            }
        pairs = [(done[level, first][0], done[level, second][0]) for done in rounds]
        entry["ratio"] = spread([a.rate / b.rate for a, b in pairs])
        entry["ratio_from_sending"] = spread(
            [a.rate_from_sending / b.rate_from_sending for a, b in pairs]
        )
        entry["ttft_ratio"] = spread(
            [statistics.median(a.ttft_s) / statistics.median(b.ttft_s) for a, b in pairs]
        )
        levels[str(level)] = entry
    best = {
        name: max(levels.values(), key=lambda entry: _whole(entry[name]))[name] for name in names
    }
    return {
        "rounds": len(rounds),
        "levels": levels,
        "best_to_best": _whole(best[first]) / _whole(best[second]),
    }


def _whole(side: dict[str, Any]) -> float:
    rate: float = side["tokens_per_s_from_sending"]["median"]
    return rate


def table(kind: str, found: dict[str, Any], names: tuple[str, str]) -> Table:
    """The figures for people: median (least to most) over the rounds."""
    title = f"{kind}: tokens/s of all requests together, {found['rounds']} rounds"
    drawn = Table(title=title, title_justify="left")
    drawn.add_column("at once", justify="right")
    for column in (*names, "ratio", "with prompt"):
        drawn.add_column(column, justify="right")
    for column in (*(f"TTFT {name}" for name in names), *(f"CPU {name}" for name in names)):
        drawn.add_column(column, justify="right")
    drawn.add_column("failed", justify="right")
    for level, entry in found["levels"].items():
        sides = [entry[name] for name in names]
        drawn.add_row(
            level,
            *map(shown_rate, sides),
            *map(shown_ratio, (entry["ratio"], entry["ratio_from_sending"])),
            *map(shown_ttft, sides),
            *(f"{sum(side['cpu_ms_per_token'].values()):.2f}" for side in sides),
            str(sum(side["failed"] for side in sides)),
        )
    drawn.caption = (
        "ratio: from the first token to the last; with prompt: from sending. TTFT in ms: median, "
        "95 %. CPU: ms of processor a token, of all processes of that side's worker"
    )
    return drawn
