"""Judge Pocket LLaVA: ``python models/pocket-llava/eval.py``.

Asks the questions of ``exam`` greedily and counts the answers that are right letter for letter. In
this process through transformers, one at a time; or of a running cluster, several at once.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from models.pocket.exam import SECTIONS, Item, Message, Section, items
from models.pocket.scenes import png
from models.pocket.styles import STYLES, Style, plain

HOME = Path(__file__).parents[1] / "pocket-llava"
MAX_TOKENS = 160  # to a hundred and a little: one who does not stop in time is wrong
_ANSWER_TIMEOUT_S = 120.0
_AT_ONCE = 8  # questions asked of a cluster together
_WHOLE = {"describe", "relation"}  # kinds where a right word does not make an answer right

Answer = Callable[[Sequence[Message]], str]
"""From a conversation that ends with the user's message to the model's answer."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The figures of one section."""

    section: str
    n: int
    exact_answers: int
    right_facts: int  # answers that hold what was asked for, in whatever words
    target: float | None


def in_process(path: Path, dtype: str, device: str, adapter: Path | None) -> Answer:
    """Answers through transformers, of the checkpoint at ``path`` with or without an adapter."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(path)
    model: Any = LlavaForConditionalGeneration.from_pretrained(path, dtype=getattr(torch, dtype))
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model = model.to(device).eval()

    def answer(messages: Sequence[Message]) -> str:
        turns = [
            {
                "role": message.role,
                "content": [
                    *({"type": "image"} for _ in message.pictures),
                    {"type": "text", "text": message.text},
                ],
            }
            for message in messages
        ]
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        pictures = [picture for message in messages for picture in message.pictures]
        inputs = processor(
            text=text, images=pictures or None, add_special_tokens=False, return_tensors="pt"
        ).to(device)
        if pictures:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        with torch.inference_mode():
            ids = model.generate(**inputs, max_new_tokens=MAX_TOKENS, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        decoded: str = processor.tokenizer.decode(new, skip_special_tokens=True)
        return decoded

    return answer


def from_cluster(
    client: httpx.Client, url: str, model: str, kind: str | None, adapter: str | None
) -> Answer:
    """Answers of a controller, or of any server that speaks OpenAI's API.

    Raises, when asked:
        httpx.HTTPError: it is not there, or refuses the question.
    """
    extra = {name: value for name, value in (("kind", kind), ("adapter", adapter)) if value}

    def answer(messages: Sequence[Message]) -> str:
        body = {
            "model": model,
            "messages": [_openai(message) for message in messages],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            **extra,
        }
        response = client.post(f"{url.rstrip('/')}/v1/chat/completions", json=body)
        response.raise_for_status()
        content: str = response.json()["choices"][0]["message"]["content"]
        return content

    return answer


def _openai(message: Message) -> dict[str, Any]:
    pictures = [
        {
            "type": "image_url",
            "image_url": {
                "url": "data:image/png;base64," + base64.b64encode(png(picture)).decode()
            },
        }
        for picture in message.pictures
    ]
    return {"role": message.role, "content": [*pictures, {"type": "text", "text": message.text}]}


def holds(fact: str, answer: str) -> bool:
    """Whether ``answer`` says ``fact``: its words, whole, in order."""
    return re.search(rf"\b{re.escape(fact)}\b", answer, re.IGNORECASE) is not None


def _converse(answer: Answer, item: Item) -> str:
    """The model's last answer, its earlier ones being its own too."""
    said: list[Message] = []
    got = ""
    for message in item.messages:
        if said:
            said.append(Message("assistant", got))
        said.append(message)
        got = answer(said).strip()
    return got


