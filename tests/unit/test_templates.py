"""workers.templates: LLaVA's conversations, to the character; the strings are LLaVA's.

pytest tests/unit/test_templates.py
"""

from __future__ import annotations

from typing import Any

import jinja2
import pytest

from protocol.errors import EngineFailed
from workers import templates

HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions."
)
USER = HUMAN.replace("human", "user")
TAGS = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant is "
    "able to understand the visual content that the user provides, and assist the user with a "
    "variety of tasks using natural language.The visual content will be provided with the "
    "following format: <Image>visual content</Image>."
)
VISION = (
    "You are a helpful language and vision assistant. You are able to understand the visual "
    "content that the user provides, and assist the user with a variety of tasks using natural "
    "language."
)
LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, "
    "while being safe.  Your answers should not include any harmful, unethical, racist, sexist, "
    "toxic, dangerous, or illegal content. Please ensure that your responses are socially "
    "unbiased and positive in nature.\n\nIf a question does not make any sense, or is not "
    "factually coherent, explain why instead of answering something not correct. If you don't "
    "know the answer to a question, please don't share false information."
)
MPT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives helpful and "
    "honest answers."
)
EXAMPLES = (
    "Human: What are the key differences between renewable and non-renewable energy sources?###"
    "Assistant: Renewable energy sources are those that can be replenished naturally in a "
    "relatively short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
    "Non-renewable energy sources, on the other hand, are finite and will eventually be depleted, "
    "such as coal, oil, and natural gas. Here are some key differences between renewable and "
    "non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable "
    "energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas "
    "emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
    "typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
    "remote locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social "
    "instability.\n###"
)

IMAGE = {"type": "image"}
DIALOGUE = [("user", "Hi."), ("assistant", "Hello!"), ("user", "And now?")]


class Refused(Exception):
    pass


def refuse(message: str) -> None:
    raise Refused(message)


def render(name: str, *turns: tuple[str, Any], system: str | None = None) -> str:
    """What the template writes of turns (role, content), with the answer still to come."""
    environment = jinja2.Environment()
    environment.globals["raise_exception"] = refuse
    if system is not None:
        turns = (("system", system), *turns)
    return environment.from_string(templates.template(name).chat_template).render(
        messages=[{"role": role, "content": content} for role, content in turns],
        add_generation_prompt=True,
    )


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "v0",
            f"{HUMAN}###{EXAMPLES}Human: Hi.###Assistant: Hello!###Human: And now?###Assistant:",
        ),
        ("llava_v0", f"{HUMAN}###Human: Hi.###Assistant: Hello!###Human: And now?###Assistant:"),
        ("v0_mmtag", f"{TAGS}###Human: Hi.###Assistant: Hello!###Human: And now?###Assistant:"),
        ("v1", f"{USER} USER: Hi. ASSISTANT: Hello!</s>USER: And now? ASSISTANT:"),
        ("llava_v1", f"{HUMAN} USER: Hi. ASSISTANT: Hello!</s>USER: And now? ASSISTANT:"),
        ("v1_mmtag", f"{TAGS} USER: Hi. ASSISTANT: Hello!</s>USER: And now? ASSISTANT:"),
        (
            "mpt",
            f"<|im_start|>system\n{MPT}<|im_end|><|im_start|>user\nHi.<|im_end|>"
            "<|im_start|>assistant\nHello!<|im_end|><|im_start|>user\nAnd now?<|im_end|>"
            "<|im_start|>assistant\n",
        ),
        (
            "chatml_direct",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\nHi.<|im_end|>"
            "<|im_start|>assistant\nHello!<|im_end|><|im_start|>user\nAnd now?<|im_end|>"
            "<|im_start|>assistant\n",
        ),
        (
            "llama_2",
            f"[INST] <<SYS>>\n{LLAMA_2}\n<</SYS>>\n\nHi. [/INST] Hello! </s>"
            "<s>[INST] And now? [/INST]",
        ),
        (
            "llava_llama_2",
            f"[INST] <<SYS>>\n{VISION}\n<</SYS>>\n\nHi. [/INST] Hello! </s>"
            "<s>[INST] And now? [/INST]",
        ),
        ("mistral_instruct", "[INST] Hi. [/INST] Hello! </s>[INST] And now? [/INST]"),
        ("plain", "Hi.\nHello!\nAnd now?\n"),
    ],
)
def test_several_rounds(name: str, expected: str) -> None:
    assert render(name, *DIALOGUE) == expected
    assert render(name, *((role, [text(said)]) for role, said in DIALOGUE)) == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v0", f"{HUMAN}###{EXAMPLES}Human: <image>\nWhat is it?###Assistant:"),
        ("llava_v0", f"{HUMAN}###Human: <image>\nWhat is it?###Assistant:"),
        ("llava_v1", f"{HUMAN} USER: <image>\nWhat is it? ASSISTANT:"),
        ("v1", f"{USER} USER: <image>\nWhat is it? ASSISTANT:"),
        (
            "chatml_direct",
            "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n<image>\n"
            "What is it?<|im_end|><|im_start|>assistant\n",
        ),
        (
            "llava_llama_2",
            f"[INST] <<SYS>>\n{VISION}\n<</SYS>>\n\n<image>\nWhat is it? [/INST]",
        ),
        ("mistral_instruct", "[INST] <image>\nWhat is it? [/INST]"),
        ("plain", "<image>\nWhat is it?\n"),
        (
            "v0_mmtag",
            f"{TAGS}###Human: <Image><image></Image>###Assistant: Received.###"
            "Human: What is it?###Assistant:",
        ),
        (
            "v1_mmtag",
            f"{TAGS} USER: <Image><image></Image> ASSISTANT: Received.</s>"
            "USER: What is it? ASSISTANT:",
        ),
    ],
)
def test_a_picture_in_the_first_message(name: str, expected: str) -> None:
    for content in (
        [IMAGE, text("What is it?")],
        [text("What is it?\n"), IMAGE],
        [IMAGE, text("<image>\nWhat is it?")],
    ):
        assert render(name, ("user", content)) == expected


