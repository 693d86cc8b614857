"""Tokenizers of three kinds: characters, byte-level BPE trained here, words with tags as tokens."""

from __future__ import annotations

import re

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rexrag.agent.codec import HFCodec
from rexrag.agent.episode import Codec
from rexrag.agent.protocols.tags import NOTICE
from tests.support.fakes import CharCodec

TAGS = [f"<{slash}{name}>" for name in ("think", "search", "information", "answer") for slash in ("", "/")]
# With the notice's words: a response read back as text shows its turns by them.
WORDS = [
    *sorted(set(re.findall(r"\w+", NOTICE))),
    "hm",
    "so",
    "who",
    "is",
    "al",
    "bob",
    "the",
    "boss",
    "x",
    "doc",
    "title",
    *":?.,()[]/<>",
]

# Trained so that merges straddle tags in every way: "x<", "></", ">\n", ".</answer", " <".
_STRADDLING = [
    "x<answer>al</answer>\n\n" * 40,
    "hm.</think><search>who</search>\n" * 40,
    "hm.</think> <answer> bob.</answer>  " * 40,
    "x<information>Doc 1(Title: x) y</information>\n\n" * 20,
]


def byte_level_bpe(merges: int = 90) -> PreTrainedTokenizerFast:
    """A GPT-style tokenizer whose tags take several tokens; no word split, so that merges go anywhere."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=257 + merges,
        special_tokens=["<|end|>"],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
        max_token_length=7,
    )
    tokenizer.train_from_iterator(_STRADDLING, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def words_with_tag_tokens(special: bool = True) -> PreTrainedTokenizerFast:
    """A word-level tokenizer that knows each tag as one added token."""
    vocabulary = ["<unk>", "<eos>", *TAGS, *WORDS]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), behavior="removed", invert=True)
    tokenizer.add_special_tokens([AddedToken(name, normalized=False) for name in ("<unk>", "<eos>")])
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=special) for tag in TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")


BPE = HFCodec(byte_level_bpe())
WORD = HFCodec(words_with_tag_tokens())
CODECS: dict[str, Codec] = {"char": CharCodec(), "bpe": BPE, "word": WORD}
EOS = {name: min(codec.eos_ids) for name, codec in CODECS.items()}
