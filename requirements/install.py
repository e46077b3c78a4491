"""Build the environment: ``python requirements/install.py .venv requirements/all.txt``.

Makes the virtual environment when there is none, puts uv into it and lets uv install the lock,
with the further arguments as they are. uv does not read pip's configuration, so index,
certificate, proxy and the like are handed over as environment variables; what is already set for
uv wins. Standard library only.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

UV = "uv>=0.13,<1"

# pip's option -> uv's variable, and how uv separates several values (None: there is one).
HANDED_OVER: dict[str, tuple[str, str | None]] = {
    "index-url": ("UV_DEFAULT_INDEX", None),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_NO_INDEX", None),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", None),
    "proxy": ("ALL_PROXY", None),
    "timeout": ("UV_HTTP_TIMEOUT", None),
    "default-timeout": ("UV_HTTP_TIMEOUT", None),
}


def uv_environment(pip_config: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The environment for uv: ``environ`` and what ``pip config list`` printed."""
    found: dict[str, str] = {}
    # As in pip, what is closer to the command wins: [global], [install], then PIP_* variables.
    for section in ("global", "install", ":env:"):
        for line in pip_config.splitlines():
            key, _, value = line.partition("=")
            name = key.removeprefix(section + ".")
            if name == key or name not in HANDED_OVER:
                continue
            variable, separator = HANDED_OVER[name]
            words = str(ast.literal_eval(value)).split()
            found[variable] = (separator or " ").join(words)
    if found.keys() & {"UV_INDEX", "UV_FIND_LINKS"}:
        # Any index may have the locked file, as with pip; the hashes say that it is that file.
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"
    return {**found, **environ}


def main() -> None:
    venv, lock = Path(sys.argv[1]), Path(sys.argv[2])
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        version = ".".join(map(str, sys.version_info[:2]))
        sys.exit(
            f"Tandem needs Python 3.11 or 3.12; this is {version}. Try: make PYTHON=python3.12"
        )
    try:
        import ensurepip  # noqa: F401
        import venv as _  # noqa: F401
    except ImportError:
        sys.exit(
            "This Python cannot make virtual environments; on Debian: apt install python3-venv"
        )
    python = venv / "bin" / "python"
    if not (venv / "bin" / "pip").exists():
        print(f"Making {venv}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    subprocess.run([*pip, "install", "-qq", UV], check=True)
    config = subprocess.run([*pip, "config", "list"], check=True, capture_output=True, text=True)
    print(f"Installing {lock}: minutes the first time on a slow line", flush=True)
    uv = [str(venv / "bin" / "uv"), "pip", "install", "--python", str(python)]
    subprocess.run(
        [*uv, "-r", str(lock), *sys.argv[3:]],
        check=True,
        env=uv_environment(config.stdout, os.environ),
    )


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as exc:
        sys.exit(f"{Path(exc.cmd[0]).name} failed, see above; run make again to continue.")
