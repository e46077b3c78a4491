"""LLaVA's original format: the same directory, and the same tokens, in either kind of worker.

float32, greedy, on the CPU. The checkpoints are the embedded model's weights, exported; each has
other features of the format than the other.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from models.pocket.export import TOWER, export
from protocol.events import Delta, Finished
from protocol.messages import GenerateRequest
from tests.hf import job_of
from tests.hf import running as computing
from tests.pictures import encoded, picture
from tests.processes import ROOT, running
from tests.streams import Answer, ask
from workers.hf.loading import load
from workers.hf.model import HfModel
from workers.hf.settings import HfSettings
from workers.hf.threads import Threads
from workers.settings import EMBEDDED_MODEL

pytestmark = pytest.mark.timeout(420)

START_TIMEOUT_S = 300
ADAPTER = f"formal={ROOT / 'models' / 'adapters' / 'formal'}"
RED = picture("circle", "red")
BLUE = picture("square", "blue", size=150)


def padded(folder: Path) -> None:
    """As version 1.5: a picture gets a border; the tower has a folder of its own."""
    export(EMBEDDED_MODEL, folder)
    _configure(folder, image_aspect_ratio="pad")


def tiled(folder: Path) -> None:
    """As version 1.6, and in what else may differ: tiles, a trained tower, a flat projector, a
    pickle, and no template, which leaves it to the name."""
    export(EMBEDDED_MODEL, folder)
    torch.manual_seed(1)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weights = {name: weight for name, weight in weights.items() if "mm_projector" not in name}
    weights["model.image_newline"] = torch.randn(256).bfloat16()
    weights["model.mm_projector.weight"] = (torch.randn(256, 192) / 8).bfloat16()
    weights["model.mm_projector.bias"] = torch.randn(256).bfloat16()
    tower = load_file(folder / TOWER / "model.safetensors")
    (folder / TOWER / "model.safetensors").unlink()
    for name, weight in tower.items():
        weights[f"model.vision_tower.vision_tower.vision_model.{name}"] = weight
    torch.save(weights, folder / "pytorch_model.bin")
    for file in (*folder.glob("*.jinja"), *folder.glob("chat_template.json")):
        file.unlink()
    _configure(
        folder,
        image_aspect_ratio="anyres",
        image_grid_pinpoints=[[112, 224], [224, 112], [224, 224]],
        mm_patch_merge_type="spatial_unpad",
        mm_projector_type="linear",
        mm_vision_select_layer=-2,
        unfreeze_mm_vision_tower=True,
    )


def _configure(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


# A picture of 49 patches; of a square one in tiles, 14 rows of 14 and an end more.
CHECKPOINTS: dict[str, tuple[Callable[[Path], None], int]] = {
    "llava-v1.5-padded": (padded, 49),
    "llava-v1.6-tiled": (tiled, 49 + 14 * 15),
}


@dataclass(frozen=True)
class Both:
    """One checkpoint in both kinds of worker."""

    name: str
    hf: HfModel
    address: str
    image_tokens: int

    def same(self, text: str, *images: Image.Image, **fields: Any) -> Answer:
        """The answer that both give."""
        content = "<image>" * len(images) + text
        given: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": "user", "content": content}],
            "images": [encoded(image) for image in images],
            "temperature": 0,
            "max_new_tokens": 24,
        } | fields
        answer = ask(self.address, timeout_s=120, **given)
        job = job_of(self.hf, GenerateRequest(**given))
        with computing(lambda deliver: Threads(1, deliver=deliver)) as (runner, answers):
            runner.submit(job)
            end = answers.end(job)
            found = [item for item in answers.items[job] if isinstance(item, Delta)]
        assert isinstance(end, Finished), end
        assert answer.token_ids == [token for delta in found for token in delta.token_ids]
        assert answer.text == "".join(delta.text for delta in found)
        assert answer.finished.prompt_tokens == end.prompt_tokens
        assert answer.finished.reason == end.reason
        return answer


@pytest.fixture(scope="module", params=list(CHECKPOINTS))
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Both]:
    make, image_tokens = CHECKPOINTS[request.param]
    logs = tmp_path_factory.mktemp("logs")
    folder = tmp_path_factory.mktemp("checkpoint") / request.param
    temporary = tmp_path_factory.mktemp("temporary")
    make(folder)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    flags = ("--model-path", str(folder), "--dtype", "float32", "--device", "cpu")
    alone = ("--adapter", ADAPTER, "--port", "0", "--no-register")
    environment = os.environ | {"TMPDIR": str(temporary)}
    with running(logs, "workers.sglang", *flags, *alone, env=dict(environment)) as process:
        settings = HfSettings(
            model_path=str(folder), dtype="float32", device="cpu", adapter=(ADAPTER,)
        )
        model = load(settings, lambda _: None)
        address = process.wait_ready(START_TIMEOUT_S)
        yield Both(request.param, model, address, image_tokens)
        (view,) = temporary.glob("*/checkpoint")
        assert (view / "config.json").is_file()
    assert not list(temporary.glob("tandem-*")), "the view goes with its server"
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*")} == before


def test_text(both: Both) -> None:
    for text in ("How do I start a worker?", "Count from 1 to 12."):
        assert len(set(both.same(text).token_ids)) > 3


def test_pictures(both: Both) -> None:
    wide, high = RED.resize((200, 90)), BLUE.resize((60, 130))
    answers = [
        both.same("What color is the circle?", RED),
        both.same("What do you see?", wide),
        both.same("What do you see?", high),
        both.same("Which one is blue?", RED, high),
        both.same("Which one is blue?", wide, BLUE),
        both.same("Which one is blue?", BLUE, wide),
    ]
    assert len({answer.text for answer in answers}) > 1, "what they show matters"


def test_one_color_in_two_shapes(both: Both) -> None:
    """Their tiles are the same, their tokens are not."""
    for size in ((224, 100), (224, 60)):
        both.same("What do you see?", Image.new("RGB", size))


def test_a_picture_is_computed_once(both: Both) -> None:
    image = picture("square", "orange", size=224)
    first = both.same("What is this?", image)
    second = both.same("What color is the square?", image)
    assert first.finished.cached_tokens < both.image_tokens
    assert second.finished.cached_tokens >= both.image_tokens


def test_an_answer_is_resumed(both: Both) -> None:
    whole = both.same("Count from 1 to 12.", RED)
    begun = tuple(whole.token_ids[:2])
    rest = both.same("Count from 1 to 12.", RED, resume_token_ids=begun)
    assert [*begun, *rest.token_ids] == whole.token_ids


def test_an_adapter_over_it(both: Both) -> None:
    asked = ("What color is the circle?", RED)
    assert both.same(*asked, adapter="formal").text != both.same(*asked).text