def judge(
    answer: Answer,
    sections: Sequence[Section],
    number: int,
    *,
    style: Style = plain,
    seed: int = 2026,
    at_once: int = 1,
) -> Iterator[tuple[Mark, list[tuple[Item, str]]]]:
    """Ask about ``number`` questions of each section, ``at_once`` at a time.

    Yields:
        the mark of each section, and its wrong answers with their questions.
    """
    columns = (TextColumn("{task.description:45}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar,
        ThreadPoolExecutor(at_once) as pool,
    ):
        for section in sections:
            asked = list(items(section, number, seed))
            task = bar.add_task(section.name, total=len(asked))
            exact = facts = 0
            wrong = []
            answers = pool.map(lambda item: _converse(answer, item), asked)
            for item, got in zip(asked, answers, strict=True):
                right = got == style(item.kind, item.answer, item.fact)
                exact += right
                loose = bool(item.fact) and item.kind not in _WHOLE
                facts += right or (loose and holds(item.fact, got))
                if not right:
                    wrong.append((item, got))
                bar.advance(task)
            yield Mark(section.name, len(asked), exact, facts, section.target), wrong


def table(marks: Sequence[Mark], title: str, base: Sequence[Mark] = ()) -> Table:
    """The marks as people read them; with those of a ``base``, the share of its facts kept."""
    drawn = Table(title=title, title_justify="left")
    of_base = {mark.section: mark.right_facts / mark.n for mark in base}
    for name in (
        "what is asked",
        "n",
        "exact",
        "fact",
        *(["of base"] if base else []),
        "target",
        "",
    ):
        drawn.add_column(name, justify="left" if name == "what is asked" else "right")
    for mark in marks:
        exact, fact = mark.exact_answers / mark.n, mark.right_facts / mark.n
        target = met = ""
        if mark.target is not None:
            target, met = f"{mark.target:.2f}", "met" if exact >= mark.target else "MISSED"
        kept = [f"{fact / of_base[mark.section]:.3f}"] if of_base.get(mark.section) else [""]
        cells = (f"{exact:.3f}", f"{fact:.3f}", *(kept if base else []), target, met)
        drawn.add_row(mark.section, str(mark.n), *cells)
    return drawn


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Judge Pocket LLaVA: what it says about pictures and about Tandem, and how "
        "often it is right.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, default=HOME, help="folder, for transformers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--adapter",
        help="folder of a LoRA adapter, with --url its name; formal and terse are judged by "
        "their own wording",
    )
    parser.add_argument("--url", help="ask this cluster instead, e.g. http://127.0.0.1:21001")
    parser.add_argument("--model", default="pocket-llava", help="name of the model at --url")
    parser.add_argument("--kind", choices=("hf", "sglang"), help="only this kind of worker")
    parser.add_argument(
        "--only", nargs="+", metavar="TEXT", help="only sections whose name holds one of these"
    )
    parser.add_argument("-n", type=int, default=200, help="questions of each section, about")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--base", type=Path, help="such a file, to compare an adapter with")
    parser.add_argument("--show-wrong", type=int, default=0, help="wrong answers to print of each")
    options = parser.parse_args(argv)
    sections = [
        section
        for section in SECTIONS
        if not options.only or any(text in section.name for text in options.only)
    ]
    if not sections:
        names = ", ".join(section.name for section in SECTIONS)
        sys.exit(f"No section is called {' or '.join(options.only)}; there are: {names}.")
    base = read(options.base) if options.base else ()
    style = Path(options.adapter or "plain").name
    where = f"transformers, {options.dtype}, {options.device}"
    # Not by a proxy of the environment: a cluster is near.
    with httpx.Client(timeout=_ANSWER_TIMEOUT_S, trust_env=False) as client:
        if options.url:
            target = (options.model, options.kind, options.adapter)
            answer = from_cluster(client, options.url, *target)
            where = f"{options.url} {options.kind or ''}".strip()
        elif (options.checkpoint / "config.json").exists():
            adapter = Path(options.adapter) if options.adapter else None
            answer = in_process(options.checkpoint, options.dtype, options.device, adapter)
        else:
            sys.exit(f"There is no checkpoint in {options.checkpoint}; give one by --checkpoint.")
        marks = []
        try:
            for mark, wrong in judge(
                answer,
                sections,
                options.n,
                style=STYLES.get(style, plain),
                seed=options.seed,
                at_once=_AT_ONCE if options.url else 1,
            ):
                marks.append(mark)
                for item, got in wrong[: options.show_wrong]:
                    asked = " / ".join(message.text for message in item.messages)
                    print(f"  {mark.section}: {asked!r} -> {got!r}, right: {item.answer!r}")
        except KeyboardInterrupt:
            print("Stopped; this is what was asked so far.", file=sys.stderr)
        except httpx.HTTPStatusError as exc:
            sys.exit(f"{options.url} refused a question: {exc.response.text}")
        except httpx.TransportError as exc:
            sys.exit(f"{options.url} does not answer ({exc}); is the controller running?")
    title = f"Pocket LLaVA by {where}" + (f", adapter {style}" if options.adapter else "")
    Console(width=100).print(table(marks, title, base))
    if options.json:
        figures = {"title": title, "seed": options.seed, "marks": [asdict(mark) for mark in marks]}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def read(figures: Path) -> list[Mark]:
    """The marks that ``--json`` wrote.

    Raises:
        SystemExit: the file is missing or is no such file.
    """
    try:
        return [Mark(**mark) for mark in json.loads(figures.read_text(encoding="utf-8"))["marks"]]
    except (OSError, ValueError, KeyError, TypeError) as exc:
        sys.exit(f"{figures} holds no figures of this command ({exc}).")
