"""Start an echo worker: ``python -m workers.echo --port 40000``.

It repeats what it is sent. Use it to try the controller or to measure what it costs; for answers
that mean something start ``workers.hf`` or ``workers.sglang``.
"""

from transport.settings import parse
from workers.echo.engine import EchoEngine
from workers.echo.settings import EchoSettings
from workers.runner import run_worker


def main() -> None:
    settings = parse(EchoSettings)
    run_worker(settings, EchoEngine(settings))


if __name__ == "__main__":
    main()
