"""Answers that keep to a JSON schema or a regex: what may come next, token by token.

Shared by the kinds that choose tokens with torch, so that the same may come next in each.
xgrammar is imported with the first request that needs it: 0.3 s and 22 MB on top of torch and
transformers, and most workers never serve one.
"""

from __future__ import annotations

import codecs
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from protocol.errors import InvalidRequest, Unsupported
from protocol.messages import SamplingParams
from workers.grammar_limits import check_regex, check_schema
from workers.text import REPLACEMENT

CACHE_BYTES = 64 << 20  # of compiled grammars; one takes 0.1 to 10 MB
STEP_LIMIT_S = 0.25  # of CPU time: all other requests of the batch wait meanwhile

_SAMPLES = 200

# xgrammar takes any two bytes that look like a lead and a continuation, and so surrogates and
# overlong forms. By lead byte: the second bytes that UTF-8 does not have after it.
_NO_SECOND = {
    0xE0: range(0x80, 0xA0),
    0xED: range(0xA0, 0xC0),
    0xF0: range(0x80, 0x90),
    0xF4: range(0x90, 0xC0),
}
_XGRAMMAR_SAYS = re.compile(r".*?\S+\.cc:\d+: (Check failed: .*? is false: )?", re.DOTALL)


class Grammar:
    """The state of one request: what may follow the tokens accepted so far.

    ``ended`` is true when nothing may follow: after an end token, or, for a model without end
    tokens, when the text is complete and cannot go on.
    """

    def __init__(
        self,
        matcher: Any,
        words: torch.Tensor,
        *,
        width: int,
        ends: bool,
        kept_first: torch.Tensor | None,
        kept_after: Mapping[int, torch.Tensor],
    ) -> None:
        self._matcher = matcher
        self._kept_after = kept_after  # by token id: words without what breaks its last character
        self._kept = kept_first
        self._words = words  # [1, ceil(width / 32)] int32 on the CPU, a bit for each token
        self._width = width
        self._has_end_tokens = ends
        self.ended = False
        self._look_for_end()

    def words(self) -> torch.Tensor:
        """What may come next [ceil(V / 32)], int32 on the CPU: a bit for each token, lowest first.

        The tensor is the grammar's own and changes with it.

        Raises:
            InvalidRequest: nothing may come next, because this vocabulary cannot spell it, or
                the grammar is too ambiguous to be followed.
        """
        self._fill()
        words = self._words[0]
        if self._kept is not None:
            words &= self._kept
        if not words.any():
            raise _unspellable()
        return words

    def mask(self, scores: torch.Tensor) -> None:
        """Set the scores ``[V]`` or ``[1, V]`` of what may not come next to -inf, in place.

        Raises:
            InvalidRequest: as ``words``.
        """
        words = self.words().to(scores.device)
        # Not xgrammar's own function: on an accelerator it compiles a kernel first.
        bits = 1 << torch.arange(32, dtype=torch.int32, device=words.device)
        forbidden = (words[:, None] & bits).eq(0).view(-1)[: self._width]
        scores.masked_fill_(forbidden, float("-inf"))

    def accept(self, token_id: int) -> None:
        """Go on after ``token_id``.

        Raises:
            InvalidRequest: it may not come next, or the grammar is too ambiguous to be followed.
        """
        began_s = time.thread_time()
        accepted = self._matcher.accept_token(token_id)
        _check_pace(began_s)
        if not accepted:
            raise InvalidRequest(
                f"Token {token_id} does not fit the grammar of the request.",
                remedy="Resume with the tokens that the same model gave for the same grammar.",
            )
        self._kept = self._kept_after.get(token_id)
        self._look_for_end()

    def _look_for_end(self) -> None:
        self.ended = self._matcher.is_terminated()
        if not self.ended and not self._has_end_tokens:
            self._fill()
            self.ended = not self._words.any() and self._matcher.is_completed()

    def _fill(self) -> None:
        began_s = time.thread_time()
        self._matcher.fill_next_token_bitmask(self._words)
        _check_pace(began_s)


def _check_pace(began_s: float) -> None:
    if time.thread_time() - began_s > STEP_LIMIT_S:
        raise InvalidRequest(
            "The grammar is too ambiguous to be followed.",
            remedy="Let its repeats differ in what they begin with, or nest fewer of them.",
        )


