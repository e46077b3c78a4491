"""Positions of Qwen-VL, against those of transformers.

pytest tests/unit/test_sglang_positions.py
"""

from __future__ import annotations

from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from tests.checkpoints import make  # noqa: E402
from workers.sglang.server.positions import of_pictures  # noqa: E402

IMAGE = 9
PROMPTS: dict[str, list[int | tuple[int, int]]] = {  # a token, or rows and columns of a picture
    "nothing before": [(2, 3), 1],
    "nothing behind": [1, 1, (4, 2)],
    "several": [1, (1, 1), 1, 1, (3, 3), 1, (2, 5), 1, 1],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = make("qwen2.5-vl", tmp_path_factory.mktemp("tiny") / "tiny")
    return transformers.AutoModelForImageTextToText.from_pretrained(path).model


@pytest.mark.parametrize("prompt", PROMPTS.values(), ids=PROMPTS)
def test_positions_are_those_of_transformers(
    model: Any, prompt: list[int | tuple[int, int]]
) -> None:
    ids: list[int] = []
    pictures: list[tuple[int, int, int]] = []
    for part in prompt:
        if isinstance(part, tuple):
            pictures.append((len(ids), *part))
            ids += [IMAGE] * (part[0] * part[1])
        else:
            ids.append(part)
    tokens = torch.tensor([ids])
    expected, _ = model.get_rope_index(
        tokens,
        mm_token_type_ids=(tokens == IMAGE).int(),
        image_grid_thw=torch.tensor([(1, 2 * rows, 2 * columns) for _, rows, columns in pictures]),
    )
    assert torch.equal(of_pictures(len(ids), pictures), expected[:, 0])


def test_text_alone_is_counted() -> None:
    assert of_pictures(3, []).tolist() == [[0, 1, 2]] * 3


@pytest.mark.parametrize("pictures", [[(0, 2, 2)], [(0, 1, 2), (1, 1, 1)]])
def test_pictures_elsewhere_are_refused(pictures: list[tuple[int, int, int]]) -> None:
    with pytest.raises(ValueError, match="not where their tokens are"):
        of_pictures(3, pictures)
