"""Training batches: pictures with what is in each patch, and rows of packed conversations.

A row of tokens holds documents that do not see each other. A document about a picture has branches:
every question sees the picture and itself, none sees another question, so that all of them are
first questions and an earlier answer never gives a later one away.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from io import BytesIO
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from models.pocket import talk
from models.pocket.architecture import (
    ASSISTANT,
    BOS,
    CONTEXT,
    EOS,
    GRID,
    IMAGE,
    IMAGE_TOKENS,
    PAD,
    PATCH,
    SIDE,
    SYSTEM,
    USER,
)
from models.pocket.questions import Question, any_question, its_color, its_shape, what
from models.pocket.scenes import BACKGROUNDS, COLORS, SHAPES, Scene, draw, random_scene
from models.pocket.styles import Style, plain

_COLORS, _SHAPES, _BACKGROUNDS = list(COLORS), list(SHAPES), list(BACKGROUNDS)

_KIND_SHARES = {
    "what": 6.0,
    "its_color": 4.0,
    "its_shape": 4.0,
    "color": 18.0,
    "shape": 14.0,
    "count": 13.0,
    "count_of": 8.0,
    "exists": 14.0,
    "background": 4.0,
    "describe": 7.0,
    "relation": 8.0,
}


# --- Pictures ---------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Patches:
    """What is in each patch of a picture; arrays of shape (GRID, GRID), 0 for nothing."""

    center: np.ndarray  # 1 where a thing's centre lies
    color: np.ndarray
    shape: np.ndarray
    offset: np.ndarray  # (GRID, GRID, 3): to the centre (x, y), and the radius, in 20 pixels
    background: int


def photograph(scene: Scene, random: Random) -> tuple[np.ndarray, Patches]:
    """Draw ``scene`` as pictures come: of other sizes, as JPEG, with noise.

    Returns:
        RGB bytes of shape (SIDE, SIDE, 3), and what is in its patches.
    """
    size = (SIDE, SIDE)
    if random.random() < 0.35:
        side, ratio = random.uniform(96, 300), random.choice((1, 1, random.uniform(0.7, 1.4)))
        size = (int(side), int(side * ratio))
    picture = draw(scene, random, size)
    if random.random() < 0.08:
        file = BytesIO()
        picture.save(file, "JPEG", quality=random.randint(60, 95))
        picture = Image.open(file).convert("RGB")
    if size != (SIDE, SIDE):
        picture = picture.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    pixels = np.asarray(picture)
    if random.random() < 0.25:
        noise = np.random.default_rng(random.getrandbits(32)).integers(-6, 7, size=pixels.shape)
        pixels = np.clip(pixels.astype(np.int16) + noise, 0, 255).astype(np.uint8)
    return pixels, _patches(scene, size)


_ROWS, _COLUMNS = np.mgrid[0:GRID, 0:GRID] * PATCH + PATCH / 2  # patch centres, pixels


def _patches(scene: Scene, size: tuple[int, int]) -> Patches:
    """What the patches hold once a picture of ``size`` is squeezed to the square."""
    center, color, shape = (np.zeros((GRID, GRID), np.int64) for _ in range(3))
    offset = np.zeros((GRID, GRID, 3), np.float32)
    nearest = np.full((GRID, GRID), np.inf)
    for thing in scene.things:
        x, y = thing.x * SIDE, thing.y * SIDE
        radius_x, radius_y = (thing.radius * min(size) / side * SIDE for side in size)
        across, down = x - _COLUMNS, y - _ROWS
        # The patch counts as the thing's if it touches it, or nearly so.
        distance = np.hypot(across / radius_x, down / radius_y)
        radius = (radius_x + radius_y) / 2
        mine = (distance * radius < radius + 7) & (distance < nearest)
        nearest[mine] = distance[mine]
        color[mine] = _COLORS.index(thing.color) + 1
        shape[mine] = _SHAPES.index(thing.shape) + 1
        offset[mine] = np.stack([across, down, np.full_like(across, radius)], -1)[mine] / 20
        center[min(GRID - 1, int(y // PATCH)), min(GRID - 1, int(x // PATCH))] = 1
    return Patches(center, color, shape, offset, _BACKGROUNDS.index(scene.background))


def pixel_values(pictures: list[np.ndarray]) -> Tensor:
    """Normalized pictures of shape (pictures, 3, SIDE, SIDE), as the processor makes them."""
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


@dataclass(frozen=True, slots=True)
class PatchTargets:
    """``Patches`` of a batch, flattened to (pictures * IMAGE_TOKENS, ...); background apart."""

    center: Tensor
    color: Tensor
    shape: Tensor
    offset: Tensor
    background: Tensor

    @classmethod
    def of(cls, patches: list[Patches], device: str) -> PatchTargets:
        def flat(name: str) -> Tensor:
            stacked = np.stack([getattr(one, name) for one in patches])
            return torch.from_numpy(stacked).flatten(0, 2).to(device)

        background = torch.tensor([one.background for one in patches], device=device)
        return cls(flat("center"), flat("color"), flat("shape"), flat("offset"), background)


# --- Rows of tokens ---------------------------------------------------------------------------


@dataclass(slots=True)
class Document:
    """Tokens that see each other, as far as their branches allow; branch 0 is the trunk."""

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)  # of each token as a target; 0: not learned
    branches: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    spans: list[tuple[str, int, int]] = field(default_factory=list)  # kind, answer's start and end
    pictures: list[tuple[np.ndarray, Patches]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def next_position(self) -> int:
        return self.positions[-1] + 1 if self.positions else 0

    def add(self, ids: list[int], weights: list[float], branch: int, position: int) -> None:
        self.ids += ids
        self.weights += weights
        self.branches += [branch] * len(ids)
        self.positions += range(position, position + len(ids))


class Writer:
    """Turns conversations into documents, token for token as the chat template does."""

    def __init__(self, words: PreTrainedTokenizerFast, style: Style = plain) -> None:
        self._words = words
        self._style = style
        self._known: dict[str, list[int]] = {}

    def ids(self, text: str) -> list[int]:
        known = self._known.get(text)
        if known is None:
            known = self._words.encode(text, add_special_tokens=False)
            assert min(known) > ASSISTANT, f"a special token is written out in {text!r}"
            if len(self._known) < 200_000:
                self._known[text] = known
        return known

    def turn(self, turn: Question | talk.Turn) -> tuple[list[int], list[int]]:
        """The tokens of what the user says, and of the answer to its end."""
        fact = turn.fact if isinstance(turn, Question) else ""
        answer = self._style(turn.kind, turn.answer, fact)
        return [*self.ids(turn.text), ASSISTANT], [*self.ids(answer), EOS]

    def needs(self, turn: Question | talk.Turn) -> int:
        """Tokens that ``say`` adds, or one more."""
        return 1 + sum(map(len, self.turn(turn)))

    def start(self, system: str | None) -> Document:
        document = Document()
        ids = [BOS] if system is None else [BOS, SYSTEM, *self.ids(system)]
        document.add(ids, [0.0] * len(ids), 0, 0)
        return document

    def say(
        self,
        document: Document,
        turn: Question | talk.Turn,
        *,
        opening: bool = True,
        branch: int = 0,
        position: int | None = None,
    ) -> None:
        """Append a question and its answer; ``opening`` is false where the user's turn is open."""
        asked, answer = self.turn(turn)
        prompt = [*([USER] if opening else []), *asked]
        weights = [1.0] * len(answer)
        if turn.kind in ("count_to", "count_between"):
            # The lesson is where to stop; what follows 41 is soon known.
            weights = [0.3] * len(answer)
            weights[-2:] = 1.0, 2.0
        start = len(document)
        document.add(
            prompt + answer,
            [0.0] * len(prompt) + weights,
            branch,
            document.next_position if position is None else position,
        )
        document.spans.append((turn.kind, start + len(prompt), len(document)))

    def show(self, document: Document, pictures: list[tuple[np.ndarray, Patches]]) -> None:
        """Open a user's turn with ``pictures``."""
        ids = [USER, *([IMAGE] * IMAGE_TOKENS * len(pictures))]
        document.add(ids, [0.0] * len(ids), 0, document.next_position)
        document.pictures += pictures


