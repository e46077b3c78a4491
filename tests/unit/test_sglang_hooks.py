"""What is changed in SGLang, on plain copies of what is changed."""

from __future__ import annotations

import importlib
import sys
import traceback
from array import array
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from workers.sglang.process import explain  # noqa: E402
from workers.sglang.server import hooks, imports  # noqa: E402

# ---------------------------------------------------------------- after an import


def test_a_module_is_changed_when_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "late_module.py").write_text("value = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))

    def double(module: ModuleType) -> None:
        module.value *= 2  # type: ignore[attr-defined]

    imports.after("late_module", double)
    imports.after("late_module", double)
    module = importlib.import_module("late_module")
    try:
        assert module.value == 4
        imports.after("late_module", double)
        assert module.value == 8, "it was there already"
        assert importlib.reload(module).value == 1, "once is enough"
    finally:
        del sys.modules["late_module"]


class Known:
    def step(self, batch: object) -> object:
        return batch


def test_what_is_not_as_it_was_is_not_changed() -> None:
    def around(function: hooks.Function) -> hooks.Function:
        raise AssertionError

    with pytest.raises(hooks.ChangedError, match=r"Known\.stride.*pip install 'sglang=="):
        hooks.wrap(Known, "stride", ("self", "batch"), around)
    with pytest.raises(hooks.ChangedError, match=r"the parameters of Known\.step"):
        hooks.wrap(Known, "step", ("self",), around)


def test_what_has_changed_reaches_the_user() -> None:
    error = hooks.ChangedError("the parameters of ModelRunner.sample")
    said = explain(["Traceback (most recent call last):", *traceback.format_exception_only(error)])
    assert "the parameters of ModelRunner.sample" in said
    assert "pip install 'sglang==" in said


def test_a_module_that_is_gone_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hooks, "ACTIONS", {"pytest.no_such_module": lambda module: None})
    with pytest.raises(hooks.ChangedError, match="no_such_module"):
        hooks.install()


# ---------------------------------------------------------------- penalties


def req(
    prompt: list[int], answer: list[int], penalty: float | None = None, resumed: int = 0
) -> Any:
    """A request of SGLang's; all its penalties are ``penalty``, or none."""
    params = SimpleNamespace(
        repetition_penalty=1.0 if penalty is None else penalty,
        presence_penalty=penalty or 0.0,
        frequency_penalty=penalty or 0.0,
        custom_params={"resumed_tokens": resumed} if resumed else None,
    )
    return SimpleNamespace(origin_input_ids=prompt, output_ids=answer, sampling_params=params)


def test_the_answer_is_what_was_resumed_and_what_was_made() -> None:
    assert hooks.answer_so_far(req([1, 2, 3], [])) == []
    assert hooks.answer_so_far(req([1, 2, 3], [4], resumed=2)) == [2, 3, 4]


PENALTIES = [hooks.REPETITION, hooks.PRESENCE, hooks.FREQUENCY]


def new_penalizer(penalty: hooks.Penalty) -> Any:
    """SGLang's, in few words, with our changes."""

    class Penalizer:
        def __init__(self, reqs: list[Any]) -> None:
            self.orchestrator = SimpleNamespace(reqs=lambda: reqs)

        def _prepare(self) -> None:
            values = torch.tensor([penalty.of(req) for req in self.orchestrator.reqs()])
            setattr(self, f"{penalty.name}_penalties", values[:, None])
            table = torch.full((len(values), 10), penalty.neutral)
            setattr(self, f"cumulated_{penalty.name}_penalties", table)

        def _cumulate_output_tokens(self, output_ids: Any) -> None:
            raise AssertionError

        def is_prepared(self) -> bool:
            return hasattr(self, f"{penalty.name}_penalties")

    Penalizer.__name__ = penalty.penalizer
    module: Any = SimpleNamespace(**{penalty.penalizer: Penalizer})
    hooks._change_penalizer(penalty)(module)
    return Penalizer


def punished(penalty: hooks.Penalty, penalizer: Any) -> list[dict[int, float]]:
    rows = penalty.table(penalizer).tolist()
    return [{i: round(p, 3) for i, p in enumerate(row) if p != penalty.neutral} for row in rows]


def cost(penalty: hooks.Penalty, value: float, times: int) -> float:
    return value * times if penalty.each_time else value


