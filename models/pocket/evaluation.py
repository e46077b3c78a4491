"""Judge Pocket LLaVA: ``python models/pocket-llava/eval.py``.

Asks the questions of ``exam`` greedily, one conversation at a time, and counts the answers that are
right letter for letter. In this process through transformers, or from a running cluster.
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

from models.pocket.exam import SECTIONS, Item, Message, items
from models.pocket.scenes import png
from models.pocket.styles import STYLES, Style, plain

HOME = Path(__file__).parents[1] / "pocket-llava"
MAX_TOKENS = 160  # to a hundred and a little: one who does not stop in time is wrong
Answer = Callable[[Item], str]


@dataclass(frozen=True, slots=True)
class Mark:
    """The figures of one section."""

    section: str
    n: int
    exact: int
    fact: int  # answers that hold what was asked for, in whatever words
    target: float | None


def in_process(path: Path, dtype: str, device: str, adapter: Path | None) -> Answer:
    """Answers through transformers, as the Hugging Face worker computes them."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(path)
    model: Any = LlavaForConditionalGeneration.from_pretrained(path, dtype=getattr(torch, dtype))
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    model = model.to(device).eval()

    def answer(item: Item) -> str:
        turns = [
            {
                "role": message.role,
                "content": [
                    *({"type": "image"} for _ in message.pictures),
                    {"type": "text", "text": message.text},
                ],
            }
            for message in item.messages
        ]
        text = processor.apply_chat_template(turns, add_generation_prompt=True)
        pictures = [picture for message in item.messages for picture in message.pictures]
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


def from_cluster(url: str, model: str, kind: str | None, adapter: str | None) -> Answer:
    """Answers of a controller or worker that speaks OpenAI's API, or of any such server."""
    client = httpx.Client(timeout=120)
    extra = {name: value for name, value in (("kind", kind), ("adapter", adapter)) if value}

    def answer(item: Item) -> str:
        body = {
            "model": model,
            "messages": [_openai(message) for message in item.messages],
            "temperature": 0,
            "max_tokens": MAX_TOKENS,
            **extra,
        }
        response = client.post(f"{url.rstrip('/')}/v1/chat/completions", json=body)
        if response.status_code != 200:
            raise SystemExit(f"{url} refused a question: {response.text}")
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


def judge(
    answer: Answer, number: int, *, style: Style = plain, seed: int = 2026, at_once: int = 1
) -> Iterator[tuple[Mark, list[tuple[Item, str]]]]:
    """Ask every section and yield its mark, and the wrong answers with their questions."""
    columns = (TextColumn("{task.description:45}"), BarColumn(), MofNCompleteColumn())
    with (
        Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as bar,
        ThreadPoolExecutor(at_once) as pool,
    ):
        for section in SECTIONS:
            asked = list(items(section, number, seed))
            task = bar.add_task(section.name, total=len(asked))
            exact = facts = 0
            wrong = []
            for item, got in zip(asked, pool.map(answer, asked), strict=True):
                right = got.strip() == style(item.kind, item.answer, item.fact)
                exact += right
                facts += right or (bool(item.fact) and holds(item.fact, got))
                if not right:
                    wrong.append((item, got))
                bar.advance(task)
            yield Mark(section.name, len(asked), exact, facts, section.target), wrong


def table(marks: Sequence[Mark], title: str) -> Table:
    drawn = Table(title=title, title_justify="left")
    for name in ("what is asked", "n", "exact", "fact", "target", ""):
        drawn.add_column(name, justify="left" if name == "what is asked" else "right")
    for mark in marks:
        share = mark.exact / mark.n
        verdict = "" if mark.target is None else ("met" if share >= mark.target else "MISSED")
        drawn.add_row(
            mark.section,
            str(mark.n),
            f"{share:.3f}",
            f"{mark.fact / mark.n:.3f}",
            "" if mark.target is None else f"{mark.target:.2f}",
            verdict,
        )
    return drawn


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description="Judge Pocket LLaVA on questions it was never trained on.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--checkpoint", type=Path, default=HOME, help="folder, for transformers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--adapter", help="folder of a LoRA adapter; with --url, its name")
    parser.add_argument("--style", choices=list(STYLES), default="plain", help="expected wording")
    parser.add_argument("--url", help="ask this cluster instead, e.g. http://127.0.0.1:21001")
    parser.add_argument("--model", default="pocket-llava", help="name of the model at --url")
    parser.add_argument("--kind", choices=("hf", "sglang"), help="only this kind of worker")
    parser.add_argument("-n", type=int, default=200, help="questions of each sort")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--json", type=Path, help="write the figures to this file too")
    parser.add_argument("--show-wrong", type=int, default=0, help="wrong answers to print of each")
    options = parser.parse_args(argv)
    if options.url:
        answer = from_cluster(options.url, options.model, options.kind, options.adapter)
        where, at_once = options.url + (f" ({options.kind})" if options.kind else ""), 8
    else:
        if not (options.checkpoint / "config.json").exists():
            sys.exit(f"There is no checkpoint in {options.checkpoint}; give one by --checkpoint.")
        adapter = Path(options.adapter) if options.adapter else None
        answer = in_process(options.checkpoint, options.dtype, options.device, adapter)
        where, at_once = f"transformers, {options.dtype}, {options.device}", 1
    title = f"Pocket LLaVA by {where}" + (f", {options.adapter}" if options.adapter else "")
    marks = []
    try:
        for mark, wrong in judge(
            answer, options.n, style=STYLES[options.style], seed=options.seed, at_once=at_once
        ):
            marks.append(mark)
            for item, got in wrong[: options.show_wrong]:
                asked = " / ".join(message.text for message in item.messages)
                print(f"  {mark.section}: {asked!r} -> {got!r}, right: {item.answer!r}")
    except KeyboardInterrupt:
        print("Stopped; this is what was asked so far.", file=sys.stderr)
    except httpx.TransportError as exc:
        sys.exit(f"{options.url} does not answer ({exc}); is the controller running?")
    Console(width=100).print(table(marks, title))
    if options.json:
        figures = {"title": title, "seed": options.seed, "marks": [asdict(mark) for mark in marks]}
        options.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
