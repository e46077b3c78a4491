"""Answers that decode together: prompts join and answers leave between two steps.

One thread owns a ``Batch``. A prompt is computed alone, in pieces, so that a long one holds up
the others by one piece only, and so that its numbers are those it would have without the others.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from protocol.events import Delta
from workers.hf import cancel, failures
from workers.hf.job import Job, advance, lengthened, on_device
from workers.hf.kv import KvRows
from workers.hf.model import HfModel, Inputs
from workers.hf.quantization import release

Result = Delta | Exception
"""What a step gave an answer: its next token, or the error that ended it."""

Choose = Callable[[Sequence[Job], torch.Tensor], list[Result]]


@dataclass(slots=True, eq=False)
class _Row:
    job: Job
    inputs: Inputs  # of the prompt; empty once it is computed
    tokens: int  # of the prompt
    replay: deque[int] = field(default_factory=deque)  # resumed tokens still to be computed
    length: int = 0  # tokens whose keys and values are stored
    last: int = 0  # token to compute next
    rope_delta: int = 0  # from length to position, where pictures take fewer positions than tokens


class Batch:
    """The rows that decode, and one more whose prompt is being computed."""

    def __init__(
        self,
        model: HfModel,
        *,
        chunk_tokens: int,
        limit_bytes: int | None = None,
        choose: Choose = advance,
    ) -> None:
        self._model = model
        self._network = model.network
        self._chunk_tokens = chunk_tokens
        self._limit_bytes = limit_bytes
        self._choose = choose
        self._kv = KvRows()
        self._rows: list[_Row] = []
        self._filling: _Row | None = None  # its slot is the one behind the rows
        inner = getattr(model.network, "model", None)
        self._mrope = inner if hasattr(inner, "rope_deltas") else None

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def filling(self) -> Job | None:
        """The job whose prompt is being computed."""
        return None if self._filling is None else self._filling.job

    @property
    def jobs(self) -> Iterator[Job]:
        """All that are here."""
        yield from (row.job for row in self._rows)
        if self._filling is not None:
            yield self._filling.job

    def fits(self, job: Job) -> bool:
        """Whether there should be memory for one more; the first one is always tried."""
        if self._limit_bytes is None or not self._rows:
            return True
        tokens = job.prompt_tokens + len(job.ids) + self._chunk_tokens
        longest = max(tokens, *(row.length for row in self._rows))
        return self._kv.bytes_of(len(self._rows) + 1, longest) <= self._limit_bytes

    def begin(self, job: Job) -> None:
        """Take a job; ``fill`` then computes its prompt."""
        assert self._filling is None
        # In less than float32 a decode step rounds otherwise than a prompt's pass, so tokens that
        # were decoded elsewhere are decoded again.
        whole = job.model.exact
        inputs = lengthened(job.inputs, job.ids if whole else ())
        row = _Row(job, inputs, inputs["input_ids"].shape[1])
        row.replay.extend(() if whole else job.ids)
        self._filling = row

    def fill(self) -> tuple[int, Result | None]:
        """Compute the next piece of the prompt: its tokens, and once it is whole the result.

        A failure here is that job's own, and it is gone.

        Raises:
            Cancelled: the job was cancelled meanwhile; it is gone.
        """
        row = self._filling
        assert row is not None
        try:
            with cancel.cancellable(row.job.cancelled):
                tokens, scores = self._fill(row)
        except cancel.Cancelled:
            self._abandon()
            raise
        except Exception as exc:  # noqa: BLE001 - the job's own, and told to it
            self._abandon()
            return 0, _ended_by(exc)
        if row.length < row.tokens:
            return tokens, None
        row.inputs = row.job.inputs = {}  # pixels are large, and answers long
        self._filling = None
        self._rows.append(row)
        results = self._advance([row], scores)
        return tokens, results[0][1] if results else None

    def _fill(self, row: _Row) -> tuple[int, torch.Tensor]:
        start = row.length
        end = min(max(start + self._chunk_tokens, 0 if start else self._pictured(row)), row.tokens)
        ids = row.inputs["input_ids"]
        inputs: Inputs = {}
        if start == 0:
            inputs = {
                name: value[:, :end] if value.shape == ids.shape else value
                for name, value in row.inputs.items()
                if name != "attention_mask"
            }
            if self._mrope is not None:
                self._mrope.rope_deltas = None  # left there by the prompt before
        else:
            inputs["input_ids"] = ids[:, start:end]
            inputs |= self._positions(torch.arange(start, end)[None] + row.rope_delta)
        slot = len(self._rows)
        self._kv.ensure(slot + 1, end)
        cache = self._kv.one(slot, start, end - start)
        scores = self._forward(on_device(inputs, self._network), cache, [row])
        if start == 0 and self._mrope is not None and self._mrope.rope_deltas is not None:
            row.rope_delta = int(self._mrope.rope_deltas.reshape(-1)[0])
        row.length = end
        return end - start, scores

    def _pictured(self, row: _Row) -> int:
        """Tokens up to the last picture: the network takes all pictures in one pass."""
        ids = row.inputs["input_ids"]
        if all(value.shape == ids.shape for value in row.inputs.values()):
            return 0
        token_id = self._model.image_token_id
        places = [] if token_id is None else (ids[0] == token_id).nonzero().tolist()
        return int(places[-1][0]) + 1 if places else row.tokens

    def step(self) -> list[tuple[Job, Result]]:
        """Compute one token for every row; answers that are complete, or failed, are gone.

        Out of memory, the longest row ends with that error and the others make the step again.
        Any other failure is everybody's.
        """
        ended: list[tuple[Job, Result]] = []
        while self._rows:
            try:
                scores = self._step()
                break
            except Exception as exc:  # noqa: BLE001 - the jobs' own, and told to them
                if not failures.is_out_of_memory(exc):
                    return ended + [(job, exc) for job in self.clear()]
                longest = max(self._rows, key=lambda row: row.length)
                ended.append((longest.job, _ended_by(exc)))
                self._remove([longest])
        else:
            return ended
        for row in self._rows:
            row.length += 1
        return ended + self._advance(list(self._rows), scores)

    def _step(self) -> torch.Tensor:
        rows, device = self._rows, self._model.device
        longest = max(row.length for row in rows)
        self._kv.ensure(len(rows), longest + 1)
        numbers = torch.tensor(
            [[row.last, row.length, row.rope_delta] for row in rows], device=device
        )
        lengths = numbers[:, 1]
        seen = torch.arange(longest + 1, device=device) <= lengths[:, None]
        inputs = {
            "input_ids": numbers[:, :1],
            "attention_mask": seen.long(),
            **self._positions((lengths + numbers[:, 2])[:, None]),
        }
        return self._forward(inputs, self._kv.all(lengths, longest), rows)

    def _positions(self, positions: torch.Tensor) -> Inputs:
        if "position_ids" not in self._model.parameters:
            return {}
        if self._mrope is not None:  # one each for time, height and width; text has all alike
            positions = positions[None].expand(3, -1, -1)
        return {"position_ids": positions}

    def _forward(self, inputs: Inputs, cache: Any, rows: Sequence[_Row]) -> torch.Tensor:
        """The scores [rows, vocabulary] (float32) behind the last token of each row."""
        kept = {"logits_to_keep": 1} if "logits_to_keep" in self._model.parameters else {}
        with self._model.adapters.rows([row.job.adapter for row in rows]):
            out = self._network(**inputs, past_key_values=cache, use_cache=True, **kept)
        scores: torch.Tensor = out.logits[:, -1].float()
        return scores

    def _advance(self, rows: Sequence[_Row], scores: torch.Tensor) -> list[tuple[Job, Result]]:
        choosing = [(n, row) for n, row in enumerate(rows) if not row.replay]
        for row in rows:
            if row.replay:
                row.last = row.replay.popleft()
        if not choosing:
            return []
        if len(choosing) < len(rows):
            scores = scores[[n for n, _ in choosing]]
        jobs = [row.job for _, row in choosing]
        results = self._choose(jobs, scores)
        gone = []
        for (_, row), result in zip(choosing, results, strict=True):
            if isinstance(result, Delta) and row.job.answer.reason is None:
                row.last = row.job.ids[-1]
            else:
                gone.append(row)
        if gone:
            self._remove(gone)
        return list(zip(jobs, results, strict=True))

    def drop(self, job: Job) -> None:
        """Forget a job that is here."""
        if self._filling is not None and self._filling.job is job:
            self._abandon()
        else:
            self._remove([row for row in self._rows if row.job is job])

    def clear(self) -> list[Job]:
        """Forget all; returns the jobs that were here."""
        jobs = list(self.jobs)
        self._rows.clear()
        self._filling = None
        self._kv.release()
        return jobs

    def _abandon(self) -> None:
        self._filling = None
        self._kv.clear(len(self._rows))
        self._settle()

    def _remove(self, gone: Sequence[_Row]) -> None:
        slot = len(self._rows)
        for row in gone:
            last = len(self._rows) - 1
            index = self._rows.index(row)
            if index != last:
                self._rows[index] = self._rows[last]
                self._kv.move(last, index, self._rows[index].length)
            self._rows.pop()
            self._kv.clear(last)
        if self._filling is not None and slot != len(self._rows):
            self._kv.move(slot, len(self._rows), self._filling.length)
            self._kv.clear(slot)
        self._settle()

    def _settle(self) -> None:
        rows = [*self._rows, *([] if self._filling is None else [self._filling])]
        self._kv.settle(len(rows), max((row.length + 1 for row in rows), default=0))


def _ended_by(exc: Exception) -> Exception:
    """What a job is told that ``exc`` ended; memory that is back is given back."""
    if not failures.is_out_of_memory(exc):
        return exc
    error = failures.as_typed(exc)
    release()
    return error
