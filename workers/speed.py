"""How fast this worker really is: the ``speed`` by which the controller shares out requests."""

from __future__ import annotations

from collections.abc import Callable

_WEIGHT = 0.3  # of the newest sample
_WINDOW_S = 1.0  # length of a sample while busy
_MIN_WINDOW_S = 0.002  # a shorter busy spell is noise
_MIN_TOKENS = 4


class SpeedMeter:
    """Exponentially weighted mean of tokens per second of all requests together, while busy."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._running = 0
        self._since = 0.0
        self._tokens = 0
        self._mean: float | None = None

    @property
    def tokens_per_s(self) -> float:
        """The mean; 1.0 (LLaVA's constant) while nothing has been measured."""
        return 1.0 if self._mean is None else self._mean

    def begin(self) -> None:
        """A request has begun to run."""
        self._running += 1
        if self._running == 1:
            self._open_window()

    def count(self, tokens: int) -> None:
        self._tokens += tokens
        if self._clock() - self._since >= _WINDOW_S:
            self._close_window()

    def end(self) -> None:
        """A request has ended, however."""
        self._running -= 1
        if self._running == 0:
            self._close_window()

    def _open_window(self) -> None:
        self._since, self._tokens = self._clock(), 0

    def _close_window(self) -> None:
        elapsed_s = self._clock() - self._since
        if elapsed_s >= _MIN_WINDOW_S and self._tokens >= _MIN_TOKENS:
            sample = self._tokens / elapsed_s
            self._mean = (
                sample if self._mean is None else self._mean + _WEIGHT * (sample - self._mean)
            )
        self._open_window()
