"""bm25s, imported as if JAX were not there.

Where JAX is installed, bm25s imports it to sort scores, and JAX reserves three quarters of a GPU's memory,
which the policy then lacks. Scores are sorted with numpy here.
"""

from __future__ import annotations

import logging
import sys
from types import ModuleType
from typing import cast

_modules = cast(dict[str, ModuleType | None], sys.modules)
_hidden = "jax" not in _modules  # a program that has started JAX already keeps it
if _hidden:
    _modules["jax"] = None  # `import jax` raises ImportError
try:
    import bm25s
    from bm25s.stopwords import STOPWORDS_EN
finally:
    if _hidden:
        del _modules["jax"]

# It sets itself to DEBUG when imported and then reports every index that is built.
logging.getLogger("bm25s").setLevel(logging.WARNING)

__all__ = ["STOPWORDS_EN", "bm25s"]
