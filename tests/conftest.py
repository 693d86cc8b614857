"""Shared fixtures. Real data sits beside the project where its developers keep it; without it those tests skip."""

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared() -> Path:
    if not (SHARED / "data").is_dir():
        pytest.skip("needs the optional data folder ../shared/data beside the project")
    return SHARED
