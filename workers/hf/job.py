"""One request on its way through the model: encoded, and the state of its answer."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextvars import Context, copy_context
from dataclasses import dataclass, field

import torch

from protocol.errors import ContextOverflow, EngineFailed, InvalidRequest, TandemError
from protocol.events import Delta, Finished, TokenLogprob
from protocol.messages import GenerateRequest
from workers.answer import Answer
from workers.grammar import Grammar
from workers.hf import cancel
from workers.hf.logprobs import logprobs_of
from workers.hf.model import HfModel, Inputs
from workers.hf.sampling import Draw, choose
from workers.images import Picture
from workers.prompts import check_resumable, render
from workers.text import TextStream


@dataclass(slots=True, eq=False)
class Job:
    """An answer in the making; ``inputs`` are its prompt."""

    model: HfModel
    inputs: Inputs
    prompt_tokens: int
    answer: Answer
    draw: Draw
    grammar: Grammar | None
    logprobs: int | None
    adapter: str | None
    ids: list[int]  # of the answer so far, resumed ones included
    cancelled: threading.Event = field(default_factory=threading.Event)
    context: Context = field(default_factory=copy_context)  # with the request id, for the log

    @property
    def plain(self) -> bool:
        """Whether the likeliest token is the next one, with nothing else to regard."""
        return self.draw.greedy and not self.draw.penalizes and self.grammar is None

    @property
    def position(self) -> int:
        """Of the newest token, behind the prompt's first."""
        return self.prompt_tokens + len(self.ids) - 1

    def shape(self, scores: torch.Tensor) -> None:
        """Change ``scores`` [vocabulary] (float32) in place by penalties and grammar."""
        self.draw.penalize(scores, self.ids)
        if self.grammar is not None:
            self.grammar.mask(scores)

    def push(self, token_id: int, raw_scores: torch.Tensor) -> Delta:
        """Take a chosen token; ``raw_scores`` [vocabulary] are the network's own (float32)."""
        logprobs: tuple[TokenLogprob, ...] | None = None
        if self.logprobs is not None:
            logprobs = (logprobs_of(raw_scores, token_id, self.logprobs, self.model.spell),)
        self.ids.append(token_id)
        text = self.answer.push(token_id)
        if self.grammar is not None and self.answer.reason is None:
            self.grammar.accept(token_id)
            if self.grammar.ended:  # of a model without end tokens
                text += self.answer.end("stop")
        return Delta(text=text, token_ids=(token_id,), logprobs=logprobs)

    def finished(self) -> Finished:
        assert self.answer.reason is not None
        return Finished(
            reason=self.answer.reason,
            prompt_tokens=self.prompt_tokens,
            completion_tokens=self.answer.tokens,
        )


def prepare(
    model: HfModel,
    request: GenerateRequest,
    images: Sequence[Picture],
    cancelled: threading.Event,
) -> Job:
    """Encode ``request``, its pictures too, and take over what was generated elsewhere; blocking.

    Raises:
        BadImage, ContextOverflow, InvalidRequest, Unsupported: the request cannot be served.
        Cancelled: ``cancelled`` was set meanwhile.
    """
    with cancel.cancellable(cancelled):
        check_resumable(
            request.resume_token_ids,
            vocab_size=model.vocab_size,
            image_token_id=model.image_token_id,
        )
        prompt = render(request, image_token=model.image_token, apply_template=model.apply_template)
        grammar = model.grammars.compile(request)
        cancel.check()
        pixels = [image.pixels for image in images]
        inputs = model.encode(prompt.text, prompt.add_special_tokens, pixels)
        cancel.check()
    prompt_tokens = inputs["input_ids"].shape[1]
    if prompt_tokens == 0:
        raise InvalidRequest("The prompt is empty.")
    if prompt_tokens >= model.context_length:
        raise ContextOverflow(
            f"The prompt has {prompt_tokens} tokens with its {len(images)} images; this worker "
            f"takes {model.context_length} with the answer."
        )
    answer = Answer(
        TextStream(model.decode, (*request.stop, *model.stops)),
        eos_ids=model.eos_ids,
        max_tokens=min(request.max_new_tokens, model.context_length - prompt_tokens),
    )
    answer.resume(request.resume_token_ids)
    if grammar is not None and answer.reason is None:
        for token_id in request.resume_token_ids:
            grammar.accept(token_id)
        if grammar.ended:
            answer.end("stop")
    return Job(
        model=model,
        inputs=inputs,
        prompt_tokens=prompt_tokens,
        answer=answer,
        draw=Draw(request),
        grammar=grammar,
        logprobs=request.logprobs,
        adapter=model.adapter_of(request.adapter),
        ids=list(request.resume_token_ids),
        cancelled=cancelled,
    )


def advance(jobs: Sequence[Job], scores: torch.Tensor) -> list[Delta | Exception]:
    """Choose a token for each job by its row of ``scores`` [jobs, vocabulary] (float32).

    What is wrong with one job is its own result and changes nothing for the others.
    """
    try:
        return _advance(jobs, scores)
    except Exception as exc:  # noqa: BLE001 - of which job is found out one by one
        if len(jobs) == 1:
            return [exc]
        return [advance([job], scores[row : row + 1])[0] for row, job in enumerate(jobs)]


def _advance(jobs: Sequence[Job], scores: torch.Tensor) -> list[Delta | Exception]:
    """Choose for all before anything is changed by it, so that it can be tried again."""
    image_token_id = jobs[0].model.image_token_id
    if image_token_id is not None and image_token_id < scores.shape[-1]:
        scores[:, image_token_id] = float("-inf")  # no answer holds a picture's placeholder
    results: dict[int, Exception] = {}
    shaped = scores
    if not all(job.plain for job in jobs):
        shaped = scores.clone()
        for row, job in enumerate(jobs):
            try:
                job.shape(shaped[row])
            except TandemError as error:  # of its own grammar; the batch goes on
                results[row] = error
    tokens, sound = choose(shaped, [job.draw for job in jobs], [job.position for job in jobs])
    for row, is_number in enumerate(sound):
        if row not in results and not is_number:
            results[row] = EngineFailed(
                "The model's output is not a number.",
                remedy="Give the worker --dtype bfloat16 or float32.",
            )
    return [
        results[row] if row in results else _pushed(job, tokens[row], scores[row])
        for row, job in enumerate(jobs)
    ]


def _pushed(job: Job, token_id: int, scores: torch.Tensor) -> Delta | Exception:
    try:
        return job.push(token_id, scores)
    except Exception as exc:  # noqa: BLE001 - the job's own, and told to it
        return exc


def on_device(inputs: Inputs, network: object) -> Inputs:
    """``inputs`` where the network computes, pixels in its precision."""
    device, dtype = network.device, network.dtype  # type: ignore[attr-defined]
    return {
        name: value.to(device, dtype if value.is_floating_point() else None)
        for name, value in inputs.items()
    }


def lengthened(inputs: Inputs, ids: Sequence[int]) -> Inputs:
    """``inputs`` with ``ids`` behind the prompt, and a mask that hides nothing."""
    prompt = inputs["input_ids"]
    tail = torch.tensor([list(ids)], dtype=prompt.dtype)
    longer = {
        name: torch.cat([value, torch.zeros_like(tail, dtype=value.dtype)], dim=1)
        if value.shape == prompt.shape  # per token, as mm_token_type_ids: 0 is text
        else value
        for name, value in inputs.items()
    }
    longer["input_ids"] = torch.cat([prompt, tail], dim=1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    return longer
