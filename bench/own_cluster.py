"""The cluster a comparison starts itself: every kind of worker behind one controller."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from bench.processes import Harness
from bench.targets import Target, find, parse


@dataclass(frozen=True, slots=True)
class Kind:
    """A worker to start, and what a reader must know of it."""

    module: str
    flags: tuple[str, ...]
    what: str


KINDS: Mapping[str, Kind] = {
    "hf-unbatched": Kind("workers.hf", ("--batching", "off"), "a thread a request, LLaVA's way"),
    "hf": Kind("workers.hf", ("--batching", "auto"), "one batch"),
    "sglang": Kind("workers.sglang", (), "one batch and a prefix cache"),
}
"""In the order of the table; ratios are to the first."""


@contextmanager
def started(
    harness: Harness, names: Sequence[str], flags: Sequence[str], own_flags: Mapping[str, str]
) -> Iterator[list[Target]]:
    """A controller with one worker for each of ``names`` of ``KINDS``, asked through it.

    The workers serve the same model by the names of ``names``, so that a request can choose.

    Args:
        flags: of every worker.
        own_flags: more flags of the worker with that name, as one would type them.

    Raises:
        ProcessFailed: one did not become ready.
        TargetError: it is ready and does not answer.
    """
    with harness.process("controller", "--max-wait-s", "600") as controller:
        commands = [
            (
                KINDS[name].module,
                (
                    *(*flags, *KINDS[name].flags),
                    *("--model-name", name, "--controller-address", controller.address),
                    *("--max-waiting", "1024", "--max-wait-s", "600"),
                    *own_flags.get(name, "").split(),  # last: what follows -- is SGLang's
                ),
            )
            for name in names
        ]
        with harness.processes(*commands):
            yield [find(parse(f"{name}={controller.address}#{name}")) for name in names]
