"""What SGLang does otherwise than the protocol says, made so.

* Grammars come from ``server.grammar``, through SGLang's own registry of grammar backends: the
  same tokens may come next as in the other kinds, and a grammar can be resumed.
* Log probabilities are those of the network. SGLang's are taken after penalties and grammar.
* The penalties know the whole answer: the tokens that a request resumes, the newest one, which
  overlapped scheduling counts a step late, and no token of the prompt. They also know those made
  before the request had to leave the batch for a while.
* No answer holds the token that stands for an image.
* The tokens that a scheduler reports as used are all that the cache holds. SGLang's are those that
  running requests need; what waits to be asked again is left out.

``install`` arranges for it in each process before SGLang is imported. Where SGLang's code is not
the one that is changed here, its import raises ``ChangedError``: the server does not start.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from workers.sglang.request import GRAMMAR_BACKEND, RESUMED
from workers.sglang.server import imports, version

Function = Callable[..., Any]


class ChangedError(RuntimeError):
    """SGLang's code is not what Tandem knows."""

    def __init__(self, what: str) -> None:
        super().__init__(
            f"SGLang {version.installed()} has changed {what}, which Tandem adapts. "
            f"{version.REMEDY}"
        )


def install() -> None:
    """Have SGLang's modules changed when they are imported.

    Raises:
        ChangedError: there is no such module.
    """
    for name, action in ACTIONS.items():
        if not _is_there(name):
            raise ChangedError(name)
        imports.after(name, action)


def _is_there(name: str) -> bool:
    package, *rest = name.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return False
    return Path(spec.origin).parent.joinpath(*rest).with_suffix(".py").exists()


def wrap(
    owner: Any, name: str, parameters: Sequence[str], around: Callable[[Function], Function]
) -> None:
    """Put ``around(function)`` in the place of ``owner``'s function with these parameters.

    Raises:
        ChangedError: there is no such function.
    """
    function = getattr(owner, name, None)
    what = f"{owner.__name__}.{name}"
    if not inspect.isfunction(function):
        raise ChangedError(what)
    if tuple(inspect.signature(function).parameters) != tuple(parameters):
        raise ChangedError(f"the parameters of {what}")
    setattr(owner, name, around(function))


# ---------------------------------------------------------------- grammars


def _register_backend(module: ModuleType) -> None:
    register = getattr(module, "register_grammar_backend", None)
    if register is None:
        raise ChangedError("the registry of grammar backends")
    register(GRAMMAR_BACKEND, _backend)


def _backend(_server_args: Any, tokenizer: Any, vocab_size: int, eos_ids: Any) -> Any:
    from workers.sglang.server.grammar import Backend

    return Backend(tokenizer, vocab_size, eos_ids or ())


def allow_backend() -> None:
    """Let ``--grammar-backend`` take ours; before the flags are read."""
    from sglang.srt.server_args import add_grammar_backend_choices

    add_grammar_backend_choices([GRAMMAR_BACKEND])


# ---------------------------------------------------------------- log probabilities


def _change_runner(module: ModuleType) -> None:
    wrap(module.ModelRunner, "sample", ("self", "logits_output", "forward_batch"), _sampling)


def _sampling(sample: Function) -> Function:
    def sample_as_asked(self: Any, logits_output: Any, forward_batch: Any) -> Any:
        logits = logits_output.next_token_logits  # [requests, vocabulary]
        image_token_id = self.model_config.image_token_id
        if image_token_id is not None and 0 <= image_token_id < logits.shape[-1]:
            logits[:, image_token_id] = float("-inf")
        raw = logits.clone() if forward_batch.return_logprob else None
        penalize_newest(forward_batch)
        token_ids = sample(self, logits_output, forward_batch)
        if raw is not None:
            self.sampler.output_logprob_processor.compute_logprobs(
                raw.float().log_softmax(-1),
                forward_batch.top_logprobs_nums,
                forward_batch.token_ids_logprobs,
                token_ids,
            ).write_output_to(logits_output)
        return token_ids

    return sample_as_asked


# ---------------------------------------------------------------- penalties


@dataclass(frozen=True, slots=True)
class Penalty:
    """One of SGLang's, and the names it has there."""

    name: str
    neutral: float
    each_time: bool = False  # the more often a token has come, the more it costs

    @property
    def penalizer(self) -> str:
        return f"Batched{self.name.capitalize()}Penalizer"

    @property
    def counted(self) -> str:
        """Set on a request: how many of its tokens its penalizer knows."""
        return f"tandem_{self.name}_counted"

    def of(self, req: Any) -> float:
        value: float = getattr(req.sampling_params, f"{self.name}_penalty")
        return value

    def values(self, penalizer: Any) -> Any:
        """What each request asked for, [requests, 1]."""
        return getattr(penalizer, f"{self.name}_penalties")

    def table(self, penalizer: Any) -> Any:
        """What each token would cost now, [requests, vocabulary]."""
        return getattr(penalizer, f"cumulated_{self.name}_penalties")


REPETITION = Penalty("repetition", 1.0)
PRESENCE = Penalty("presence", 0.0)
FREQUENCY = Penalty("frequency", 0.0, each_time=True)


def _change_penalizer(penalty: Penalty) -> imports.Action:
    def change(module: ModuleType) -> None:
        penalizer = getattr(module, penalty.penalizer, None)
        if penalizer is None:
            raise ChangedError(f"the name {penalty.penalizer}")
        cumulating = partial(_cumulating, penalty)
        wrap(penalizer, "_prepare", ("self",), partial(_preparing, penalty))
        wrap(penalizer, "_cumulate_output_tokens", ("self", "output_ids"), cumulating)

    return change


