"""What the pages are made over, wired by ``__main__``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ui.client import Controller
from ui.jobs import Jobs
from ui.settings import UiSettings
from ui.store import Store
from ui.watch import Watch

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True, slots=True)
class Parts:
    settings: UiSettings
    controller: Controller
    watch: Watch
    store: Store
    jobs: Jobs
    uploads: Path  # where Gradio keeps files between upload and sending

    @property
    def root(self) -> str:
        """What every path of the page begins with."""
        return self.settings.root_path
