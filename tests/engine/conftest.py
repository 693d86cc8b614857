"""Models with packed attention, once per session. Tests that train take their own copies."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from rexrag.engine.attention import use_packed_attention
from tests.support.scripted import MAKERS


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=sorted(MAKERS))
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    made = MAKERS[request.param]()
    use_packed_attention(made)
    return made
