"""Let ``import sgl_kernel`` succeed where the real package cannot be loaded.

The wheel links ``libcuda``, so on a machine without a driver importing it raises, and SGLang's
CPU path imports it unconditionally. The finder tries the real package first; it wins wherever
it loads (a GPU, or a CPU build). It must be installed before SGLang is imported, in each of its
processes: its own plugin groups are read too late.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

from workers.sglang.server.cpu import kernels

PACKAGE = "sgl_kernel"


def install() -> None:
    """Put the finder in front of all others, once."""
    # A second of imports in each process; all of it is for GPUs. None: as if not installed.
    sys.modules.setdefault("flashinfer", None)  # type: ignore[arg-type]
    if PACKAGE not in sys.modules and not any(isinstance(f, _Finder) for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    def __init__(self) -> None:
        self._looking_for_the_real_one = False

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == PACKAGE and not self._looking_for_the_real_one:
            self._looking_for_the_real_one = True
            try:
                real = importlib.util.find_spec(PACKAGE)
            finally:
                self._looking_for_the_real_one = False
            return ModuleSpec(PACKAGE, _RealOrFallback(real), is_package=True)
        package, _, name = fullname.partition(".")
        if package == PACKAGE and name in kernels.SUBMODULES and is_fallback(sys.modules[PACKAGE]):
            return ModuleSpec(fullname, _Names(kernels.SUBMODULES[name]))
        return None


def is_fallback(module: ModuleType) -> bool:
    """True when this ``sgl_kernel`` is ours."""
    return hasattr(module, "__fallback_reason__")


class _Names(Loader):
    """Makes a module of stand-ins."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = names

    def exec_module(self, module: ModuleType) -> None:
        for name in self._names:
            setattr(module, name, kernels.missing(name))


class _RealOrFallback(_Names):
    def __init__(self, real: ModuleSpec | None) -> None:
        super().__init__(kernels.FUNCTIONS)
        self._real = real

    def exec_module(self, module: ModuleType) -> None:
        reason = "it is not installed"
        if self._real is not None and self._real.loader is not None:
            module.__file__ = self._real.origin
            module.__path__ = list(self._real.submodule_search_locations or ())
            try:
                self._real.loader.exec_module(module)
            except (ImportError, OSError) as exc:
                reason = str(exc)
            else:
                return
            _undo(module)
        module.__path__ = []
        module.__file__ = kernels.__file__
        module.__version__ = "0+tandem.cpu"  # type: ignore[attr-defined]
        module.__fallback_reason__ = reason  # type: ignore[attr-defined]
        module.__library__ = kernels.define_torch_ops()  # type: ignore[attr-defined]
        super().exec_module(module)


def _undo(module: ModuleType) -> None:
    """Remove what a failed import has left behind, so that no half of it is found."""
    for name in [name for name in sys.modules if name.startswith(f"{PACKAGE}.")]:
        del sys.modules[name]
    for name in [name for name in vars(module) if not name.startswith("__")]:
        delattr(module, name)
