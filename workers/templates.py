"""LLaVA's conversation templates as chat templates, for checkpoints that bring none of their own.

Each renders what LLaVA's ``Conversation.get_prompt`` returns, to the character: without the
beginning-of-sequence token, which LLaVA leaves to the tokenizer.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from protocol.errors import EngineFailed
from workers.prompts import ApplyTemplate


@dataclass(frozen=True, slots=True)
class Conversation:
    """How one family of checkpoints was taught to converse.

    ``chat_template`` is jinja over ``messages`` and ``add_generation_prompt``; the tokenizer has
    to add its own special tokens to what it renders. Each of ``stops`` ends an answer.
    """

    name: str
    chat_template: str
    stops: tuple[str, ...]


def template(name: str) -> Conversation:
    """The conversation of this name, one of ``NAMES``.

    Raises:
        EngineFailed: there is none.
    """
    conversation = _CONVERSATIONS.get(name)
    if conversation is None:
        raise EngineFailed(
            f"There is no conversation template {name!r}.",
            remedy=f"Give --conv-template one of {', '.join(NAMES)}.",
        )
    chat_template, stop = conversation
    return Conversation(name, chat_template, (stop,))


def choose(
    asked: str | None, *, trained_with: str | None, guess: str | None, brings_one: bool
) -> Conversation | None:
    """The conversation of a checkpoint: the one that was asked for or that it was trained with;
    else its own chat template (``None``), or, where it brings none, a guess.

    Raises:
        EngineFailed: there is none of the name that was asked for.
    """
    name = asked or trained_with or (None if brings_one else guess)
    return None if name is None else template(name)


def renderer(conversation: Conversation, tokenizer: Any) -> ApplyTemplate:
    """What renders turns as ``conversation`` does."""

    def apply(turns: list[dict[str, Any]]) -> str:
        text: str = tokenizer.apply_chat_template(
            turns,
            chat_template=conversation.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return text

    return apply


def for_model(name: str) -> str:
    """The template that LLaVA's web server chooses for a model of this name.

    Where it chooses one that it does not have (for a name with "orca", and for "mpt" without
    "llava"), this is the one it has for the same format.
    """
    lower = name.lower()
    if "llava" not in lower:
        return "mpt" if "mpt" in name else "llama_2" if "llama-2" in name else "vicuna_v1"
    if "llama-2" in lower:
        return "llava_llama_2"
    if "mistral" in lower or "mixtral" in lower:
        chatml = "orca" in lower or "hermes" in lower
        return "chatml_direct" if chatml else "mistral_instruct"
    if "llava-v1.6-34b" in lower:
        return "chatml_direct"
    tagged = "mmtag" in lower or ("plain" in lower and "finetune" not in lower)
    if "v1" in lower:
        return "v1_mmtag" if tagged else "llava_v1"
    if "mpt" in lower:
        return "mpt"
    return "v0_mmtag" if tagged else "llava_v0"


# ---------------------------------------------------------------- jinja

# A picture of LLaVA's stands before the text, which is stripped then; the tag is not repeated.
_COMMON = r"""
{%- macro said(content) -%}
  {%- if content is string -%}
    {{- content -}}
  {%- else -%}
    {%- set texts = content | selectattr('type', 'equalto', 'text') | map(attribute='text') -%}
    {%- set text = texts | join -%}
    {%- set pictures = content | selectattr('type', 'equalto', 'image') | list | length -%}
    {{- '<image>\n' * pictures + text.replace('<image>', '').strip() if pictures else text -}}
  {%- endif -%}
{%- endmacro -%}
{%- set turns = messages -%}
{%- if messages and messages[0].role == 'system' -%}
  {%- set system = before_system + said(messages[0].content) -%}
  {%- set turns = messages[1:] -%}
{%- endif -%}
{%- for turn in turns if turn.role not in ('user', 'assistant') -%}
  {{- raise_exception('Only the first message may have the role ' + turn.role + '.') -}}
{%- endfor -%}
"""
# LLaVA shows a tagged picture in a round of its own, before the first message.
_TAGGED = r"""
{%- if turns and turns[0].content is not string -%}
  {%- set pictures = turns[0].content | selectattr('type', 'equalto', 'image') | list | length -%}
  {%- if pictures -%}
    {%- set shown = {'role': 'user', 'content': '<Image><image></Image>' * pictures} -%}
    {%- set text = said(turns[0].content).replace('<image>\n', '') -%}
    {%- set turns = [shown, {'role': 'assistant', 'content': 'Received.'},
                     {'role': turns[0].role, 'content': text}] + turns[1:] -%}
  {%- endif -%}
{%- endif -%}
"""
_LABELLED = r"""
{{- system + after_system -}}
{%- for turn in examples + turns -%}
  {%- set text = said(turn.content) -%}
  {{- labels[turn.role] + text + ends[turn.role] if text else labels[turn.role].rstrip(' ') -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- labels.assistant.rstrip(' ') -}}
{%- endif -%}
"""
_BRACKETED = r"""
{%- if not turns or turns[0].role != 'user' or not said(turns[0].content) -%}
  {{- raise_exception('The first message after the system message has to be the user\'s.') -}}
{%- endif -%}
{%- for turn in turns -%}
  {%- set text = said(turn.content) -%}
  {%- if loop.first and system -%}
    {%- set text = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' + text -%}
  {%- endif -%}
  {%- if turn.role == 'user' and text -%}
    {{- ('' if loop.first else begin) + '[INST] ' + text + ' [/INST]' -}}
  {%- elif text -%}
    {{- ' ' + text + ' </s>' -}}
  {%- endif -%}
{%- endfor -%}
"""


def _jinja(*bodies: str, **values: object) -> str:
    sets = (f"{{%- set {name} = {json.dumps(value)} -%}}" for name, value in values.items())
    return "".join([*sets, *(body.strip() for body in bodies)])


def _labelled(
    system: str,
    user: str = "USER: ",
    assistant: str = "ASSISTANT: ",
    *,
    ends: tuple[str, str] = (" ", "</s>"),
    before_system: str = "",
    after_system: str | None = None,
    examples: tuple[str, ...] = (),
    tagged: bool = False,
) -> tuple[str, str]:
    """Each turn between a label and one of ``ends``: the chat template, and an answer's end.

    LLaVA's styles SINGLE, TWO, MPT and PLAIN; a label without a turn loses its blank.
    """
    roles = ("user", "assistant")
    chat_template = _jinja(
        *(_COMMON, _TAGGED, _LABELLED) if tagged else (_COMMON, _LABELLED),
        before_system=before_system,
        system=before_system + system,
        after_system=ends[0] if after_system is None else after_system,
        labels={"user": user, "assistant": assistant},
        ends={"user": ends[0], "assistant": ends[1]},
        examples=[{"role": roles[i % 2], "content": text} for i, text in enumerate(examples)],
    )
    return chat_template, ends[1]


def _single(system: str, **more: Any) -> tuple[str, str]:
    return _labelled(system, "Human: ", "Assistant: ", ends=("###", "###"), **more)


def _chatml(system: str) -> tuple[str, str]:
    start, end = "<|im_start|>", "<|im_end|>"
    return _labelled(
        system,
        f"{start}user\n",
        f"{start}assistant\n",
        ends=(end, end),
        before_system=f"{start}system\n",
    )


def _bracketed(system: str, begin: str = "<s>") -> tuple[str, str]:
    """LLaVA's style LLAMA_2; ``begin`` starts every round but the first."""
    return _jinja(_COMMON, _BRACKETED, before_system="", system=system, begin=begin), "</s>"


# ---------------------------------------------------------------- LLaVA's texts

_OF_HUMAN, _OF_USER = (
    f"A chat between a curious {person} and an artificial intelligence assistant. "
    f"The assistant gives helpful, detailed, and polite answers to the {person}'s questions."
    for person in ("human", "user")
)
_TASKS = (
    "the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
_OF_TAGS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    f"The assistant is able to understand {_TASKS}"
    "The visual content will be provided with the following format: "
    "<Image>visual content</Image>."
)
_OF_VISION = f"You are a helpful language and vision assistant. You are able to understand {_TASKS}"
_OF_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. "
    "Always answer as helpfully as possible, while being safe.  "
    "Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, "
    "or illegal content. "
    "Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, "
    "explain why instead of answering something not correct. "
    "If you don't know the answer to a question, please don't share false information."
)
_OF_MPT = (
    "A conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_EXAMPLE_QUESTION = (
    "What are the key differences between renewable and non-renewable energy sources?"
)
_EXAMPLE_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively "
    "short amount of time, such as solar, wind, hydro, geothermal, and biomass. "
    "Non-renewable energy sources, on the other hand, are finite and will eventually be "
    "depleted, such as coal, oil, and natural gas. Here are some key differences between "
    "renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while "
    "non-renewable energy sources are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact "
    "than non-renewable sources, which can lead to air and water pollution, greenhouse gas "
    "emissions, and other negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they "
    "typically have lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more "
    "remote locations than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to "
    "different situations and needs, while non-renewable sources are more rigid and "
    "inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while "
    "non-renewable sources are not, and their depletion can lead to economic and social "
    "instability.\n"
)
_V0 = _single(_OF_HUMAN, examples=(_EXAMPLE_QUESTION, _EXAMPLE_ANSWER))
_V1 = _labelled(_OF_USER)
_PLAIN = _labelled("", "", "", ends=("\n", "\n"), after_system="")
_CHATML_DIRECT = _chatml("Answer the questions.")

_CONVERSATIONS = {
    "default": _V0,
    "v0": _V0,
    "v1": _V1,
    "vicuna_v1": _V1,
    "llama_2": _bracketed(_OF_LLAMA_2),
    "mistral_instruct": _bracketed("", begin=""),
    "chatml_direct": _CHATML_DIRECT,
    "mistral_direct": _CHATML_DIRECT,
    "plain": _PLAIN,
    "v0_plain": _PLAIN,
    "llava_v0": _single(_OF_HUMAN),
    "v0_mmtag": _single(_OF_TAGS, tagged=True),
    "llava_v1": _labelled(_OF_HUMAN),
    "v1_mmtag": _labelled(_OF_TAGS, tagged=True),
    "llava_llama_2": _bracketed(_OF_VISION),
    "mpt": _chatml(_OF_MPT),
}
NAMES: tuple[str, ...] = tuple(_CONVERSATIONS)
"""Every name that ``template`` knows, as LLaVA has them."""