class Grammars:
    """Compiles the grammars of requests for one model and keeps the last used; thread-safe.

    ``logits_width`` is the V of the network's scores. ``never`` are tokens that may not be
    generated though the tokenizer does not call them special, such as an image's placeholder.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        logits_width: int,
        eos_ids: frozenset[int],
        never: Iterable[int] = (),
    ) -> None:
        self._tokenizer = tokenizer
        self._width = logits_width
        self._eos_ids = sorted(i for i in eos_ids if i < logits_width)
        self._never = frozenset(never)
        self._compiler: Any = None
        self._kept_first: torch.Tensor | None = None
        self._kept_after: dict[int, torch.Tensor] = {}
        self._starting = threading.Lock()

    def compile(self, request: SamplingParams) -> Grammar | None:
        """The grammar of ``request``, before its first token; blocking, up to seconds.

        Raises:
            InvalidRequest: the schema or regex is wrong, too costly, or impossible to spell.
            Unsupported: the tokens of this model cannot be read.
        """
        if request.json_schema is None and request.regex is None:
            return None
        if request.json_schema is not None:
            check_schema(request.json_schema)
        regex = None if request.regex is None else check_regex(request.regex)
        compiler = self._started()
        import xgrammar

        name = "json_schema" if regex is None else "regex"
        try:
            if regex is None:
                # With free whitespace a weak model writes nothing else up to the token limit.
                compiled = compiler.compile_json_schema(request.json_schema, any_whitespace=False)
            else:
                compiled = compiler.compile_regex(regex)
        except (RuntimeError, TypeError, ValueError) as exc:
            said = " ".join(_XGRAMMAR_SAYS.sub("", str(exc), count=1).split())[:200]
            raise InvalidRequest(
                f"The {name} is not one that can be followed: {said.removesuffix('.')}.",
                remedy="Correct it; the sentence says what xgrammar cannot take.",
            ) from exc
        grammar = Grammar(
            xgrammar.GrammarMatcher(compiled),
            xgrammar.allocate_token_bitmask(1, self._width),
            width=self._width,
            ends=bool(self._eos_ids),
            kept_first=self._kept_first,
            kept_after=self._kept_after,
        )
        if not grammar.ended:
            grammar.words()  # what cannot begin is refused here
        return grammar

    def _started(self) -> Any:
        with self._starting:
            if self._compiler is None:
                import xgrammar

                spelling = self._spelling()
                lost = self._lost_at_the_start(spelling)
                self._kept_first = self._without(lost) if lost else None
                self._kept_after = _kept_after(spelling, self._without)
                vocabulary = xgrammar.TokenizerInfo(
                    spelling,
                    xgrammar.VocabType.RAW,
                    vocab_size=self._width,
                    stop_token_ids=self._eos_ids,
                )
                self._compiler = xgrammar.GrammarCompiler(
                    vocabulary,
                    max_threads=torch.get_num_threads(),
                    cache_limit_bytes=CACHE_BYTES,
                )
            return self._compiler

    def _spelling(self) -> list[bytes]:
        """The bytes of each token, empty for those that are no text: never allowed then."""
        import xgrammar

        tokenizer = self._tokenizer
        try:
            # Its end tokens do not matter here, and it warns if it knows none.
            found = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=self._width, stop_token_ids=self._eos_ids or [0]
            )
        except (RuntimeError, TypeError, ValueError) as exc:
            raise _unreadable() from exc
        spelling: list[bytes] = list(found.decoded_vocab)
        special = set(tokenizer.all_special_ids)
        for token_id, token in tokenizer.added_tokens_decoder.items():
            if token_id < self._width:  # written as it is, whatever the alphabet of the others
                spelling[token_id] = token.content.encode()
                special |= {token_id} if token.special else set()
        for token_id in special | self._never:
            if token_id < self._width:
                spelling[token_id] = b""
        self._check(spelling)
        return [text if _is_part_of_utf8(text) else b"" for text in spelling]

    def _lost_at_the_start(self, spelling: list[bytes]) -> list[int]:
        """The tokens that begin with a space, if the decoder drops the first space."""
        spaced = [i for i, text in enumerate(spelling) if text.startswith(b" ")]
        if not spaced or self._tokenizer.decode(spaced[:1]).startswith(" "):
            return []
        return spaced

    def _without(self, token_ids: Iterable[int]) -> torch.Tensor:
        """Words [ceil(V / 32)] with the bits of all tokens but these."""
        words = [-1] * ((self._width + 31) // 32)
        for token_id in token_ids:
            words[token_id // 32] &= ~(1 << token_id % 32)
        # Python's numbers have no sign bit.
        return torch.tensor(words, dtype=torch.int64).to(torch.int32)

    def _check(self, spelling: list[bytes]) -> None:
        """See that the tokenizer reads tokens as xgrammar guessed from its vocabulary."""
        ids = [i for i, text in enumerate(spelling) if text]
        sample = ids[:: max(1, len(ids) // _SAMPLES)]
        read = [
            self._tokenizer.decode([i], clean_up_tokenization_spaces=False).lstrip(" ")
            for i in sample
        ]
        told = [spelling[i].decode(errors="replace").lstrip(" ") for i in sample]
        # Decoders differ in how many U+FFFD half a character is.
        wrong = sum(a != b for a, b in zip(read, told, strict=True) if REPLACEMENT not in a)
        if not sample or wrong > len(sample) // 10:
            raise _unreadable()


def _is_part_of_utf8(text: bytes) -> bool:
    """Whether valid text can contain these bytes, which may begin and end inside a character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text.lstrip(bytes(range(0x80, 0xC0))))
    except UnicodeDecodeError:
        return False
    return True


def _kept_after(
    spelling: list[bytes], without: Callable[[Iterable[int]], torch.Tensor]
) -> dict[int, torch.Tensor]:
    by_first: dict[int, list[int]] = {}
    for token_id, text in enumerate(spelling):
        if text and 0x80 <= text[0] < 0xC0:
            by_first.setdefault(text[0], []).append(token_id)
    by_lead = {
        lead: without(i for second in seconds for i in by_first.get(second, ()))
        for lead, seconds in _NO_SECOND.items()
    }
    return {
        token_id: by_lead[text[-1]]
        for token_id, text in enumerate(spelling)
        if text and text[-1] in by_lead
    }


def _unspellable() -> InvalidRequest:
    return InvalidRequest(
        "The grammar asks for text that this model's tokens cannot spell.",
        remedy="Correct a schema that contains itself, allow other characters, or choose another "
        "model.",
    )


def _unreadable() -> Unsupported:
    return Unsupported(
        "This model's tokenizer spells its tokens in a way that grammars cannot read.",
        remedy="Leave json_schema and regex out, or choose another model.",
    )
