"""Models with packed attention, once per session. Tests that train take their own copies."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from rexrag.engine.attention import use_packed_attention
from tests.support.scripted import MAKERS, VOCABULARY, llama

TAGS = ["<search>", "</search>", "<answer>", "</answer>", "<information>", "</information>", "<think>"]


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


def model_folder(made: Path) -> Path:
    """A Llama folder with a word-level tokenizer in which tags are frequent."""
    words = ["<eos>", "<unk>", *TAGS, *(f"w{i}" for i in range(VOCABULARY - 2 - len(TAGS)))]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", unk_token="<unk>")
    tokenizer.save_pretrained(str(made))
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)  # nearly even odds, so that random text holds actions
    model.save_pretrained(str(made))
    return made


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(tmp_path_factory.mktemp("model"))
