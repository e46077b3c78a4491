"""Our controller beside other front doors, by the harness of ../shared/harness.

    python bench/frontdoor/run.py --rounds 5 --out bench/results/frontdoor.jsonl

Copies the harness to bench/out/frontdoor, applies ``harness.patch`` there, builds it, makes the
virtual environments of the peers (from PyPI, by uv or venv + pip), runs ``perf.py`` and prints its
table. Every scenario is interleaved with a direct connection to the mock worker. Our controller
takes part three times, as names in ``--fds``:

    tandem_openai   client speaks OpenAI, worker our SSE: every token is translated
    tandem          our SSE on both sides: frames are relayed as they are
    tandem_llava    LLaVA's NUL-delimited cumulative JSON on both sides

``--failures`` runs the failure table (``fail.py``) instead. What the patch adds to the harness: our
SSE framing and our status in the mock worker; the api ``tandem``, LLaVA's frames without spaces and
``--image-bytes`` (which the scenario ``img`` names) in the load generator.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
HARNESS = ROOT.parent / "shared" / "harness"
PATCH = Path(__file__).resolve().parent / "harness.patch"
WORK = ROOT / "bench" / "out" / "frontdoor"

PEERS = "smg_rr,sglr_rr,p6_ownclient,p8_rawroute"
OURS = {"tandem_openai": "openai", "tandem": "tandem", "tandem_llava": "llava"}
FIRST_PORT = 32500  # of ours; the harness owns 32000-32767
VENVS = {
    "proto": ("fastapi", "uvicorn[standard]", "uvloop", "httptools", "orjson"),
    "router": ("sglang-router==0.3.2",),
    "smg": ("smg==1.13.0",),
}
VENV_OF = {"smg": "smg", "sglr": "router", "p6": "proto", "p8": "proto"}


def fail(sentence: str) -> int:
    """A mistake or a missing part: one sentence and exit code 2."""
    sys.stderr.write(f"error: {sentence}\n")
    return 2


def prepare() -> None:
    """A patched and built copy of the harness; its virtual environments survive."""
    shutil.copytree(HARNESS, WORK, dirs_exist_ok=True, copy_function=shutil.copyfile)
    patch = ["patch", "--strip=1", "--silent", "--forward", f"--input={PATCH}"]
    subprocess.run(patch, cwd=WORK, check=True)
    subprocess.run(["sh", "build.sh"], cwd=WORK, check=True)
    (WORK / "custom.json").write_text(json.dumps(_ours(), indent=1))


def _ours() -> dict[str, object]:
    """Our controller as custom front doors, each with its own mock workers that register."""
    argv = [sys.executable, "-m", "controller", "--port", "{port}", "--log-level", "WARNING"]
    return {
        name: {
            "argv": argv,
            "api": api,
            "register": True,
            "port": FIRST_PORT + 20 * index,
            "cwd": str(ROOT),
        }
        for index, (name, api) in enumerate(OURS.items())
    }


def install(fds: Sequence[str]) -> None:
    """The virtual environments the named front doors need."""
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    for name in sorted({VENV_OF[fd.split("_")[0]] for fd in fds if fd not in OURS}):
        folder = WORK / "venvs" / name
        python = folder / "bin" / "python"
        if (folder / "complete").exists():
            continue
        if uv is not None:
            make = [uv, "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)]
            add = [uv, "pip", "install", "--quiet", "--python", str(python)]
        else:
            make = [sys.executable, "-m", "venv", "--clear", str(folder)]
            add = [str(python), "-m", "pip", "install", "--quiet"]
        subprocess.run(make, check=True)
        subprocess.run([*add, *VENVS[name]], check=True)
        (folder / "complete").touch()


def versions() -> dict[str, str]:
    """What ran, for the record."""
    ours = ("fastapi", "httptools", "orjson", "pydantic", "uvicorn", "uvloop")
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
    )
    peers = {
        line.split("==")[0]: line.split("==")[1]
        for names in VENVS.values()
        for line in names
        if "==" in line
    }
    return {
        "tandem": commit.stdout.strip(),
        "python": platform.python_version(),
        "cpus": str(os.cpu_count()),
        "load_1m": f"{os.getloadavg()[0]:.2f}",
        **{name: metadata.version(name) for name in ours},
        **peers,
    }


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python bench/frontdoor/run.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--fds", default=f"{PEERS},{','.join(OURS)}", help="front doors, by their names")
    add("--scen", default="ka16,s64,s256,light,img", help="scenarios (see perf.py)")
    add("--rounds", type=int, default=5, help="interleaved rounds (5)")
    add("--failures", nargs="?", const="all", metavar="TESTS", help="the failure table instead")
    add("--out", type=Path, help="write the JSON lines to this file")
    args = parser.parse_args(argv)
    for fd in args.fds.split(","):
        if fd not in OURS and fd.split("_")[0] not in VENV_OF:
            parser.error(f"no environment is known for {fd!r}")
    return args


def main() -> int:
    args = parse()
    if not HARNESS.is_dir():
        return fail("the harness is expected at ../shared/harness beside this repository.")
    for tool in ("patch", "g++"):
        if shutil.which(tool) is None:
            return fail(f"{tool} is needed to patch and build the harness.")
    prepare()
    install(args.fds.split(","))
    raw = WORK / "raw.jsonl"
    raw.unlink(missing_ok=True)
    what = versions()
    if args.failures:
        script, options, table = "fail.py", ["--tests", args.failures], "failtab.py"
    else:
        script, table = "perf.py", "show.py"
        options = ["--scen", args.scen, "--rounds", str(args.rounds)]
    command = [sys.executable, script, "--fds", args.fds, *options, "--out", str(raw)]
    code = subprocess.run(command, cwd=WORK, stdout=subprocess.DEVNULL).returncode
    if code or not raw.exists():
        return fail(f"{script} ended with {code}; its logs are in bench/out/frontdoor/logs.")
    subprocess.run([sys.executable, table, str(raw)], cwd=WORK, check=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps({"versions": what}) + "\n" + raw.read_text())
    print(
        json.dumps(
            {"kind": "frontdoor", "versions": what, "lines": len(raw.read_text().splitlines())}
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
