"""The word-level tokenizer of the embedded starts: one fixed vocabulary for every fictional world.

Text is lower-cased and split into words, punctuation and newlines; protocol tags are tokens of their own.
Decoding is a homomorphism, `decode(a + b) == decode(a) + decode(b)`: a space is part of each word's own
text, as in byte-level tokenizers, so that a boundary between tokens is a boundary in the text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import (  # type: ignore[import-untyped]
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
)
from transformers import PreTrainedTokenizerFast

from rexrag.data.world.generator import vocabulary

PAD, EOS, UNK = "<pad>", "<eos>", "<unk>"
TAGS = ("<think>", "</think>", "<search>", "</search>", "<information>", "</information>",
        "<answer>", "</answer>")  # fmt: skip
PUNCTUATION = ("\n\n", "\n", '(title: "', '")', ".", ",", "?", ":", ";", "!", "(", ")", '"', "'", "-")
FRAME_WORDS = ("question", "doc", "title", *(str(i) for i in range(1, 10)))
"""Words of the question template and of rendered evidence."""

# '(title: "' and '")' are one token each: they frame every passage.
_PIECE = r'\(title: "|"\)|\n\n|\n|\w+|[^\w\s]'
# A word begins with its space; newlines and closing punctuation stand directly behind what they follow.
_SPACE_BEFORE = r'^(?=[^\n.,?!:;)"])'


def words(text: str) -> list[str]:
    """The pieces that `text` is split into, lower-cased."""
    return re.findall(_PIECE, text.lower())


def build_tokenizer(extra: Iterable[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer of all worlds plus the words of `extra` texts (cue pools, templates, notices).

    Token ids depend only on the set of words: specials, tags, punctuation, then words in order.
    """
    vocab = [PAD, EOS, UNK, *TAGS, *PUNCTUATION]
    known = {*vocabulary(), *FRAME_WORDS, *(word for text in extra for word in words(text))}
    vocab += sorted(known.difference(vocab))
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(vocab)}, unk_token=UNK))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECE), behavior="removed", invert=True)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(Regex(_SPACE_BEFORE), " "), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in (PAD, EOS, UNK)])
    # Tags are ordinary tokens to a decoder: they must never be skipped as "special".
    tokenizer.add_tokens([AddedToken(tag, normalized=False, special=False) for tag in TAGS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Write `tokenizer.json` and its configuration; `AutoTokenizer` loads the folder without remote code."""
    tokenizer.save_pretrained(str(folder))
    # The name that every release of the library knows.
    path = Path(folder) / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"tokenizer_class": "PreTrainedTokenizerFast"}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
