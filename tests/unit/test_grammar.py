"""Whatever the scores say, the answer keeps to its grammar; what would hang is refused before."""

from __future__ import annotations

import codecs
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("xgrammar")
pytestmark = pytest.mark.timeout(60)

from tokenizers import Tokenizer, decoders, models  # noqa: E402
from transformers import (  # noqa: E402
    AutoTokenizer,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from protocol.errors import InvalidRequest, Unsupported  # noqa: E402
from protocol.messages import SamplingParams  # noqa: E402
from workers import grammar  # noqa: E402
from workers.grammar import Grammar, Grammars  # noqa: E402
from workers.grammar_limits import check_regex, check_schema  # noqa: E402

MODEL = str(Path(__file__).parents[2] / "models" / "pocket-llava")
WIDTH, EOS, IMAGE = 2048, 2, 3


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def grammars(tokenizer: Any) -> Grammars:
    return Grammars(tokenizer, logits_width=WIDTH, eos_ids=frozenset({EOS}))


def start(grammars: Grammars, **asked: Any) -> Grammar:
    """``schema`` or ``regex``, compiled."""
    if "schema" in asked:
        asked["json_schema"] = json.dumps(asked.pop("schema"))
    found = grammars.compile(SamplingParams(**asked))
    assert found is not None
    return found


def noise(seed: int, place: int, width: int = WIDTH) -> Any:
    scores = torch.randn(width, generator=torch.Generator().manual_seed(seed * 10_000 + place))
    # Otherwise an answer that may end at any time would hardly ever do so.
    scores[EOS] += 2.5 if place > 20 else 0
    return scores


def write(state: Grammar, seed: int, ids: list[int], limit: int = 400) -> list[int]:
    """Go on after ``ids``, with random scores in place of a network's."""
    ids = list(ids)
    while not state.ended and len(ids) < limit:
        scores = noise(seed, len(ids))
        state.mask(scores)
        ids.append(int(scores.argmax()))
        state.accept(ids[-1])
    return ids


# ---------------------------------------------------------------- answers are valid


def some_schema(source: random.Random, depth: int = 0) -> dict[str, Any]:
    """Limited in all directions, so that random answers end."""
    simple: list[dict[str, Any]] = [
        {"type": "integer", "minimum": source.randint(-50, 0), "maximum": source.randint(1, 900)},
        {"type": "string", "maxLength": source.randint(0, 8)},
        {"type": "boolean"},
        {"type": "null"},
        {"enum": ["red", 'say "é"', 7, None, True]},
        {"const": "☃"},
        {"type": "string", "pattern": r"^[a-c]{2}-\d$"},
    ]
    kind = source.randrange(len(simple) + (3 if depth < 2 else 0))
    if kind < len(simple):
        return simple[kind]
    inner = [some_schema(source, depth + 1) for _ in range(source.randint(1, 3))]
    if kind == len(simple):
        return {"type": "array", "items": inner[0], "minItems": 1, "maxItems": 3}
    if kind == len(simple) + 1:
        return {"anyOf": inner}
    names = [f"k{i}" for i in range(len(inner))]
    return {
        "type": "object",
        "properties": dict(zip(names, inner, strict=True)),
        "required": source.sample(names, source.randint(0, len(names))),
        "additionalProperties": False,
    }


def valid(value: Any, schema: dict[str, Any]) -> bool:
    """Whether ``value`` is one of ``some_schema``."""
    if "anyOf" in schema:
        return any(valid(value, choice) for choice in schema["anyOf"])
    if "enum" in schema:
        return value in schema["enum"]
    if "const" in schema:
        return bool(value == schema["const"])
    if schema["type"] == "object":
        return (
            isinstance(value, dict)
            and set(schema["required"]) <= value.keys() <= schema["properties"].keys()
            and all(valid(value[name], schema["properties"][name]) for name in value)
        )
    if schema["type"] == "array":
        return (
            isinstance(value, list)
            and schema["minItems"] <= len(value) <= schema["maxItems"]
            and all(valid(item, schema["items"]) for item in value)
        )
    if schema["type"] == "string":
        return (
            isinstance(value, str)
            and len(value) <= schema.get("maxLength", 100)
            and re.search(schema.get("pattern", ""), value) is not None
        )
    if schema["type"] == "integer":
        return type(value) is int and schema["minimum"] <= value <= schema["maximum"]
    return value is None if schema["type"] == "null" else isinstance(value, bool)


def test_random_answers_are_json_of_their_schema(grammars: Grammars, tokenizer: Any) -> None:
    for seed in range(80):
        schema = some_schema(random.Random(seed))
        ids = write(start(grammars, schema=schema), seed, [])
        assert ids[-1] == EOS, (schema, tokenizer.decode(ids))
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert valid(json.loads(text), schema), (schema, text)


def some_regex(source: random.Random, depth: int = 0) -> str:
    atoms = ["a", "Z", "é", "☃", r"\.", r"\d", "[a-f]", "[^x-z]", ".", r"\w", " ", "[,;]", "yes"]
    parts = []
    for _ in range(source.randint(1, 4)):
        if depth < 2 and source.random() < 0.3:
            choices = [some_regex(source, depth + 1) for _ in range(source.randint(1, 3))]
            part = f"({'|'.join(choices)}){source.choice(['', '', '?'])}"
        else:
            part = f"(?:{source.choice(atoms)})"
            part += source.choice(["", "", "", "?", "+", "*", "{2}", "{1,3}", "{0,4}"])
        parts.append(part + source.choice(["", "-"]))
    return "".join(parts)


def test_random_answers_match_their_regex(grammars: Grammars, tokenizer: Any) -> None:
    ended = 0
    for seed in range(120):
        regex = some_regex(random.Random(seed))
        ids = write(start(grammars, regex=regex), seed, [])
        if ids[-1] != EOS:
            continue
        ended += 1
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert re.fullmatch(regex, text), (regex, text)
    assert ended > 80


def test_json_comes_without_free_whitespace(grammars: Grammars) -> None:
    state = start(grammars, schema={"type": "array", "items": {"type": "null"}})
    scores = torch.zeros(WIDTH)
    state.mask(scores)
    tokens = AutoTokenizer.from_pretrained(MODEL).batch_decode(
        [[i] for i in scores.isfinite().nonzero().flatten().tolist()]
    )
    assert tokens
    assert all(text.startswith("[") for text in tokens)


SCHEMA = {
    "type": "object",
    "properties": {
        "colour": {"enum": ["red", "green", "blue"]},
        "count": {"type": "integer", "minimum": 0, "maximum": 99},
        "name": {"type": "string", "maxLength": 10},
    },
    "required": ["colour", "count", "name"],
    "additionalProperties": False,
}


@pytest.mark.parametrize(
    "asked", [{"schema": SCHEMA}, {"regex": "(red|blue), [0-9]{2,4}[a-z]{0,9}!"}]
)
def test_resuming_at_every_cut_gives_the_same(grammars: Grammars, asked: dict[str, Any]) -> None:
    whole = write(start(grammars, **asked), 3, [])
    for cut in range(len(whole) + 1):
        state = start(grammars, **asked)
        for token_id in whole[:cut]:
            state.accept(token_id)
        assert write(state, 3, whole[:cut]) == whole


@pytest.fixture(scope="module")
def network() -> Any:
    return LlavaForConditionalGeneration.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "asked",
    [
        {"schema": SCHEMA},
        {"schema": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4}},
        {"regex": r"(yes|no), \d{1,3}\."},
    ],
    ids=str,
)
def test_the_embedded_model_keeps_to_it(
    grammars: Grammars, tokenizer: Any, network: Any, asked: dict[str, Any]
) -> None:
    chat = [{"role": "user", "content": [{"type": "text", "text": "What do you see?"}]}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    state, given, cache = start(grammars, **dict(asked)), torch.tensor([prompt]), None
    ids: list[int] = []
    with torch.inference_mode():
        while not state.ended and len(ids) < 120:
            made = network(input_ids=given, past_key_values=cache, use_cache=True)
            cache, scores = made.past_key_values, made.logits[:, -1].float()
            state.mask(scores)
            ids.append(int(scores.argmax()))
            state.accept(ids[-1])
            given = torch.tensor([ids[-1:]])
    assert state.ended
    text = tokenizer.decode(ids, skip_special_tokens=True)
    if "regex" in asked:
        assert re.fullmatch(asked["regex"], text)
    elif asked["schema"] is SCHEMA:
        assert set(json.loads(text)) == {"colour", "count", "name"}
    else:
        assert 2 <= len(json.loads(text)) <= 4


# ---------------------------------------------------------------- masks and ends


def allowed(state: Grammar, width: int = WIDTH) -> set[int]:
    scores = torch.zeros(1, width)
    state.mask(scores)
    return set(scores[0].isfinite().nonzero().flatten().tolist())


def test_nothing_asked_is_no_grammar(grammars: Grammars) -> None:
    assert grammars.compile(SamplingParams()) is None


def test_special_tokens_are_no_text(grammars: Grammars, tokenizer: Any) -> None:
    for asked in ({"regex": "[^x]*"}, {"schema": {"type": "string"}}):
        state = start(grammars, **dict(asked))
        if "schema" in asked:
            state.accept(tokenizer.encode('"')[0])
        assert IMAGE not in allowed(state)
        assert not allowed(state) & (set(tokenizer.all_special_ids) - {EOS})


def test_tokens_that_must_never_come_do_not(tokenizer: Any) -> None:
    a = tokenizer.encode("a")[0]
    ends = frozenset({EOS})
    state = start(Grammars(tokenizer, logits_width=WIDTH, eos_ids=ends, never=[a]), regex="a*")
    assert a not in allowed(state)


def test_a_complete_answer_may_only_end(grammars: Grammars, tokenizer: Any) -> None:
    state = start(grammars, regex="a|ab")
    state.accept(tokenizer.encode("a")[0])
    assert EOS in allowed(state)
    assert len(allowed(state)) == 2
    state.accept(tokenizer.encode("b")[0])
    assert allowed(state) == {EOS}
    assert not state.ended
    state.accept(EOS)
    assert state.ended


def test_without_end_tokens_it_ends_when_nothing_may_follow(tokenizer: Any) -> None:
    endless = Grammars(tokenizer, logits_width=WIDTH, eos_ids=frozenset())
    ids = write(start(endless, regex="[0-9]{3}"), 1, [])
    assert re.fullmatch("[0-9]{3}", tokenizer.decode(ids))
    assert start(endless, regex="").ended
    assert not start(endless, regex="a*").ended


def test_scores_wider_than_the_vocabulary_are_masked_and_narrower_ones_fit(tokenizer: Any) -> None:
    for width in (2051, 300):
        found = Grammars(tokenizer, logits_width=width, eos_ids=frozenset({EOS, 2050}))
        assert all(i < min(width, 2048) for i in allowed(start(found, regex=".+"), width))


@pytest.mark.parametrize("token_id", [IMAGE, 5000, EOS], ids=["special", "unknown", "end"])
def test_a_token_that_does_not_fit_is_refused(grammars: Grammars, token_id: int) -> None:
    state = start(grammars, regex="[0-9]+")
    with pytest.raises(InvalidRequest, match="does not fit"):
        state.accept(token_id)


def bytes_tokenizer(*, letters: str, fallback: bool) -> Any:
    """A tokenizer as Llama 2's: pieces with a lower line for a space, bytes for what is unknown."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256 * fallback))]
    pieces += ["▁", *letters, *(f"▁{letter}" for letter in letters)]
    vocabulary = {piece: place for place, piece in enumerate(pieces)}
    backend = Tokenizer(models.BPE(vocabulary, [], byte_fallback=fallback, unk_token="<unk>"))
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


def test_pieces_and_bytes_of_sentencepiece() -> None:
    tokenizer = bytes_tokenizer(letters='{}":,abc0123456789', fallback=True)
    found = Grammars(tokenizer, logits_width=len(tokenizer), eos_ids=frozenset({2}))
    schema = {"type": "object", "properties": {"é ☃": {"enum": ["a b", "日"]}}, "required": ["é ☃"]}
    state = start(found, schema=schema | {"additionalProperties": False})
    ids: list[int] = []
    while not state.ended:
        scores = noise(1, len(ids), len(tokenizer))
        state.mask(scores)
        ids.append(int(scores.argmax()))
        state.accept(ids[-1])
    assert json.loads(tokenizer.decode(ids, skip_special_tokens=True))["é ☃"] in {"a b", "日"}


def test_a_first_space_that_decoding_drops_is_not_written() -> None:
    tokenizer = bytes_tokenizer(letters="ab", fallback=True)
    found = Grammars(tokenizer, logits_width=len(tokenizer), eos_ids=frozenset({2}))
    state = start(found, regex="[a ]{3}")
    spaced = {tokenizer.convert_tokens_to_ids(piece) for piece in ("▁", "▁a")}
    assert not spaced & allowed(state, len(tokenizer))
    state.accept(tokenizer.convert_tokens_to_ids("a"))
    assert spaced < allowed(state, len(tokenizer))
    with pytest.raises(InvalidRequest, match="cannot spell"):
        start(found, regex=" a")


@pytest.mark.parametrize("asked", [{"regex": "[^x]{1,40}"}, {"schema": {"type": "string"}}])
def test_bytes_make_whole_characters(asked: dict[str, Any]) -> None:
    tokenizer = bytes_tokenizer(letters='"', fallback=True)
    found = Grammars(tokenizer, logits_width=len(tokenizer), eos_ids=frozenset({2}))
    beyond_ascii = [3 + byte for byte in range(0x80, 256)]
    for seed in range(20):
        state, data = start(found, **dict(asked)), b""
        for place in range(40):
            scores = noise(seed, place, len(tokenizer))
            scores[beyond_ascii] += 5
            state.mask(scores)
            state.accept(token_id := int(scores.argmax()))
            if state.ended:
                break
            data += bytes([token_id - 3]) if 3 <= token_id < 259 else b""
        codecs.getincrementaldecoder("utf-8")().decode(data)


def test_what_cannot_be_spelt_is_refused_and_not_guessed() -> None:
    tokenizer = bytes_tokenizer(letters="abcdefghij", fallback=False)
    found = Grammars(tokenizer, logits_width=len(tokenizer), eos_ids=frozenset({2}))
    with pytest.raises(InvalidRequest, match="cannot spell"):
        start(found, regex="日")
    state = start(found, regex="a日")
    state.accept(tokenizer.convert_tokens_to_ids("a"))
    with pytest.raises(InvalidRequest, match="cannot spell"):
        allowed(state)


def test_a_tokenizer_that_spells_otherwise_is_unsupported(tokenizer: Any) -> None:
    backwards = AutoTokenizer.from_pretrained(MODEL)
    backwards.backend_tokenizer.decoder = decoders.Replace("e", "x")
    with pytest.raises(Unsupported):
        start(Grammars(backwards, logits_width=WIDTH, eos_ids=frozenset({EOS})), regex="a")


def test_many_threads_and_a_full_cache(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grammar, "CACHE_BYTES", 50_000)
    found = Grammars(tokenizer, logits_width=WIDTH, eos_ids=frozenset({EOS}))

    def one(n: int) -> str:
        regex = f"[a-f]{{{n % 20 + 1}}}[0-9]"
        return str(tokenizer.decode(write(start(found, regex=regex), n, [])[:-1]))

    with ThreadPoolExecutor(4) as pool:
        for n, text in enumerate(pool.map(one, range(60))):
            assert re.fullmatch(f"[a-f]{{{n % 20 + 1}}}[0-9]", text)
    assert found._compiler.get_cache_size_bytes() <= 2 * grammar.CACHE_BYTES


def test_a_step_that_takes_too_long_ends_its_request(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = start(grammars, regex="a+")
    monkeypatch.setattr(grammar, "STEP_LIMIT_S", -1.0)
    with pytest.raises(InvalidRequest, match="ambiguous"):
        allowed(state)


# ---------------------------------------------------------------- refusals

DEEP = '{"items":' * 70 + "{}" + "}" * 70


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ("{", "no JSON"),
        ("", "no JSON"),
        ('{"const": NaN}', "no JSON"),
        ("[" * 60_000, "no JSON"),
        ("[]", "object or bool"),
        ("false", "cannot accept any value"),
        ('{"type": "colour"}', "Unsupported type"),
        ('{"$ref": "#/$defs/nobody"}', "nobody"),
        ('{"$ref": "#"}', "cannot spell"),
        ('{"$ref": "http://127.0.0.1/a.json"}', r"\$ref to http"),
        ('{"type": "string", "pattern": "(?=a)b"}', r"\(\?="),
        ('{"type": "string", "minLength": -1}', "repetition"),
        ('{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ('{"properties": {"a": {"not": {}}}}', "not"),
        ('{"allOf": [{"type": "integer"}, {"minimum": 5}]}', "allOf"),
        ('{"anyOf": [{"required": ["a"]}], "properties": {"a": {}}}', "properties beside anyOf"),
        ('{"type": "string", "pattern": "a+", "maxLength": 2}', "maxLength beside pattern"),
        ('{"enum": ["' + "a" * 70_000 + '"]}', "65536 are allowed"),
        (DEEP, "nests more than 64"),
    ],
)
def test_a_wrong_schema_is_refused_in_a_sentence(
    grammars: Grammars, schema: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says) as refused:
        grammars.compile(SamplingParams(json_schema=schema))
    assert "\n" not in refused.value.message
    assert ".cc" not in refused.value.message


def test_data_in_a_schema_is_no_schema() -> None:
    check_schema('{"properties": {"not": {"enum": [{"uniqueItems": true}]}, "if": {}}}')
    check_schema('{"default": {"not": 1}, "uniqueItems": false, "allOf": [{"type": "null"}]}')


@pytest.mark.parametrize(
    ("regex", "says"),
    [
        ("(", "not closed"),
        (")", "."),
        ("[^☃]", "more than ASCII"),
        (r"[^\u00e9]", "more than ASCII"),
        ("[", "Unclosed"),
        ("a**", "all repeats"),
        ("a{2,1}", "bound"),
        ("(?=a)b", r"\(\?="),
        ("(?i)a", r"\(\?i"),
        ("(?P<x>a)", r"\(\?P"),
        (r"(a)\1", "Backreference"),
        (r"\bword", "Word boundary"),
        ("a$b", "in its middle"),
        ("a^b", "in its middle"),
        ("x" * 5000, "4096 are allowed"),
        ("a\0b", "null character"),
        ("(" * 70 + "a" + ")" * 70, "nests more than 64"),
        # Each of these was seen to take seconds a token or not to come back.
        ("a{100000}", "repeats too much"),
        ("a{99999999999999999999}", "repeats too much"),
        ("((a{1000}){1000})", "repeats too much"),
        ("[a-z]{0,10000}", "repeats too much"),
        ("[a-z]?" * 100, "repeats too much"),
        (r"(\w{1,50} ){1,50}", "repeats too much"),
        ("(.{0,50}a.{0,50}){50}", "repeats too much"),
        ("([a-z]{0,100}){0,100}b", "all repeats"),
        ("((.{1,5}){1,5}){1,5}x", "all repeats"),
        (r"(\w+\s?)*x", "all repeats"),
        ("(a|b*)*", "all repeats"),
        ("(((a+-)*-)*-)*", "more than 3 deep"),
    ],
)
def test_a_wrong_or_costly_regex_is_refused_in_a_sentence(
    grammars: Grammars, regex: str, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=says):
        start(grammars, regex=regex)
    if len(regex) < 1000:
        with pytest.raises(InvalidRequest):
            start(grammars, schema={"type": "string", "pattern": regex})


def test_long_strings_add_up() -> None:
    strings = {f"k{i}": {"type": "string", "maxLength": 10_000} for i in range(4)}
    check_schema(json.dumps({"properties": dict(list(strings.items())[:3])}))
    with pytest.raises(InvalidRequest, match="json_schema repeats too much"):
        check_schema(json.dumps({"properties": strings}))


def test_optional_properties_are_counted() -> None:
    many: dict[str, Any] = {"properties": {f"k{i}": {} for i in range(101)}}
    check_schema(json.dumps(many | {"required": ["k0"]}))
    with pytest.raises(InvalidRequest, match="101 optional properties"):
        check_schema(json.dumps(many))


@pytest.mark.parametrize(
    "regex",
    [
        r"[\w.+-]{1,64}@([\w-]{1,63}\.){1,4}[a-z]{2,24}",
        r"(\d{1,3}\.){3}\d{1,3}",
        r"\d{4}-\d{2}-\d{2}T\d{2}:\d{2}(:\d{2}(\.\d+)?)?(Z|[+-]\d{2}:\d{2})",
        r"(\w+ )*\w+\.",
        r"((\w+ )+\. ?)+",
        r"^yes$|^no$",
        r"a\^b\$[$^)(]",
    ],
)
def test_everyday_regexes_are_taken(regex: str) -> None:
    assert check_regex(regex)


def test_a_dot_is_no_line_break() -> None:
    assert check_regex(r"a.\.[.]") == r"a[^\n]\.[.]"
