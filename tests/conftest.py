"""Shared fixtures. Tests on real data skip where the optional data folder beside the project is absent."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

SHARED = Path(__file__).resolve().parents[2] / "shared"

# An example's time says how loaded the machine is, not whether the code is right.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the optional data folder ../shared/data beside the project")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def _no_bfloat16_units() -> Iterator[None]:
    """`policy.precision = "auto"` means float32 in every test, whatever the machine can do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rexrag.engine.precision.bfloat16_unit", lambda device: "")
        yield
