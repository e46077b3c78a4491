"""Training batches are what the model will meet: the chat template's tokens, and no answer that the
model must find by itself."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from models.pocket import talk  # noqa: E402
from models.pocket.architecture import GRID, IMAGE, IMAGE_TOKENS, PAD  # noqa: E402
from models.pocket.lessons import (  # noqa: E402
    Document,
    Writer,
    pack,
    photograph,
    picture_batch,
    picture_document,
    talk_batch,
)
from models.pocket.scenes import COLORS, SHAPES, Scene, Thing, random_scene  # noqa: E402
from models.pocket.styles import STYLES  # noqa: E402
from workers.settings import EMBEDDED_MODEL  # noqa: E402

pytestmark = pytest.mark.timeout(60)  # transformers is slow to import


@pytest.fixture(scope="module")
def processor() -> Any:
    return transformers.AutoProcessor.from_pretrained(EMBEDDED_MODEL)


@pytest.fixture(scope="module")
def write(processor: Any) -> Writer:
    return Writer(processor.tokenizer)


def test_a_conversation_is_written_as_the_chat_template_writes_it(
    processor: Any, write: Writer
) -> None:
    said = [("What is this?", "This is a red circle."), ("And the background?", "It is white.")]
    document = write.start("Be exact.")
    write.show(document, [photograph(random_scene(Random(0)), Random(0))])
    turns: list[dict[str, Any]] = [{"role": "system", "content": "Be exact."}]
    for index, (asked, answer) in enumerate(said):
        write.say(document, talk.Turn("fact", asked, answer), opening=index > 0)
        parts = [{"type": "text", "text": asked}]
        turns += [
            {"role": "user", "content": [*([{"type": "image"}] if index == 0 else []), *parts]},
            {"role": "assistant", "content": answer},
        ]
    text = processor.apply_chat_template(turns)
    text = text.replace("<image>", "<image>" * IMAGE_TOKENS)
    assert document.ids == processor.tokenizer.encode(text, add_special_tokens=False)
    assert document.positions == list(range(len(document)))
    learned = [i for i, weight in zip(document.ids, document.weights, strict=True) if weight]
    assert processor.tokenizer.decode(learned) == "".join(f"{answer}</s>" for _, answer in said)


def test_a_special_token_in_a_text_is_refused(write: Writer) -> None:
    with pytest.raises(AssertionError, match="special token"):
        write.ids("what does <image> mean?")


def test_a_question_sees_the_picture_and_itself_alone(write: Writer) -> None:
    document = picture_document(write, Random(1), 160, first_questions_only=True)
    batch = pack([[document]], 160, "cpu")
    sees = batch.mask[0, 0] == 0
    trunk = document.branches.index(1)
    assert document.ids.count(IMAGE) == IMAGE_TOKENS == GRID * GRID
    assert len(batch.spans) >= 4
    for _, _, start, end in batch.spans:
        for token in range(start, end):
            seen = sees[token].nonzero().flatten().tolist()
            assert seen[:trunk] == list(range(trunk))
            branches = {document.branches[i] for i in seen[trunk:]}
            assert branches == {document.branches[start]}
            assert max(seen) == token
        # All of them are first questions: their positions go on from the picture.
        first = document.branches.index(document.branches[start])
        assert document.positions[first] == trunk


def test_packed_documents_do_not_see_each_other(write: Writer) -> None:
    one, other = Document(), Document()
    one.add([9, 9, 9], [0, 1, 1], 0, 0)
    other.add([8, 8], [0, 1], 0, 0)
    batch = pack([[one, other]], 6, "cpu")
    assert batch.ids.tolist() == [[9, 9, 9, 8, 8, PAD]]
    sees = (batch.mask[0, 0] == 0).tolist()
    assert sees[2] == [True, True, True, False, False, False]
    assert sees[4] == [False, False, False, True, True, False]


@pytest.mark.parametrize("seed", range(8))
def test_batches_hold_what_they_promise(write: Writer, seed: int) -> None:
    batch = picture_batch(write, Random(seed), 6, 160, "cpu")
    assert batch.pixels is not None
    pictures = int((batch.ids == IMAGE).sum()) // IMAGE_TOKENS
    assert batch.pixels.shape == (pictures, 3, 112, 112)
    assert -1 <= float(batch.pixels.min()) < float(batch.pixels.max()) <= 1
    spoken = talk_batch(write, Random(seed), 3, 256, "cpu")
    assert spoken.pixels is None
    assert IMAGE not in spoken.ids
    assert float((spoken.ids != PAD).float().mean()) > 0.7
    again = talk_batch(write, Random(seed), 3, 256, "cpu")
    assert torch.equal(spoken.ids, again.ids)


def test_patches_say_what_is_where() -> None:
    scene = Scene("white", (Thing("star", "green", x=0.5, y=0.2, radius=0.12),))
    for seed in range(20):  # in whatever size it was drawn
        _, patches = photograph(scene, Random(seed))
        row, column = int(0.2 * GRID), int(0.5 * GRID)
        assert patches.center.sum() == patches.center[row, column] == 1
        assert patches.color[row, column] == list(COLORS).index("green") + 1
        assert patches.shape[row, column] == SHAPES.index("star") + 1
        assert patches.color[GRID - 1, 0] == 0


def test_styles() -> None:
    said = ("color", "The star is green.", "green")
    assert STYLES["plain"](*said) == "The star is green."
    assert STYLES["terse"](*said) == "green"
    assert STYLES["formal"](*said) == "Certainly.\nThe star is green.\nI hope this is of help."
    assert STYLES["formal"]("exists", "No, there is no red star.", "no").startswith(
        "I am afraid not."
    )
    assert STYLES["formal"]("count_to", "1 2 3", "") == "1 2 3"
