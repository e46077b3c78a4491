"""What a grammar may cost, decided before xgrammar sees it: its compiler cannot be interrupted.

Figures below: xgrammar 0.2.7, 94 000 tokens, one thread of a slow CPU. What hurts is not length
but repetition: each repeat is tried against every token of the vocabulary, and repeats of repeats
with nothing fixed in them, ``([a-z]{0,100}){0,100}``, never come back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import orjson

from protocol.errors import InvalidRequest

MAX_REGEX_CHARS = 4096  # 10 000 literal characters compile in 0.06 s and take 2 MB
MAX_SCHEMA_CHARS = 65_536  # an enum of 10 000 values, twice as long, compiles in 1.2 s
MAX_DEPTH = 64  # 100 levels compile in 0.06 s, 500 in 7.5 s, 1000 not in 30 s
MAX_OPTIONAL = 100  # optional properties of an object: 100 take 0.4 s, 300 4.4 s, 1000 over 30 s
MAX_REPEATS = 3  # of repeats in repeats
MAX_COST = 1000  # in repeated characters; a string with maxLength 100 compiles in 7 s
FREE_CHARS = 256  # of one string: with maxLength 150 or 100 000, it compiles in the same time
STAR_COST = 25  # twenty of ``[a-z]?`` in a row take 0.2 s a step, forty over a second

_TOKEN = re.compile(
    r"""(?P<open>\((?:\?.?)?) | (?P<close>\)) | (?P<bar>\|) | (?P<anchor>[\^$])
    | (?P<count>[*+?] | \{\d+(?:,\d*)?\}) (?P<lazy>\??)
    | (?P<atom>\\. | \[\^?(?:\\.|[^\]\\])*\] | .)""",
    re.VERBOSE | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class _Piece:
    """A part of a regex: how long, how costly, how many repeats deep, and is any of it fixed."""

    size: int = 0
    cost: int = 0
    depth: int = 0
    fixed: bool = False

    def __add__(self, other: _Piece) -> _Piece:
        return _Piece(
            self.size + other.size,
            self.cost + other.cost,
            max(self.depth, other.depth),
            self.fixed or other.fixed,
        )

    def __or__(self, other: _Piece) -> _Piece:
        return replace(self + other, fixed=self.fixed and other.fixed)

    def repeated(self, low: int, high: int | None) -> _Piece:
        if self.depth and not self.fixed and high != 1:
            raise InvalidRequest(
                "The regex repeats what is itself all repeats, as (a+)+ does.",
                remedy="Put something fixed, such as a separator, between the inner repeats.",
            )
        if high is None or high == 1:
            cost = self.cost + STAR_COST
        else:
            cost = (self.cost + self.size) * high
        varies = low != high
        return _Piece(
            size=self.size * max(low, 1),
            cost=cost,
            depth=self.depth + (varies and high != 1) or int(varies),
            fixed=self.fixed and not varies and low > 0,
        )


@dataclass(slots=True)
class _Group:
    """A group that is being read: finished alternatives, the present one and its last piece."""

    others: _Piece | None = None
    now: _Piece = _Piece()
    last: _Piece = _Piece()

    def push(self, piece: _Piece) -> None:
        self.now += self.last
        self.last = piece

    def next_alternative(self) -> None:
        self.others = self.whole()
        self.now = self.last = _Piece()

    def whole(self) -> _Piece:
        whole = self.now + self.last
        return whole if self.others is None else self.others | whole


def check_regex(pattern: str) -> str:
    """``pattern`` in xgrammar's terms, where ``.`` is any character but a line break.

    Raises:
        InvalidRequest: it would cost too much, or has an anchor where xgrammar overlooks it.
    """
    return _check_regex(pattern)[0]


def _check_regex(pattern: str) -> tuple[str, int]:
    if len(pattern) > MAX_REGEX_CHARS:
        raise InvalidRequest(
            f"The regex has {len(pattern)} characters; {MAX_REGEX_CHARS} are allowed.",
            remedy="Shorten it, or send a json_schema with an enum.",
        )
    if "\0" in pattern:  # an older xgrammar would end the pattern there
        raise InvalidRequest("The regex has a null character.", remedy="Remove it.")
    groups = [_Group()]
    written: list[str] = []
    for token in _TOKEN.finditer(pattern):
        text = token[0]
        if token["open"]:
            if text not in ("(", "(?:"):
                raise InvalidRequest(
                    f"The regex has {text}, which grammars do not know.",
                    remedy="Use plain groups: ( ) and (?: ) only.",
                )
            groups.append(_Group())
            if len(groups) > MAX_DEPTH:
                raise InvalidRequest(
                    f"The regex nests more than {MAX_DEPTH} groups.",
                    remedy="Remove the groups it does not need.",
                )
        elif token["close"] and len(groups) > 1:  # one too many: xgrammar says so
            piece = groups.pop().whole()
            groups[-1].push(piece)
        elif token["bar"]:
            groups[-1].next_alternative()
        elif token["anchor"]:
            _check_anchor(pattern, token.start())
        elif token["count"]:
            groups[-1].last = groups[-1].last.repeated(*_bounds(token["count"]))
            if groups[-1].last.depth > MAX_REPEATS:
                raise InvalidRequest(
                    f"The regex nests repeats more than {MAX_REPEATS} deep.",
                    remedy="Repeat fewer of its groups.",
                )
        else:
            # Of these xgrammar cuts what is beyond ASCII off, with a warning.
            if text.startswith("[^") and not (text.isascii() and r"\u" not in text):
                raise InvalidRequest(
                    f"The regex has {text[:100]}, which excludes more than ASCII.",
                    remedy="List the characters that are allowed instead.",
                )
            groups[-1].push(_Piece(size=1, fixed=True))
            text = r"[^\n]" if text == "." else text
        written.append(text)
    cost = sum((group.whole() for group in groups), _Piece()).cost
    _check_cost(cost, "regex")
    return "".join(written), cost


def _bounds(count: str) -> tuple[int, int | None]:
    if count in "*+?":
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[count]
    low, comma, high = count[1:-1].partition(",")
    # Longer numbers take Python seconds to read, and all are too large.
    if max(len(low), len(high)) > 9:
        _check_cost(10**9, "regex")
    return int(low), (int(high) if high else None) if comma else int(low)


def _check_anchor(pattern: str, place: int) -> None:
    # xgrammar ignores the others with a warning, and so allows what the pattern does not.
    before, after = pattern[:place], pattern[place + 1 :]
    at_edge = before.endswith("|") or after.startswith("|")
    if not (at_edge or (not before if pattern[place] == "^" else not after)):
        raise InvalidRequest(
            f"The regex has {pattern[place]} in its middle.",
            remedy="Leave ^ and $ out: the whole answer matches the regex anyhow. Write \\^ or "
            "\\$ for the characters.",
        )


def _check_cost(cost: int, name: str) -> None:
    if cost > MAX_COST:
        raise InvalidRequest(
            f"The {name} repeats too much: its counts, multiplied where they are nested, add up "
            f"to more than {MAX_COST} characters.",
            remedy="Lower the counts (maxLength, {m,n}), or leave them out and use max_new_tokens.",
        )


# ---------------------------------------------------------------- JSON schema

_BY_NAME = ("properties", "patternProperties", "$defs", "definitions")
_IN_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_DIRECT = (
    "items",
    "additionalProperties",
    "unevaluatedProperties",
    "unevaluatedItems",
    "propertyNames",
)
# xgrammar 0.2.7 reads past these, or past what stands beside the others, without an error.
_OVERLOOKED = (
    *("not", "if", "contains", "uniqueItems", "dependentRequired", "dependentSchemas"),
    *("dependencies", "$dynamicRef", "$recursiveRef"),
)
_ALONE = ("$ref", "anyOf", "oneOf", "allOf")
_BESIDE = frozenset(
    [
        "minimum",
        "maximum",
        "exclusiveMinimum",
        "exclusiveMaximum",
        "multipleOf",
        "minLength",
        "maxLength",
        "pattern",
        "format",
        "properties",
        "required",
        "additionalProperties",
        "patternProperties",
        "propertyNames",
        "minProperties",
        "maxProperties",
        "items",
        "prefixItems",
        "minItems",
        "maxItems",
        "enum",
        "const",
    ]
)


def check_schema(text: str) -> None:
    """Let ``text`` pass if it is a JSON schema whose grammar is affordable and complete.

    Raises:
        InvalidRequest: it is no JSON, would cost too much, or asks what xgrammar would overlook.
    """
    if len(text) > MAX_SCHEMA_CHARS:
        raise InvalidRequest(
            f"The json_schema has {len(text)} characters; {MAX_SCHEMA_CHARS} are allowed.",
            remedy="Shorten it: descriptions and examples do not bind the answer.",
        )
    try:
        schema = orjson.loads(text)
    except orjson.JSONDecodeError as exc:
        raise InvalidRequest(
            f"The json_schema is no JSON: {exc}.", remedy="Send the schema as a JSON text."
        ) from exc
    cost = sum(_cost_of(part) for part in _schemas(schema, MAX_DEPTH))
    _check_cost(cost, "json_schema")


def _schemas(schema: Any, levels_left: int) -> Iterator[dict[str, Any]]:
    """``schema`` and all in it; what is no schema is left for xgrammar to refuse."""
    if not isinstance(schema, dict):
        return
    if not levels_left:
        raise InvalidRequest(
            f"The json_schema nests more than {MAX_DEPTH} schemas.",
            remedy="Flatten it, or use $ref for what repeats.",
        )
    yield schema
    inner = [schema.get(key) for key in _DIRECT]
    for key in _BY_NAME:
        inner += named.values() if isinstance(named := schema.get(key), dict) else ()
    for key in _IN_LISTS:
        inner += listed if isinstance(listed := schema.get(key), list) else ()
    for part in inner:
        yield from _schemas(part, levels_left - 1)


def _cost_of(schema: dict[str, Any]) -> int:
    """What one schema adds, without those inside it, in repeated characters."""
    _check_kept(schema)
    named = schema.get("properties")
    required = schema.get("required")
    if isinstance(named, dict):
        listed = required if isinstance(required, list) else []
        optional = named.keys() - {name for name in listed if isinstance(name, str)}
        if len(optional) > MAX_OPTIONAL:
            raise InvalidRequest(
                f"An object of the json_schema has {len(optional)} optional properties; "
                f"{MAX_OPTIONAL} are allowed.",
                remedy="List more of them in required.",
            )
    lengths = [schema.get(key) for key in ("minLength", "maxLength")]
    cost = max((min(n, FREE_CHARS) for n in lengths if isinstance(n, int)), default=0)
    named = schema.get("patternProperties")
    patterns = [schema.get("pattern"), *(named if isinstance(named, dict) else ())]
    return cost + sum(_check_regex(each)[1] for each in patterns if isinstance(each, str))


def _check_kept(schema: dict[str, Any]) -> None:
    if unkept := _overlooked(schema):
        raise InvalidRequest(
            f"This worker cannot keep an answer to {unkept} of the json_schema.",
            remedy="Leave it out, or say it otherwise.",
        )


def _overlooked(schema: dict[str, Any]) -> str | None:
    """What of ``schema`` xgrammar would overlook, in words."""
    for key in _OVERLOOKED:
        if schema.get(key) not in (None, False):
            return key
    several, ref = schema.get("allOf"), schema.get("$ref")
    if isinstance(several, list) and len(several) > 1:
        return "allOf of several schemas"
    if isinstance(ref, str) and not ref.startswith("#"):
        return f"$ref to {ref[:100]}"
    lengths = {"minLength", "maxLength"}
    for keys, overlooked in ((_ALONE, _BESIDE), (("pattern", "format"), lengths)):
        first = next((key for key in keys if key in schema), None)
        beside = sorted(overlooked & schema.keys())
        if first is not None and beside:
            return f"{beside[0]} beside {first}"
    return None
