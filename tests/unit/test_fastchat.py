"""Which requests are FastChat's, and its form of logprobs."""

from __future__ import annotations

from collections.abc import AsyncGenerator

import orjson
import pytest

from protocol.events import Delta, Event, Finished, TokenLogprob, TopLogprob
from transport import fastchat


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"echo": False}, True),
        ({"model": "echo"}, False),
        ({"prompt": 'say {"echo": true}'}, False),
        ({"prompt": "Hi"}, False),
    ],
)
def test_who_has_sent_it(fields: dict[str, object], expected: bool) -> None:
    assert fastchat.has_sent(orjson.dumps(fields)) == expected
    spaced = orjson.dumps(fields).replace(b'":', b'" : ')
    assert fastchat.has_sent(spaced) == expected


async def test_logprobs_of_a_whole_answer() -> None:
    async def events() -> AsyncGenerator[Event]:
        for token, logprob in (("one", -0.5), (" two", -1.0)):
            top = (TopLogprob(token_id=1, token=token, logprob=logprob),)
            chosen = TokenLogprob(token_id=1, token=token, logprob=logprob, top=top)
            yield Delta(text=token, token_ids=(1,), logprobs=(chosen,))
        yield Finished(reason="stop", prompt_tokens=3, completion_tokens=2)

    (answer,) = [orjson.loads(bytes(part)) async for part in fastchat.whole(events(), "P ")]
    assert answer["text"] == "P one two"
    assert answer["usage"]["total_tokens"] == 5
    assert answer["logprobs"] == {
        "text_offset": [0, 3],
        "tokens": ["one", " two"],
        "token_logprobs": [-0.5, -1.0],
        "top_logprobs": [{"one": -0.5}, {" two": -1.0}],
    }