def test_pictures_in_several_messages() -> None:
    assert render(
        "llava_v1",
        ("user", [IMAGE, IMAGE, text("Which is red?")]),
        ("assistant", "The first."),
        ("user", [IMAGE, text("And this?")]),
    ) == (
        f"{HUMAN} USER: <image>\n<image>\nWhich is red? ASSISTANT: The first.</s>"
        "USER: <image>\nAnd this? ASSISTANT:"
    )
    assert render("v1_mmtag", ("user", [IMAGE, IMAGE, text("Which is red?")])) == (
        f"{TAGS} USER: <Image><image></Image><Image><image></Image> ASSISTANT: Received.</s>"
        "USER: Which is red? ASSISTANT:"
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("v0", f"Be brief.###{EXAMPLES}Human: Hi.###Assistant:"),
        ("v1", "Be brief. USER: Hi. ASSISTANT:"),
        (
            "mpt",
            "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nHi.<|im_end|>"
            "<|im_start|>assistant\n",
        ),
        ("llama_2", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi. [/INST]"),
        ("mistral_instruct", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi. [/INST]"),
    ],
)
def test_a_system_message_takes_the_place_of_llavas(name: str, expected: str) -> None:
    assert render(name, ("user", "Hi."), system="Be brief.") == expected


def test_what_is_said_is_not_markup() -> None:
    said = "{{ 'a' }} <b> \"'\\ {% if %} </s>"
    assert render("v1", ("user", f" {said} ")) == f"{USER} USER:  {said}  ASSISTANT:"


@pytest.mark.parametrize("name", templates.NAMES)
def test_a_late_system_message_is_refused(name: str) -> None:
    with pytest.raises(Refused, match="system"):
        render(name, ("user", "Hi."), ("system", "Be brief."))


@pytest.mark.parametrize("turns", [[], [("assistant", "Hi.")], [("user", "")]])
def test_llama_2_begins_with_the_user(turns: list[tuple[str, str]]) -> None:
    with pytest.raises(Refused, match="user"):
        render("llama_2", *turns)


@pytest.mark.parametrize("name", templates.NAMES)
def test_as_transformers_renders_it(name: str) -> None:
    """Its jinja is sandboxed, and trims blocks."""
    utilities = pytest.importorskip("transformers.utils.chat_template_utils")
    turns = [("user", [IMAGE, text("Hi.")]), *DIALOGUE[1:]]
    messages = [{"role": role, "content": content} for role, content in turns]
    rendered, _ = utilities.render_jinja_template(
        [messages],
        chat_template=templates.template(name).chat_template,
        add_generation_prompt=True,
    )
    assert rendered == [render(name, *turns)]


def test_what_ends_an_answer() -> None:
    stops = {name: templates.template(name).stops for name in templates.NAMES}
    assert stops == {
        **dict.fromkeys(("default", "v0", "llava_v0", "v0_mmtag"), ("###",)),
        **dict.fromkeys(("v1", "vicuna_v1", "llava_v1", "v1_mmtag"), ("</s>",)),
        **dict.fromkeys(("llama_2", "llava_llama_2", "mistral_instruct"), ("</s>",)),
        **dict.fromkeys(("mpt", "chatml_direct", "mistral_direct"), ("<|im_end|>",)),
        **dict.fromkeys(("plain", "v0_plain"), ("\n",)),
    }


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("default", "v0"),
        ("v1", "vicuna_v1"),
        ("plain", "v0_plain"),
        ("chatml_direct", "mistral_direct"),
    ],
)
def test_names_of_one_conversation(first: str, second: str) -> None:
    assert templates.template(first).name == first
    assert templates.template(first).chat_template == templates.template(second).chat_template


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(EngineFailed, match="'v7'") as failure:
        templates.template("v7")
    assert all(name in failure.value.remedy for name in templates.NAMES)


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("llava-v1.5-7b", "llava_v1"),
        ("LLaVA-v1.6-vicuna-13b", "llava_v1"),
        ("llava-v1.6-mistral-7b", "mistral_instruct"),
        ("llava-mixtral-8x7b", "mistral_instruct"),
        ("llava-nous-hermes-mistral", "chatml_direct"),
        ("llava-mistral-orca", "chatml_direct"),
        ("llava-v1.6-34b", "chatml_direct"),
        ("llava-llama-2-13b-chat-lightning-preview", "llava_llama_2"),
        ("llava-v1-0719-mmtag", "v1_mmtag"),
        ("llava-v1-plain", "v1_mmtag"),
        ("llava-v1-plain-finetune", "llava_v1"),
        ("llava-mpt-7b", "mpt"),
        ("llava-7b-v0", "llava_v0"),
        ("llava-7b-mmtag", "v0_mmtag"),
        ("llava-7b-plain", "v0_mmtag"),
        ("mpt-7b-chat", "mpt"),
        ("llama-2-7b-chat", "llama_2"),
        ("vicuna-7b-v1.5", "vicuna_v1"),
        ("anything", "vicuna_v1"),
    ],
)
def test_the_template_for_a_models_name(model: str, name: str) -> None:
    assert templates.for_model(model) == name
    assert name in templates.NAMES
