"""Interchangeable, proven: 300 prompts to either kind through the controller, the same tokens.

float32, greedy, on the CPU. Both kinds are asked at the same time, eight prompts at once and in
opposite order, so that each prompt shares its batch with others in either kind.
"""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from bench.prompts import Prompt, prompts
from tests.contract.conftest import START_TIMEOUT_S
from tests.streams import Answer, ask

pytestmark = pytest.mark.timeout(2 * START_TIMEOUT_S + 240)

AT_ONCE = 8


def test_both_kinds_give_the_same_tokens(controller: str) -> None:
    asked = prompts("pocket-llava", ("formal", "terse"))
    assert len(asked) == 300
    # Neighbours change: each kind meets every prompt among others than the other kind does.
    with ThreadPoolExecutor(AT_ONCE) as forwards, ThreadPoolExecutor(AT_ONCE) as backwards:
        hf = [forwards.submit(_ask, controller, "hf", prompt) for prompt in asked]
        sglang = [backwards.submit(_ask, controller, "sglang", prompt) for prompt in asked[::-1]]
        pairs = [(a.result(), b.result()) for a, b in zip(hf, sglang[::-1], strict=True)]
    different = [
        (prompt.sort, a.text, b.text)
        for prompt, (a, b) in zip(asked, pairs, strict=True)
        if _facts(a) != _facts(b)
    ]
    assert not different
    sorts = Counter(prompt.sort for prompt in asked)
    assert len(sorts) == 6
    assert min(sorts.values()) >= 50
    assert len({a.text for a, _ in pairs}) > 150, "they are questions with different answers"
    assert any(
        prompt.sort == "stop" and a.finished.reason == "stop"
        for prompt, (a, _) in zip(asked, pairs, strict=True)
    )


def _ask(controller: str, kind: str, prompt: Prompt) -> Answer:
    fields = prompt.request.model_dump(mode="json", exclude_unset=True)
    return ask(controller, timeout_s=120, kind=kind, **fields)


def _facts(answer: Answer) -> tuple[object, ...]:
    end = answer.finished
    return answer.token_ids, answer.text, end.reason, end.prompt_tokens, end.completion_tokens