_FAR = 0.2  # share of conversations whose turns are far apart


def _jump(document: Document, random: Random) -> int:
    """A position further on, as if much had been said before the next turn.

    Rows are short; without this, all that is further away than a row would be new to the model.
    """
    far = min(document.next_position + random.randint(0, 700), CONTEXT - 500)
    return max(far, document.next_position)


def _system(random: Random) -> str | None:
    return random.choice(talk.SYSTEM_PROMPTS) if random.random() < 0.12 else None


def picture_document(
    write: Writer, random: Random, length: int, *, first_questions_only: bool
) -> Document:
    """A document about a picture, at most ``length`` tokens long.

    Args:
        first_questions_only: as people write them, for judging; otherwise one row in five is a
            conversation in turns, some of them about a new picture halfway, or shows two at once.
    """
    style = (
        "branches"
        if first_questions_only
        else random.choices(("branches", "turns", "pair"), (80, 15, 5))[0]
    )
    document = write.start(None if first_questions_only else _system(random))
    scene = random_scene(random, count=1 if style == "pair" else None)
    if style == "turns" and random.random() < 0.3:
        write.say(document, talk.fact(random))
    if style == "pair":
        _pair(write, document, (scene, random_scene(random, count=1)), random, length)
        return document
    write.show(document, [photograph(scene, random)])
    trunk, branch = document.next_position, 0
    far = random.random() < _FAR
    another = style == "turns" and random.random() < 0.3
    opening = False  # showing a picture has opened the user's turn
    while True:
        if another and branch == 2 and len(document) + IMAGE_TOKENS < length:
            scene = random_scene(random)
            write.show(document, [photograph(scene, random)])
            opening = False
        question: Question | talk.Turn = any_question(random, scene, _KIND_SHARES)
        if not first_questions_only:
            what_else = random.random()
            if what_else < 0.03:
                question = talk.fact(random)
            elif what_else < 0.06:
                question = talk.beyond(random)
            elif isinstance(question, Question):
                question = _follow_up(document, question, random, style)
        if len(document) + write.needs(question) > length:
            return document
        branch += 1
        if style == "branches":
            write.say(document, question, opening=False, branch=branch, position=trunk)
        else:
            position = _jump(document, random) if far and opening else None
            write.say(document, question, opening=opening, position=position)
            opening = True


