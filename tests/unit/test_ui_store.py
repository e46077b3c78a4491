"""What is kept: whose it is, what goes with it, what survives."""

from __future__ import annotations

import io
import json
import sqlite3
import zipfile
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from ui import export, images
from ui.model import Failure, Figures, Settings
from ui.store import SCHEMA_VERSION, Database

ME, OTHER = "browser:me", "browser:other"
SETTINGS = Settings(model="m", kind="hf", seed=7)


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    with closing(Database(tmp_path / "data" / "chat.db")) as database:
        yield database


def keep(database: Database, name: str = "red") -> str:
    data = name.encode() * 10
    sha256 = images.Picture(name, data, "image/png", 1, 1).sha256
    database.keep(sha256, "image/png", (1, 1), data)
    return sha256


def ask(
    database: Database, text: str = "Why?", *hashes: str, in_: str | None = None
) -> tuple[str, int]:
    return database.ask(ME, in_, text, [(sha256, "a.png") for sha256 in hashes])


def answered(database: Database, turn: int, text: str = "Because.") -> int:
    answer_id = database.begin(turn, SETTINGS, "r1")
    (answer,) = [
        a
        for c in database.listed(ME)
        for t in database.conversation(ME, c.id).turns  # type: ignore[union-attr]
        for a in t.answers
        if a.id == answer_id
    ]
    answer.text, answer.token_ids, answer.status = text, [1, 2, 3], "stop"
    answer.figures = Figures(ttft_s=0.5, completion_tokens=3)
    database.save(answer)
    return answer_id


def test_a_conversation_is_the_same_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "chat.db"
    with closing(Database(path)) as database:
        sha256 = keep(database)
        conversation, turn = ask(database, "What is this?", sha256)
        answered(database, turn, "It is red.")
        before = database.conversation(ME, conversation)
    with closing(Database(path)) as database:
        assert database.conversation(ME, conversation) == before
        assert database.image(sha256) == ("image/png", b"red" * 10)
    assert before is not None
    assert before.title == "What is this?"
    assert before.turns[0].images[0].sha256 == sha256
    (answer,) = before.turns[0].answers
    assert (answer.text, answer.token_ids, answer.settings) == ("It is red.", [1, 2, 3], SETTINGS)
    assert path.stat().st_mode & 0o077 == 0


def test_nobody_sees_or_changes_what_is_anothers(database: Database) -> None:
    conversation, _ = ask(database)
    assert database.conversation(OTHER, conversation) is None
    assert database.listed(OTHER) == []
    database.rename(OTHER, conversation, "Mine now")
    database.delete(OTHER, conversation)
    asked, _ = database.ask(OTHER, conversation, "Me too", [])
    assert asked != conversation
    found = database.conversation(ME, conversation)
    assert found is not None
    assert (found.title, len(found.turns)) == ("Why?", 1)


def test_search_finds_words_of_titles_questions_and_answers(database: Database) -> None:
    first, turn = ask(database, "Apples?")
    answered(database, turn, "100% pears")
    second, _ = ask(database, "Plums_and more")
    database.rename(ME, second, "Fruit")
    for search, expected in (
        ("apples", [first]),
        ("PEARS", [first]),
        ("fruit", [second]),
        ("100%", [first]),
        ("s_a", [second]),
        ("%", [first]),
        ("nothing", []),
    ):
        assert [item.id for item in database.listed(ME, search)] == expected, search


def test_an_image_is_kept_once_and_goes_with_its_last_conversation(database: Database) -> None:
    sha256 = keep(database)
    keep(database)
    first, _ = ask(database, "A", sha256)
    second, _ = ask(database, "B", sha256)
    database.delete(ME, first)
    assert database.image(sha256) is not None
    database.delete(ME, second)
    assert database.image(sha256) is None


def test_a_retry_is_a_second_answer_and_an_empty_one_is_replaced(database: Database) -> None:
    conversation, turn = ask(database)
    database.begin(turn, SETTINGS, "r0")  # never had a word
    answered(database, turn, "One")
    answered(database, turn, "Two")
    found = database.conversation(ME, conversation)
    assert found is not None
    assert [answer.text for answer in found.turns[0].answers] == ["One", "Two"]
    assert found.turns[0].current == 1
    database.choose(turn, 0)
    database.reword(turn, "How?")
    found = database.conversation(ME, conversation)
    assert found is not None
    assert (found.turns[0].text, found.turns[0].answers) == ("How?", [])


def test_turns_are_cut_and_dropped(database: Database) -> None:
    conversation, first = ask(database, "1")
    _, second = ask(database, "2", in_=conversation)
    ask(database, "3", in_=conversation)
    database.cut_after(second)
    database.drop(second)
    found = database.conversation(ME, conversation)
    assert found is not None
    assert [turn.id for turn in found.turns] == [first]


def test_a_failure_is_kept(database: Database) -> None:
    conversation, turn = ask(database)
    answered(database, turn)
    found = database.conversation(ME, conversation)
    assert found is not None
    (answer,) = found.turns[0].answers
    answer.failure = Failure(code="overloaded", message="Full.", retry_after_s=3)
    database.save(answer)
    again = database.conversation(ME, conversation)
    assert again is not None
    assert again.turns[0].answers[0].failure == answer.failure


def test_a_database_of_the_future_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "chat.db"
    with closing(sqlite3.connect(path)) as sql:
        sql.execute(f"PRAGMA user_version={SCHEMA_VERSION + 1}")
    with pytest.raises(sqlite3.DatabaseError, match="newer"):
        Database(path)


# ---------------------------------------------------------------- exports


def test_feedback_and_votes_are_exported_without_their_owners(database: Database) -> None:
    sha256 = keep(database)
    _, turn = ask(database, "What is this?", sha256)
    answer = answered(database, turn, "Red")
    database.judge(answer, "down", " Wrong shade ")
    database.vote(ME, "Q", [sha256], {"answer": "x"}, {"answer": "y"}, choice="a", blind=True)
    out = io.StringIO()
    assert export.feedback(database, out) == 2
    down, vote = (json.loads(line) for line in out.getvalue().splitlines())
    assert (down["type"], down["comment"], down["answer"]) == ("downvote", "Wrong shade", "Red")
    assert down["images"] == [sha256]
    assert down["settings"]["model"] == "m"
    assert (vote["type"], vote["blind"], vote["b"]) == ("vote_a", True, {"answer": "y"})
    assert ME not in out.getvalue()
    database.judge(answer, None, "")
    assert export.feedback(database, io.StringIO()) == 1


def test_a_conversation_is_exported_as_json_and_markdown(database: Database) -> None:
    sha256 = keep(database)
    conversation, turn = ask(database, "What is this?", sha256)
    answered(database, turn, "Red")
    found = database.conversation(ME, conversation)
    assert found is not None
    told = json.loads(export.as_json(found, database.image).data)
    question, answer = told["messages"]
    assert question["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert answer["content"] == "Red"
    file = export.as_markdown(found, database.image)
    assert file.name == "what-is-this.zip"
    with zipfile.ZipFile(io.BytesIO(file.data)) as archive:
        text, image = archive.namelist()
        assert f"]({image})" in archive.read(text).decode()
        assert archive.read(image) == b"red" * 10
    database.drop(turn)
    _, turn = ask(database, "Hi", in_=conversation)
    found = database.conversation(ME, conversation)
    assert found is not None
    assert export.as_markdown(found, database.image).name == "what-is-this.md"
