"""One id for each picture goes to SGLang, and becomes as many as the picture has tokens there."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.checkpoints import make
from tests.hf import asked
from tests.pictures import encoded, picture
from workers.sglang.checkpoint import load
from workers.sglang.server.placeholders import expand, runs

IMAGE = 9


def test_each_placeholder_becomes_a_run() -> None:
    ids, offsets = expand([1, IMAGE, IMAGE, 2, IMAGE], IMAGE, [2, 1, 3])
    assert ids == [1, IMAGE, IMAGE, IMAGE, 2, IMAGE, IMAGE, IMAGE]
    assert offsets == [(1, 2), (3, 3), (5, 7)]


@pytest.mark.parametrize("counts", [[], [2, 2]])
def test_placeholders_without_their_images_are_refused(counts: list[int]) -> None:
    with pytest.raises(ValueError, match=f"1 image placeholders for {len(counts)} images"):
        expand([1, IMAGE], IMAGE, counts)


def test_the_lengths_of_runs() -> None:
    assert runs([IMAGE, IMAGE, 1, IMAGE, 2, 3], IMAGE) == [2, 1]
    assert runs([1, 2], IMAGE) == []


@pytest.mark.parametrize(
    ("name", "tokens"),
    [
        ("llava-next", 88),  # 16 of the whole, 8 rows of 8 and an end each
        ("llava-onevision", 88),
        ("qwen2.5-vl", 16),  # scaled down to 112 x 112; four patches are one token
        ("qwen2", 0),
    ],
)
def test_the_worker_sends_one_id_for_each_picture(name: str, tokens: int, tmp_path: Path) -> None:
    checkpoint = load(make(name, tmp_path), trust_remote_code=False)
    assert checkpoint.image_tokens == tokens
    if tokens:
        image = encoded(picture())
        ids = checkpoint.encode(asked("What are they?", image, image))
        assert sum(token_id == checkpoint.image_token_id for token_id in ids) == 2