@pytest.fixture(params=PENALTIES, ids=lambda penalty: penalty.name)
def penalty(request: pytest.FixtureRequest) -> hooks.Penalty:
    found: hooks.Penalty = request.param
    return found


def test_a_penalizer_that_is_gone_is_noticed(penalty: hooks.Penalty) -> None:
    with pytest.raises(hooks.ChangedError, match=penalty.penalizer):
        hooks._change_penalizer(penalty)(ModuleType("empty"))


def test_a_new_batch_knows_the_answers_in_it(penalty: hooks.Penalty) -> None:
    reqs = [req([1, 2, 3], [], 2.0, resumed=2), req([1, 2], [5, 5], 0.5), req([1], [6])]
    penalizer = new_penalizer(penalty)(reqs)
    penalizer._prepare()
    twice = cost(penalty, 0.5, 2)
    assert punished(penalty, penalizer) == [{2: 2.0, 3: 2.0}, {5: twice}, {}]


def test_a_prompt_is_never_punished(penalty: hooks.Penalty) -> None:
    """Before its first token SGLang gives a prompt's last; behind a picture it is no token."""
    reqs = [req([1, 2], [7], 2.0), req([1, 10**9], [], 2.0)]
    penalizer = new_penalizer(penalty)(reqs)
    penalizer._prepare()
    penalizer._cumulate_output_tokens(torch.tensor([7, 10**9]))
    assert punished(penalty, penalizer) == [{7: 2.0}, {}]
    reqs[0].output_ids, reqs[1].output_ids = [7, 8], [4]
    penalizer._cumulate_output_tokens(torch.tensor([8, 4]))
    assert punished(penalty, penalizer) == [{7: 2.0, 8: 2.0}, {4: 2.0}]


def test_no_token_is_skipped_or_counted_twice(penalty: hooks.Penalty) -> None:
    """Where a prefill comes between two steps, an answer has grown by two or not at all."""
    reqs = [req([1], [], 2.0), req([1], []), req([1], [], 0.5)]
    penalizer = new_penalizer(penalty)(reqs)
    penalizer._prepare()
    for answer in ([], [3], [3], [3, 4, 4], [3, 4, 4, 6]):  # what is known at each step of them
        reqs[0].output_ids = reqs[1].output_ids = array("q", answer)
        last = answer[-1] if answer else 1
        penalizer._cumulate_output_tokens(torch.tensor([last, last, 1]))
    assert punished(penalty, penalizer) == [{3: 2.0, 4: cost(penalty, 2.0, 2), 6: 2.0}, {}, {}]


class Info:
    acc_scaling_penalties: Any
    acc_additive_penalties: Any

    def __init__(self, *penalizers: Any) -> None:
        by_kind = {type(penalizer): penalizer for penalizer in penalizers}
        self.penalizer_orchestrator = SimpleNamespace(penalizers=by_kind)

    def copy_for_forward(self) -> Info:
        copied = Info.__new__(Info)
        copied.acc_scaling_penalties = torch.ones(3, 10)
        copied.acc_additive_penalties = torch.zeros(3, 10)
        for kind, penalizer in self.penalizer_orchestrator.penalizers.items():
            if not penalizer.is_prepared():
                continue
            table = hooks.PENALIZERS[kind.__name__].table(penalizer)
            if "Repetition" in kind.__name__:
                copied.acc_scaling_penalties *= table
            else:
                copied.acc_additive_penalties -= table
        return copied


@pytest.fixture
def changed_info(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Info, "copy_for_forward", Info.copy_for_forward)  # put back afterwards
    hooks._change_sampling_info(SimpleNamespace(SamplingBatchInfo=Info))  # type: ignore[arg-type]


