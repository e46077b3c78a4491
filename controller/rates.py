"""How much of something a caller may use in a minute; the clock is passed in."""

from __future__ import annotations

_MINUTE_S = 60.0


class Bucket:
    """A token bucket: it holds a minute's worth, and fills at that rate.

    What has been used is taken even if more than is there: the cost of an answer is known when it
    has been given. The bucket is then in debt and has to fill first.
    """

    def __init__(self, per_minute: int, now: float) -> None:
        self.per_minute = per_minute
        self._level = float(per_minute)
        self._at = now

    def take(self, amount: float, now: float) -> None:
        self._fill(now)
        self._level -= amount

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until ``amount`` is there; 0 when it is."""
        self._fill(now)
        return max(0.0, (amount - self._level) * _MINUTE_S / self.per_minute)

    def _fill(self, now: float) -> None:
        gained = (now - self._at) * self.per_minute / _MINUTE_S
        self._level = min(float(self.per_minute), self._level + gained)
        self._at = now