def answer_so_far(req: Any) -> list[int]:
    """The tokens of ``req``'s answer: those it resumes, which SGLang takes for prompt, and more."""
    resumed = (req.sampling_params.custom_params or {}).get(RESUMED, 0)
    prompt = req.origin_input_ids
    return [*prompt[len(prompt) - resumed :], *req.output_ids]


def _preparing(penalty: Penalty, prepare: Function) -> Function:
    import torch

    def prepare_with_answers(self: Any) -> None:
        prepare(self)
        table = penalty.table(self)
        for row, req in enumerate(self.orchestrator.reqs()):
            value = penalty.of(req)
            if value == penalty.neutral:
                continue
            setattr(req, penalty.counted, len(req.output_ids))
            if counts := Counter(answer_so_far(req)):
                costs = [value * n if penalty.each_time else value for n in counts.values()]
                table[row, list(counts)] = torch.tensor(costs, device=table.device)

    return prepare_with_answers


def _cumulating(penalty: Penalty, _cumulate: Function) -> Function:

    def cumulate_answers(self: Any, output_ids: Any) -> None:
        # SGLang gives the newest one known, or the prompt's last. Answers have grown by two
        # where another request's prefill has come between two steps.
        pairs = []
        for row, req in enumerate(self.orchestrator.reqs()):
            if penalty.of(req) != penalty.neutral:
                pairs += [(row, token) for token in req.output_ids[getattr(req, penalty.counted) :]]
                setattr(req, penalty.counted, len(req.output_ids))
        if not pairs:
            return
        rows, token_ids = _sent(pairs, output_ids.device).unbind(1)
        values = penalty.values(self)[rows, 0]
        penalty.table(self).index_put_((rows, token_ids), values, accumulate=penalty.each_time)

    return cumulate_answers


def _sent(values: Sequence[Any], device: Any) -> Any:
    """A tensor of ``values``, as SGLang sends them: to wait for it is to wait for the last step."""
    import torch

    return torch.tensor(values, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def _change_sampling_info(module: ModuleType) -> None:
    wrap(module.SamplingBatchInfo, "copy_for_forward", ("self",), _copying)


def _copying(copy_for_forward: Function) -> Function:
    def copy_with_penalties(self: Any) -> Any:
        copied = copy_for_forward(self)
        copied.penalties_of_newest = {
            penalty: found
            for kind, penalizer in self.penalizer_orchestrator.penalizers.items()
            if penalizer.is_prepared() and (penalty := PENALIZERS.get(kind.__name__))
            for found in [_of_newest(penalty, penalizer)]
        }
        return copied

    return copy_with_penalties


def _of_newest(penalty: Penalty, penalizer: Any) -> tuple[Any, Any]:
    """What to charge for the newest tokens, and what tells whether it has been.

    The tables change while the copy is used.
    """
    values = penalty.values(penalizer)
    if penalty is FREQUENCY:
        known = [
            len(req.origin_input_ids) + getattr(req, penalty.counted, 0)
            for req in penalizer.orchestrator.reqs()
        ]
        return values, _sent(known, values.device)[:, None]
    return values, penalty.table(penalizer).clone() if penalty is PRESENCE else None


def penalize_newest(forward_batch: Any) -> None:
    """Count the tokens that this step goes on from, which SGLang may not know yet."""
    info = forward_batch.sampling_info
    penalties = getattr(info, "penalties_of_newest", None)
    if not penalties or not forward_batch.forward_mode.is_decode():
        return
    for penalty, (values, known) in penalties.items():
        newest = forward_batch.input_ids[: len(values), None].long()
        if penalty is REPETITION:
            info.acc_scaling_penalties.scatter_(1, newest, values)
        elif penalty is PRESENCE:
            info.acc_additive_penalties.scatter_add_(1, newest, known.gather(1, newest) - values)
        else:
            unknown = forward_batch.seq_lens[: len(values), None] - known  # 0 or 1
            info.acc_additive_penalties.scatter_add_(1, newest, -values * unknown)


PENALIZERS = {penalty.penalizer: penalty for penalty in (REPETITION, PRESENCE, FREQUENCY)}


# ---------------------------------------------------------------- the cache


def _change_loads(module: ModuleType) -> None:
    wrap(module.SchedulerLoadInquirer, "get_loads", ("self",), _holding)


def _holding(get_loads: Function) -> Function:
    def get_loads_with_cache(self: Any) -> Any:
        loads = get_loads(self)
        pool = self.pool_stats_observer.get_pool_stats()
        loads.num_used_tokens = pool.full_num_used + pool.full_evictable_size
        return loads

    return get_loads_with_cache


ACTIONS: dict[str, imports.Action] = {
    "sglang.srt.constrained.base_grammar_backend": _register_backend,
    "sglang.srt.managers.scheduler_components.load_inquirer": _change_loads,
    "sglang.srt.model_executor.model_runner": _change_runner,
    "sglang.srt.sampling.penaltylib.frequency_penalty": _change_penalizer(FREQUENCY),
    "sglang.srt.sampling.penaltylib.presence_penalty": _change_penalizer(PRESENCE),
    "sglang.srt.sampling.penaltylib.repetition_penalty": _change_penalizer(REPETITION),
    "sglang.srt.sampling.sampling_batch_info": _change_sampling_info,
}
"""By module of SGLang: what is done to it."""
