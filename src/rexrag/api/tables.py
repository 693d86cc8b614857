"""Rows as a pandas table, where pandas is installed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rexrag.errors import ConfigError


def data_frame(rows: Sequence[dict[str, Any]]) -> Any:
    """A `pandas.DataFrame`. Raises ConfigError where pandas is not installed."""
    try:
        import pandas
    except ImportError:
        raise ConfigError("to_pandas() needs pandas: pip install pandas") from None
    return pandas.DataFrame(rows)