@pytest.mark.parametrize("decodes", [True, False])
def test_the_newest_token_is_punished_in_its_own_step(changed_info: None, decodes: bool) -> None:
    """Here the newest of each is 2: the first has had it, the second's is known already."""
    reqs = [req([1], [2, 2], 2.0), req([1], [5, 2], 2.0), req([1], [3])]
    penalizers = [new_penalizer(penalty)(reqs) for penalty in PENALTIES]
    for penalizer in penalizers:
        penalizer._prepare()
    info = Info(*penalizers)
    batch = SimpleNamespace(
        sampling_info=info.copy_for_forward(),
        forward_mode=SimpleNamespace(is_decode=lambda: decodes),
        input_ids=torch.tensor([2, 2, 2, 0], dtype=torch.int32),  # longer than the batch, as
        seq_lens=torch.tensor([4, 3, 3, 1]),  # graphs on a GPU pad it
    )
    hooks.penalize_newest(batch)
    scaling, additive = (
        batch.sampling_info.acc_scaling_penalties,
        batch.sampling_info.acc_additive_penalties,
    )
    assert scaling[:, 2].tolist() == [2.0, 2.0, 1.0]
    times = 3 if decodes else 2
    assert additive[:, 2].tolist() == [-2.0 - 2 * times, -2.0 - 2, 0.0]
    assert additive.ne(0).sum() == 3, "no other token is charged"
    assert [punished(*pair)[0][2] for pair in zip(PENALTIES, penalizers, strict=True)] == [
        2.0,
        2.0,
        4.0,
    ], "the copy alone is changed"


def test_a_first_token_is_punished_in_the_second_step(changed_info: None) -> None:
    reqs = [req([1], [], 2.0)] * 3
    penalizers = [new_penalizer(penalty)(reqs) for penalty in PENALTIES]
    for penalizer in penalizers:
        penalizer._prepare()
    batch = SimpleNamespace(
        sampling_info=Info(*penalizers).copy_for_forward(),
        forward_mode=SimpleNamespace(is_decode=lambda: True),
        input_ids=torch.tensor([2, 3, 4]),
        seq_lens=torch.tensor([2, 2, 2]),
    )
    hooks.penalize_newest(batch)
    assert batch.sampling_info.acc_additive_penalties[0, 2] == -4
    assert batch.sampling_info.acc_scaling_penalties[0, 2] == 2


def test_without_penalties_there_is_nothing_to_count(changed_info: None) -> None:
    reqs = [req([1], [2])]
    info = Info(*(new_penalizer(penalty)(reqs) for penalty in PENALTIES))  # none is prepared
    batch = SimpleNamespace(sampling_info=info.copy_for_forward())
    hooks.penalize_newest(batch)
    assert batch.sampling_info.acc_scaling_penalties.eq(1).all()
    assert batch.sampling_info.acc_additive_penalties.eq(0).all()


# ---------------------------------------------------------------- log probabilities


class Logprobs:
    """SGLang's processor: what it is given is what it writes."""

    def compute_logprobs(self, logprobs: Any, tops: Any, chosen: Any, token_ids: Any) -> Any:
        def write(output: Any) -> None:
            output.written = (logprobs, tops, token_ids)

        return SimpleNamespace(write_output_to=write)


class ModelRunner:
    model_config = SimpleNamespace(image_token_id=3)
    sampler = SimpleNamespace(output_logprob_processor=Logprobs())

    def sample(self, logits_output: Any, forward_batch: Any) -> Any:
        logits_output.next_token_logits.div_(7)  # as penalties and temperatures do, in place
        return logits_output.next_token_logits.argmax(-1)


@pytest.mark.parametrize("wanted", [True, False])
def test_logprobs_are_the_networks_and_no_image_is_chosen(
    monkeypatch: pytest.MonkeyPatch, wanted: bool
) -> None:
    monkeypatch.setattr(ModelRunner, "sample", ModelRunner.sample)  # put back afterwards
    hooks._change_runner(SimpleNamespace(ModelRunner=ModelRunner))  # type: ignore[arg-type]
    logits = torch.tensor([[0.0, 1.0, 2.0, 9.0]])
    output = SimpleNamespace(next_token_logits=logits.clone())
    batch = SimpleNamespace(
        return_logprob=wanted,
        top_logprobs_nums=[2],
        token_ids_logprobs=[None],
        sampling_info=SimpleNamespace(),
    )
    token_ids = ModelRunner().sample(output, batch)
    assert token_ids.tolist() == [2]
    if not wanted:
        assert not hasattr(output, "written")
        return
    logits[:, 3] = float("-inf")
    logprobs, tops, of = output.written
    assert torch.equal(logprobs, logits.log_softmax(-1))
    assert (tops, of.tolist()) == ([2], [2])
