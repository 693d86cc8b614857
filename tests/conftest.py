"""Shared fixtures. Tests on real data skip where the optional data folder beside the project is absent."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the optional data folder ../shared/data beside the project")
    return SHARED
