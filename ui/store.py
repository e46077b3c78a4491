"""What is kept: one SQLite file with conversations, images, feedback and votes.

Every call runs in one thread at a time, so the event loop never waits for the disk. A
conversation belongs to its owner (a browser, or a user of ``--auth``); nobody else's is ever read.
"""

from __future__ import annotations

import json
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from anyio import CapacityLimiter, to_thread

from ui.model import Answer, Conversation, Failure, Figures, Image, Listed, Settings, Turn, Vote

SCHEMA_VERSION = 1
TITLE_CHARS = 60

P = ParamSpec("P")
T = TypeVar("T")


class Database:
    """The calls, blocking; one thread at a time."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.time) -> None:
        """Open the database, made if need be.

        Raises:
            OSError, sqlite3.Error: it cannot be written, or is no database of ours.
        """
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._clock = clock
        self._sql = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        path.chmod(0o600)  # what people ask is theirs
        self._sql.row_factory = sqlite3.Row
        for pragma in ("journal_mode=WAL", "foreign_keys=ON", "busy_timeout=5000"):
            self._sql.execute(f"PRAGMA {pragma}")
        (version,) = self._sql.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            self._sql.close()
            raise sqlite3.DatabaseError(f"{path} was written by a newer version of this page")
        self._sql.executescript((Path(__file__).parent / "schema.sql").read_text())
        self._sql.execute(f"PRAGMA user_version={SCHEMA_VERSION}")

    def close(self) -> None:
        self._sql.close()

    # ---------------------------------------------------------------- conversations

    def listed(self, owner: str, search: str = "") -> list[Listed]:
        """The owner's conversations, the last used first; those that contain ``search``."""
        escaped = search.strip().replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
        rows = self._sql.execute(
            """SELECT id, title, updated_at FROM conversations c WHERE owner = :owner AND (
                 title LIKE :like ESCAPE '\\' OR EXISTS (
                   SELECT 1 FROM turns t LEFT JOIN answers a ON a.turn = t.id
                   WHERE t.conversation = c.id AND (
                     t.text LIKE :like ESCAPE '\\' OR a.text LIKE :like ESCAPE '\\')))
               ORDER BY updated_at DESC LIMIT 500""",
            {"owner": owner, "like": f"%{escaped}%"},
        )
        return [Listed(*row) for row in rows]

    def conversation(self, owner: str, conversation: str) -> Conversation | None:
        """The whole of it; ``None`` when the owner has none of that id."""
        found = self._sql.execute(
            "SELECT id, title FROM conversations WHERE id = ? AND owner = ?", (conversation, owner)
        ).fetchone()
        if found is None:
            return None
        turns = {
            row["id"]: Turn(row["id"], row["text"], [], [], row["current"])
            for row in self._sql.execute(
                "SELECT * FROM turns WHERE conversation = ? ORDER BY id", (conversation,)
            )
        }
        of_it = "turn IN (SELECT id FROM turns WHERE conversation = ?)"
        for row in self._sql.execute(
            f"""SELECT turn, sha256, name, width, height FROM turn_images JOIN images
                USING (sha256) WHERE {of_it} ORDER BY turn, place""",
            (conversation,),
        ):
            turns[row["turn"]].images.append(Image(*tuple(row)[1:]))
        for row in self._sql.execute(
            f"SELECT * FROM answers WHERE {of_it} ORDER BY id", (conversation,)
        ):
            turns[row["turn"]].answers.append(_answer(row))
        for turn in turns.values():
            turn.current = max(0, min(turn.current, len(turn.answers) - 1))
        return Conversation(found["id"], found["title"], list(turns.values()))

    def rename(self, owner: str, conversation: str, title: str) -> None:
        self._sql.execute(
            "UPDATE conversations SET title = ? WHERE id = ? AND owner = ?",
            (_title(title), conversation, owner),
        )

    def delete(self, owner: str, conversation: str) -> None:
        """Forget a conversation, its feedback, and its images if nothing else shows them."""
        with self._sql:
            self._sql.execute("BEGIN")
            self._sql.execute(
                "DELETE FROM conversations WHERE id = ? AND owner = ?", (conversation, owner)
            )
            self._drop_unused_images()

    # ---------------------------------------------------------------- turns

    def ask(
        self,
        owner: str,
        conversation: str | None,
        text: str,
        images: Sequence[tuple[str, str]],
    ) -> tuple[str, int]:
        """Add a question with its images (hash, name); the ids of conversation and turn.

        A conversation that is not the owner's, or is none yet, becomes a new one.
        """
        now = self._clock()
        with self._sql:
            self._sql.execute("BEGIN")
            mine = self._sql.execute(
                "UPDATE conversations SET updated_at = ? WHERE id = ? AND owner = ?",
                (now, conversation, owner),
            ).rowcount
            named = conversation if conversation is not None and mine else secrets.token_urlsafe(9)
            if not mine:
                title = _title(text) if text.strip() else "An image"
                self._sql.execute(
                    "INSERT INTO conversations VALUES (?, ?, ?, ?, ?)",
                    (named, owner, title, now, now),
                )
            turn = self._sql.execute(
                "INSERT INTO turns (conversation, text) VALUES (?, ?)", (named, text)
            ).lastrowid
            assert turn is not None
            self._sql.executemany(
                "INSERT INTO turn_images VALUES (?, ?, ?, ?)",
                [(turn, place, sha256, name) for place, (sha256, name) in enumerate(images)],
            )
        return named, turn

    def cut_after(self, turn: int) -> None:
        """Forget the turns after this one of its conversation."""
        with self._sql:
            self._sql.execute("BEGIN")
            self._sql.execute(
                """DELETE FROM turns WHERE id > :turn AND conversation =
                     (SELECT conversation FROM turns WHERE id = :turn)""",
                {"turn": turn},
            )
            self._drop_unused_images()

    def drop(self, turn: int) -> None:
        """Forget this turn; its images stay until the conversation goes, for it may come back."""
        self._sql.execute("DELETE FROM turns WHERE id = ?", (turn,))

    def reword(self, turn: int, text: str) -> None:
        """Another text for a question; the answers to the old one are gone."""
        with self._sql:
            self._sql.execute("BEGIN")
            self._sql.execute("UPDATE turns SET text = ?, current = 0 WHERE id = ?", (text, turn))
            self._sql.execute("DELETE FROM answers WHERE turn = ?", (turn,))

    def choose(self, turn: int, current: int) -> None:
        """Which of a question's answers is shown."""
        self._sql.execute("UPDATE turns SET current = ? WHERE id = ?", (current, turn))

    # ---------------------------------------------------------------- answers

    def begin(self, turn: int, settings: Settings, request_id: str) -> int:
        """A further answer to a question, in place of those that never had a word; its id."""
        with self._sql:
            self._sql.execute("BEGIN")
            self._sql.execute("DELETE FROM answers WHERE turn = ? AND text = ''", (turn,))
            answer = self._sql.execute(
                """INSERT INTO answers (turn, created_at, settings, status, request_id)
                   VALUES (?, ?, ?, 'running', ?)""",
                (turn, self._clock(), settings.model_dump_json(), request_id),
            ).lastrowid
            self._sql.execute(
                """UPDATE turns SET current = (SELECT count(*) - 1 FROM answers WHERE turn = :turn)
                   WHERE id = :turn""",
                {"turn": turn},
            )
        assert answer is not None
        return answer

    def save(self, answer: Answer) -> None:
        """What an answer is by now."""
        self._sql.execute(
            """UPDATE answers SET text = ?, token_ids = ?, status = ?, kind = ?, worker_id = ?,
               request_id = ?, figures = ?, failure = ? WHERE id = ?""",
            (
                answer.text,
                json.dumps(answer.token_ids),
                answer.status,
                answer.kind,
                answer.worker_id,
                answer.request_id,
                answer.figures.model_dump_json(exclude_none=True),
                None if answer.failure is None else answer.failure.model_dump_json(),
                answer.id,
            ),
        )

    def judge(self, answer: int, vote: Vote | None, comment: str) -> None:
        """Like, dislike or neither."""
        at = None if vote is None else self._clock()
        self._sql.execute(
            "UPDATE answers SET vote = ?, comment = ?, voted_at = ? WHERE id = ?",
            (vote, comment.strip()[:2000], at, answer),
        )

    # ---------------------------------------------------------------- images

    def keep(self, sha256: str, media_type: str, size: tuple[int, int], data: bytes) -> None:
        """Keep an image once, however often it comes."""
        self._sql.execute(
            "INSERT OR IGNORE INTO images VALUES (?, ?, ?, ?, ?)",
            (sha256, media_type, *size, data),
        )

    def image(self, sha256: str) -> tuple[str, bytes] | None:
        """Media type and content."""
        row = self._sql.execute(
            "SELECT media_type, data FROM images WHERE sha256 = ?", (sha256,)
        ).fetchone()
        return None if row is None else (row["media_type"], row["data"])

    def _drop_unused_images(self) -> None:
        self._sql.execute(
            """DELETE FROM images WHERE sha256 NOT IN (SELECT sha256 FROM turn_images)
               AND NOT EXISTS (SELECT 1 FROM votes WHERE instr(votes.images, images.sha256))"""
        )

    # ---------------------------------------------------------------- votes

    def vote(
        self,
        owner: str,
        question: str,
        images: Sequence[str],
        a: dict[str, Any],
        b: dict[str, Any],
        *,
        choice: str,
        blind: bool,
    ) -> None:
        """What somebody preferred of two answers to one question."""
        texts = (json.dumps(list(images)), json.dumps(a), json.dumps(b))
        self._sql.execute(
            """INSERT INTO votes (at, owner, question, images, a, b, choice, blind)
               VALUES (?, ?, ?, ?, ?, ?, ?, ?)""",
            (self._clock(), owner, question, *texts, choice, blind),
        )

    def judgements(self) -> Iterator[dict[str, Any]]:
        """All feedback and all votes, oldest first of each kind, as ``export`` writes them.

        Owners are left out: a line says what was thought of which answer, not by whom.
        """
        for row in self._sql.execute(
            """SELECT a.*, t.text AS question, (SELECT json_group_array(sha256) FROM turn_images i
               WHERE i.turn = t.id) AS images FROM answers a JOIN turns t ON t.id = a.turn
               WHERE vote IS NOT NULL ORDER BY voted_at"""
        ):
            yield {
                "type": "upvote" if row["vote"] == "up" else "downvote",
                "at": row["voted_at"],
                "comment": row["comment"],
                "question": row["question"],
                "images": json.loads(row["images"]),
                "answer": row["text"],
                "kind": row["kind"],
                "worker_id": row["worker_id"],
                "request_id": row["request_id"],
                "settings": json.loads(row["settings"]),
                "figures": json.loads(row["figures"]),
            }
        for row in self._sql.execute("SELECT * FROM votes ORDER BY at"):
            yield {
                "type": f"vote_{row['choice']}",
                "at": row["at"],
                "blind": bool(row["blind"]),
                "question": row["question"],
                "images": json.loads(row["images"]),
                "a": json.loads(row["a"]),
                "b": json.loads(row["b"]),
            }


class Store:
    """``Database`` for the event loop: ``await store(database.listed, owner)``."""

    def __init__(self, database: Database) -> None:
        self.db = database
        self._one = CapacityLimiter(1)

    async def __call__(self, call: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        return await to_thread.run_sync(partial(call, *args, **kwargs), limiter=self._one)


def _title(text: str) -> str:
    line = " ".join(text.split()) or "Untitled"
    return line if len(line) <= TITLE_CHARS else line[: TITLE_CHARS - 1].rstrip() + "…"


def _answer(row: sqlite3.Row) -> Answer:
    failure = row["failure"]
    return Answer(
        id=row["id"],
        settings=Settings.model_validate_json(row["settings"]),
        text=row["text"],
        token_ids=json.loads(row["token_ids"]),
        status=row["status"],
        kind=row["kind"],
        worker_id=row["worker_id"],
        request_id=row["request_id"],
        figures=Figures.model_validate_json(row["figures"]),
        failure=None if failure is None else Failure.model_validate_json(failure),
        vote=row["vote"],
        comment=row["comment"],
    )
