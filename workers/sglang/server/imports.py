"""Change a module right after it is imported, in whichever process imports it.

SGLang's own hooks (``sglang.srt.plugins``) import what they change in every process, also in
those that do not need it, and only log what goes wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

Action = Callable[[ModuleType], None]


def after(name: str, action: Action) -> None:
    """Call ``action`` with the module ``name`` once it is imported, at once if it is already."""
    if name in sys.modules:
        action(sys.modules[name])
        return
    finder = next((found for found in sys.meta_path if isinstance(found, _Finder)), None)
    if finder is None:
        finder = _Finder()
        sys.meta_path.insert(0, finder)
    finder.actions.setdefault(name, []).append(action)


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self.actions: dict[str, list[Action]] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in self.actions:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_act(module: ModuleType) -> None:
                run(module)
                for action in self.actions.pop(fullname, ()):
                    action(module)

            spec.loader.exec_module = run_and_act  # type: ignore[method-assign]
        return spec