def _follow_up(document: Document, question: Question, random: Random, style: str) -> Question:
    """``question`` as careless people ask it; in a conversation, sometimes only half of it."""
    text = talk.careless(question.text, random)
    if style == "turns" and document.spans and random.random() < 0.4:
        short = {"background": "And the background?", "count": "And how many shapes are there?"}
        text = short.get(question.kind, text)
        last = document.spans[-1][0]
        if question.kind == "color" and last == "color":
            text = f"And the {question.answer.split()[1]}?"
    return Question(question.kind, text, question.answer, question.fact)


def _pair(
    write: Writer, document: Document, scenes: tuple[Scene, Scene], random: Random, length: int
) -> None:
    """Two pictures in one turn; each question says which of them it is about."""
    write.show(document, [photograph(scene, random) for scene in scenes])
    trunk, branch = document.next_position, 0
    while True:
        which = random.randrange(2)
        asked = random.choice((what, its_color, its_shape))(scenes[which], random)
        assert asked is not None  # there is one thing in each
        noun = f"{('first', 'second')[which]} {random.choice(('picture', 'image'))}"
        text = {
            "what": f"What is in the {noun}?",
            "its_color": f"What color is the object in the {noun}?",
            "its_shape": f"What shape is in the {noun}?",
        }[asked.kind]
        question = Question("pair", text, asked.answer, asked.fact)
        branch += 1
        if len(document) + write.needs(question) > length:
            return
        write.say(document, question, opening=False, branch=branch, position=trunk)


def talk_document(write: Writer, random: Random, length: int) -> Document | None:
    """A conversation without a picture, or None where its first turn is too long for ``length``."""
    document = write.start(_system(random))
    far = random.random() < _FAR
    for turn in talk.conversation(random):
        if len(document) + write.needs(turn) > length:
            break
        position = _jump(document, random) if far and document.spans else None
        write.say(document, turn, position=position)
    return document if document.spans else None


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of equal length. ``spans`` are (kind, row, start, end) of the answers."""

    ids: Tensor  # (rows, length)
    weights: Tensor  # (rows, length)
    positions: Tensor  # (rows, length)
    mask: Tensor  # (rows, 1, length, length), to be added to the attention scores
    pixels: Tensor | None  # (pictures, 3, SIDE, SIDE)
    targets: PatchTargets | None
    spans: list[tuple[str, int, int, int]]


def pack(rows: list[list[Document]], length: int, device: str) -> Batch:
    shape = (len(rows), length)
    ids, owners, branches, positions = (np.zeros(shape, np.int64) for _ in range(4))
    ids += PAD
    owners -= 1
    weights = np.zeros(shape, np.float32)
    spans, pictures = [], []
    for index, row in enumerate(rows):
        end = 0
        for owner, document in enumerate(row):
            start, end = end, end + len(document)
            here = slice(start, end)
            ids[index, here] = document.ids
            weights[index, here] = document.weights
            owners[index, here] = owner
            branches[index, here] = document.branches
            positions[index, here] = document.positions
            spans += [(kind, index, start + a, start + b) for kind, a, b in document.spans]
            pictures += document.pictures
    owner, branch = torch.from_numpy(owners), torch.from_numpy(branches)
    sees = (owner[:, :, None] == owner[:, None, :]).tril()
    sees &= (branch[:, None, :] == 0) | (branch[:, :, None] == branch[:, None, :])
    # Eager attention adds its mask: a boolean one would be silently wrong.
    mask = torch.zeros(sees.shape).masked_fill_(~sees, -1e4)[:, None]
    pixels = targets = None
    if pictures:
        pixels = pixel_values([pixels for pixels, _ in pictures]).to(device)
        targets = PatchTargets.of([patches for _, patches in pictures], device)
    return Batch(
        torch.from_numpy(ids).to(device),
        torch.from_numpy(weights).to(device),
        torch.from_numpy(positions).to(device),
        mask.to(device),
        pixels,
        targets,
        spans,
    )


def picture_batch(
    write: Writer,
    random: Random,
    rows: int,
    length: int,
    device: str,
    *,
    first_questions_only: bool = False,
) -> Batch:
    documents = [
        picture_document(write, random, length, first_questions_only=first_questions_only)
        for _ in range(rows)
    ]
    return pack([[document] for document in documents], length, device)


def talk_batch(write: Writer, random: Random, rows: int, length: int, device: str) -> Batch:
    packed: list[list[Document]] = []
    for _ in range(rows):
        row: list[Document] = []
        room = length
        while room > length // 8:
            document = talk_document(write, random, room)
            if document is None:
                break
            row.append(document)
            room -= len(document)
        packed.append(row)
    return pack(packed, length, device)
