"""Log probabilities are those of the network's own distribution."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from transformers import AutoTokenizer, LlavaForConditionalGeneration  # noqa: E402

from protocol.events import LOWEST_LOGPROB  # noqa: E402
from workers.hf.logprobs import logprobs_of  # noqa: E402

MODEL = str(Path(__file__).parents[2] / "models" / "pocket-llava")


def spell(ids: list[int]) -> str:
    return "".join(f"<{i}>" for i in ids)


def test_they_equal_the_teacher_forced_ones() -> None:
    """Token by token with a cache, against one pass over the whole text."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    network = LlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()
    ids = tokenizer.encode("the red circle is left of the blue square")
    with torch.inference_mode():
        whole = network(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        cache = None
        for place, (token_id, following) in enumerate(pairwise(ids)):
            made = network(input_ids=torch.tensor([[token_id]]), past_key_values=cache)
            cache = made.past_key_values
            found = logprobs_of(made.logits[0, -1], following, 3, tokenizer.decode)
            assert found.logprob == pytest.approx(whole[place, following].item(), abs=1e-3)
            assert found.token == tokenizer.decode([following])
            best = whole[place].topk(3)
            assert [t.token_id for t in found.top] == best.indices.tolist()
            assert [t.logprob for t in found.top] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_top_is_best_first_and_may_lack_the_chosen() -> None:
    found = logprobs_of(torch.tensor([0.0, 3.0, 1.0, 2.0]), 0, 2, spell)
    assert [top.token_id for top in found.top] == [1, 3]
    assert found.top[0].token == "<1>"
    assert found.logprob < found.top[1].logprob < found.top[0].logprob < 0


def test_no_top_is_asked_for() -> None:
    assert logprobs_of(torch.zeros(4), 1, 0, spell).top == ()


def test_more_than_the_vocabulary_is_the_vocabulary() -> None:
    assert len(logprobs_of(torch.zeros(4), 1, 20, spell).top) == 4


def test_the_impossible_is_very_unlikely() -> None:
    scores = torch.tensor([0.0, float("-inf")], dtype=torch.bfloat16)
    found = logprobs_of(scores, 1, 2, spell)
    assert found.logprob == found.top[1].logprob == LOWEST_LOGPROB
    assert found.top[0].logprob == 0.0


def test_the_scores_stay_as_they_are() -> None:
    scores = torch.randn(16)
    before = scores.clone()
    logprobs_of(scores, 3, 5, spell)
    assert torch.equal(scores, before)
