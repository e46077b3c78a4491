"""``sgl_kernel``: the real package wins wherever it loads, ours replaces it only if it cannot."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from workers.sglang.server.cpu import kernels

ROOT = Path(__file__).resolve().parents[2]

# Torch takes seconds to import; what the finder does with it is one call, recorded here.
PRELUDE = """
import sys
from workers.sglang.server.cpu import finder, kernels
kernels.define_torch_ops = lambda: "library"
finder.install()
finder.install()
"""


def run(code: str, *path: Path) -> str:
    """What ``code`` prints in a fresh interpreter that knows no installed packages but ``path``."""
    program = f"import sys; sys.path[:0] = {[str(p) for p in (*path, ROOT)]!r}\n{PRELUDE}{code}"
    done = subprocess.run(
        [sys.executable, "-S", "-E", "-c", program],
        capture_output=True,
        text=True,
        timeout=15,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A folder ``sgl_kernel`` whose ``__init__`` tests write."""
    folder = tmp_path / "sgl_kernel"
    folder.mkdir()
    (folder / "part.py").write_text("here = True\n")
    return folder


def test_a_package_that_loads_is_left_alone(package: Path) -> None:
    (package / "__init__.py").write_text("from sgl_kernel.part import here\nmark = 'real'\n")
    (package / "speculative.py").write_text("mark = 'real too'\n")
    shown = run(
        "import sgl_kernel, sgl_kernel.speculative as s\n"
        "print(sgl_kernel.mark, s.mark, finder.is_fallback(sgl_kernel))",
        package.parent,
    )
    assert shown == "real real too False"


@pytest.mark.parametrize("error", ["ImportError('libcuda.so.1')", "OSError('libcuda.so.1')"])
def test_a_package_that_cannot_load_is_replaced_whole(package: Path, error: str) -> None:
    (package / "__init__.py").write_text(f"import sgl_kernel.part\nhalf = 1\nraise {error}\n")
    shown = run(
        "import sgl_kernel\n"
        "print(sgl_kernel.__fallback_reason__, hasattr(sgl_kernel, 'half'),"
        " 'sgl_kernel.part' in sys.modules)",
        package.parent,
    )
    assert shown == "libcuda.so.1 False False"


def test_a_package_that_is_broken_otherwise_says_so(package: Path) -> None:
    (package / "__init__.py").write_text("raise ValueError('a bug')\n")
    shown = run(
        "try:\n    import sgl_kernel\nexcept ValueError as exc:\n    print(exc)", package.parent
    )
    assert shown == "a bug"


def test_without_the_package_only_the_names_needed_exist() -> None:
    shown = run(
        "import sgl_kernel\n"
        "from sgl_kernel import rotate_input_ids_cpu\n"
        "from sgl_kernel.speculative import reconstruct_indices_from_tree_mask\n"
        "try:\n    from sgl_kernel import rmsnorm\n"
        "except ImportError:\n    print('no rmsnorm')\n"
        "try:\n    import sgl_kernel.mamba\n"
        "except ImportError:\n    print('no mamba')\n"
    )
    assert shown == "no rmsnorm\nno mamba"


def test_a_stand_in_says_what_is_missing() -> None:
    with pytest.raises(NotImplementedError, match="verify_tree_greedy_cpu has no CPU build"):
        kernels.missing("verify_tree_greedy_cpu")(1, key=2)


def test_the_name_that_means_amx_is_never_defined() -> None:
    names = {*kernels.FUNCTIONS, *kernels.TORCH_OPS, *kernels.SUBMODULES}
    assert "convert_weight_packed" not in names
