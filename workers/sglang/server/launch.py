"""Entry of the server process: SGLang's own server, with SGLang's own flags.

    python -P -m workers.sglang.server.launch --model-path X --port 30000 ...

Started by ``workers.sglang.process``. SGLang's children are spawned and so import this module
again, under the name ``__mp_main__``; what must happen first in each of them happens here:

* the process asks to die with its parent, so that no ``kill -9`` leaves one behind;
* on a CPU (``SGLANG_USE_CPU_ENGINE=1``) ``sgl_kernel`` gets a stand-in if it cannot be loaded,
  flashinfer, which is for GPUs, is not imported, adapters are computed without pinned memory, and
  attention for whole batches;
* what SGLang does otherwise than the protocol says is changed (``hooks``).
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Sequence

PARENT_PID = "TANDEM_SGLANG_PARENT_PID"
"""Environment variable: who started the server."""

CPU_ENGINE = "SGLANG_USE_CPU_ENGINE"
"""Environment variable of SGLang: compute on the CPU."""

EXTENSIONS = ("SGLANG_EXTERNAL_MODEL_PACKAGE", "SGLANG_EXTERNAL_MM_PROCESSOR_PACKAGE")
"""Environment variables: packages of ours that SGLang imports."""

_PR_SET_PDEATHSIG = 1


def die_with_parent(parent_pid: int) -> None:
    """Be killed when the parent dies, also if it already has.

    Linux only; elsewhere a server whose worker was killed must be stopped by hand.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent_pid:
            os._exit(1)


def with_torch_attention(args: Sequence[str]) -> list[str]:
    """``args`` with PyTorch's attention for SGLang's own choice, which is its AMX kernels."""
    chosen = any(arg.split("=")[0] == "--attention-backend" for arg in args)
    return list(args) if chosen else ["--attention-backend", "torch_native", *args]


def _has_amx_kernels() -> bool:
    from sglang.srt.utils import cpu_has_amx_support

    return bool(cpu_has_amx_support())


def serve(argv: Sequence[str]) -> None:
    """Run the server until it is told to stop."""
    from sglang.launch_server import run_server
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    from workers.sglang.server import hooks, version

    load_plugins()
    hooks.allow_backend()
    args = list(argv)
    if os.environ.get(CPU_ENGINE) == "1" and not _has_amx_kernels():
        args = with_torch_attention(args)
    try:
        settings = prepare_server_args(args)
        version.import_all(filter(None, map(os.environ.get, EXTENSIONS)))
        run_server(settings)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ in ("__main__", "__mp_main__"):
    if __name__ == "__main__":
        die_with_parent(int(os.environ[PARENT_PID]))
    else:
        import multiprocessing

        parent = multiprocessing.parent_process()
        if parent is not None and parent.pid is not None:
            die_with_parent(parent.pid)
    if os.environ.get(CPU_ENGINE) == "1":
        from workers.sglang.server.cpu import attention, finder, lora

        finder.install()
        lora.install()
        attention.install()
    from workers.sglang.server import hooks

    hooks.install()
if __name__ == "__main__":
    serve(sys.argv[1:])
