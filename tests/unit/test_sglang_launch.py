"""The entry of the server's processes: what a machine with CUDA must not see of our CPU code."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from workers.sglang.server.launch import with_torch_attention

ROOT = Path(__file__).resolve().parents[2]

# What each process of the server does first; in a child of SGLang under this name.
PREPARE = """
import runpy, sys
runpy.run_module("workers.sglang.server.launch", run_name="__mp_main__")
"""


def run(code: str, folder: Path, *, timeout_s: float = 15, **environment: str) -> str:
    """What ``code`` prints after the preparation, where ``folder`` has a loadable sgl_kernel."""
    (folder / "sgl_kernel").mkdir()
    (folder / "sgl_kernel" / "__init__.py").write_text("mark = 'real'\n")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SGLANG_", "TANDEM_"))
    }
    paths = {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-P", "-c", PREPARE + code],
        env=inherited | paths | environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_with_cuda_nothing_of_the_cpu_code_runs(tmp_path: Path) -> None:
    shown = run(
        "import sgl_kernel\n"
        "ours = [name for name in sys.modules if name.startswith('workers.sglang.server.cpu')]\n"
        "finders = [type(f).__module__ for f in sys.meta_path]\n"
        "print(sgl_kernel.mark, ours, 'workers.sglang.server.cpu.finder' in finders,"
        " 'flashinfer' in sys.modules)",
        tmp_path,
    )
    assert shown == "real [] False False"


def test_on_a_cpu_kernels_that_load_are_used(tmp_path: Path) -> None:
    shown = run(
        "import sgl_kernel\n"
        "from workers.sglang.server.cpu import finder\n"
        "print(sgl_kernel.mark, finder.is_fallback(sgl_kernel), sys.modules['flashinfer'])",
        tmp_path,
        SGLANG_USE_CPU_ENGINE="1",
    )
    assert shown == "real False None"


@pytest.mark.timeout(120)
def test_amx_kernels_are_used_where_they_are(tmp_path: Path) -> None:
    """As SGLang sees it: the package has the kernel that packs weights, the CPU the tiles."""
    shown = run(
        "import torch\n"
        "library = torch.library.Library('sgl_kernel', 'FRAGMENT')\n"
        "library.define('convert_weight_packed() -> ()')\n"
        "from sglang.srt.utils import common\n"
        "common.is_amx_tile_supported = True\n"
        "from workers.sglang.server.launch import _has_amx_kernels\n"
        "print(_has_amx_kernels())",
        tmp_path,
        timeout_s=100,
        SGLANG_USE_CPU_ENGINE="1",
    )
    assert shown.splitlines()[-1] == "True"


@pytest.mark.parametrize(
    ("given", "got"),
    [
        (["--port", "1"], ["--attention-backend", "torch_native", "--port", "1"]),
        (["--attention-backend", "intel_amx"], ["--attention-backend", "intel_amx"]),
        (["--attention-backend=intel_amx"], ["--attention-backend=intel_amx"]),
    ],
)
def test_the_users_choice_of_attention_wins(given: list[str], got: list[str]) -> None:
    assert with_torch_attention(given) == got
