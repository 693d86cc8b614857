"""One thread, as for the engine's tests: the same numbers on every machine."""

from tests.engine.conftest import _one_thread, model

__all__ = ["_one_thread", "model"]
