"""Seconds of each phase of a step."""

from __future__ import annotations

import time


class Clock:
    """`lap(name)` adds the seconds since the last lap to `seconds[name]`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
