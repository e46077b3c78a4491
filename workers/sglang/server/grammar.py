"""SGLang's grammar backend: the grammars that the other kinds use, and what they refuse.

A request gives its grammar with the tokens that it resumes, as ``request.grammar_spec`` writes
them, in the field ``json_schema``. What is wrong goes back in SGLang's sentence as
``request.wire_text`` writes it. Nothing is raised into SGLang's loop but what ends one request.
"""

from __future__ import annotations

import logging
import threading
import traceback
from collections.abc import Iterable
from concurrent.futures import Future
from typing import Any

from sglang.srt.constrained.base_grammar_backend import BaseGrammarBackend, InvalidGrammarObject
from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar

from protocol.errors import EngineFailed, TandemError
from workers.answer import eos_ids as ends_of
from workers.grammar import Grammar, Grammars
from workers.sglang.request import GrammarSpec, wire_text

log = logging.getLogger(__name__)


class Matching(XGrammarGrammar):
    """The state of one request. From its base class it has what puts masks on scores.

    What may come next is found out as soon as a token is accepted: this is where SGLang takes an
    exception for the end of the one request, whereas one raised later would end the server.
    """

    def __init__(self, grammar: Grammar, vocab_size: int) -> None:
        super().__init__(None, vocab_size, None, None, grammar_stats=None)
        self._grammar = grammar
        self._words = None if grammar.ended else grammar.words()

    def accept_token(self, token: int) -> None:
        """Go on after ``token``.

        Raises:
            ValueError: it does not fit, or nothing can follow it.
        """
        if self._grammar.ended:
            return
        try:
            self._grammar.accept(token)
            if not self._grammar.ended:
                self._words = self._grammar.words()
        except TandemError as error:
            raise ValueError(wire_text(error)) from error

    def is_terminated(self) -> bool:
        return self._grammar.ended

    def fill_vocab_mask(self, vocab_mask: Any, idx: int) -> None:
        vocab_mask[idx] = self._words

    def rollback(self, k: int) -> None:
        raise NotImplementedError("Tandem offers no grammars with speculative decoding")

    def copy(self) -> Matching:
        return self  # for SGLang's cache, which ours leaves empty


class Backend(BaseGrammarBackend):
    """Makes grammars in threads; xgrammar caches what it compiled, up to a limit."""

    def __init__(self, tokenizer: Any, vocab_size: int, eos_ids: Iterable[int]) -> None:
        super().__init__()
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._eos_ids = frozenset(eos_ids) | ends_of(tokenizer)
        self._grammars: Grammars | None = None
        self._starting = threading.Lock()

    def get_cached_or_future_value(
        self, key: tuple[str, str], require_reasoning: bool
    ) -> tuple[Future[Any], bool]:
        return self.executor.submit(self._make, key[1]), False

    def set_cache(self, key: tuple[str, str], value: object) -> None:
        """Keep nothing: there is no end to the tokens that requests resume."""

    def _make(self, text: str) -> Matching | InvalidGrammarObject:
        try:
            spec = GrammarSpec.model_validate_json(text)
            grammar = self._started(spec.never).compile(spec)
            assert grammar is not None
            for token_id in spec.resumed:
                grammar.accept(token_id)
            return Matching(grammar, self._vocab_size)
        except TandemError as error:
            return InvalidGrammarObject(wire_text(error))
        except Exception as error:  # noqa: BLE001 - SGLang would log it with all that a client sent
            return InvalidGrammarObject(wire_text(_unforeseen(error)))

    def _started(self, never: Iterable[int]) -> Grammars:
        """For all requests, with what the first one says must never come: it is the model's."""
        with self._starting:
            if self._grammars is None:
                self._grammars = Grammars(
                    self._tokenizer,
                    logits_width=self._vocab_size,
                    eos_ids=self._eos_ids,
                    never=never,
                )
            return self._grammars


def _unforeseen(error: Exception) -> EngineFailed:
    """``error`` without its words, which may be a client's."""
    kind = type(error).__name__
    frame = traceback.extract_tb(error.__traceback__)[-1]
    log.error("error while making a grammar: %s at %s:%s", kind, frame.filename, frame.lineno)
    return EngineFailed(f"The grammar could not be made ({kind}).")
