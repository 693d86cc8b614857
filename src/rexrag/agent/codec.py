"""`Codec` over a transformers tokenizer."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

from rexrag.errors import ModelError

_PROTOCOL_TAG = re.compile(r"</?(?:think|search|information|answer)>")
_TURN_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>")
"""Tokens that chat templates end a message with; some tokenizers name another one as their eos."""
REMEMBERED = 4096
"""Size of the caches of encoded and decoded texts: rollouts of a question repeat many texts."""


class HFCodec:
    """Token ids by a transformers tokenizer with a `tokenizers` backend.

    Special tokens of the tokenizer that a question or a document spells out are broken with a space, so that
    they cannot become control tokens. Protocol tags that the tokenizer knows stay whole.
    """

    def __init__(self, tokenizer: Any, eos_ids: Sequence[int] = ()) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(f"tokenizer {type(tokenizer).__name__} has no fast backend")
        self.tokenizer = tokenizer
        # The backend itself, many times a step: the library's call around it takes longer than a short text.
        backend.no_truncation()
        backend.no_padding()
        self._encode = lru_cache(REMEMBERED)(partial(_encode, backend))
        self._decode = lru_cache(REMEMBERED)(partial(backend.decode, skip_special_tokens=False))
        special = [
            token.content
            for token in tokenizer.added_tokens_decoder.values()
            if token.special and len(token.content) > 1 and not _PROTOCOL_TAG.fullmatch(token.content)
        ]
        longest_first = sorted(special, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first))) if special else None
        self._eos_ids = self._end_tokens(eos_ids)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Ids that end a turn: the tokenizer's eos, those of the generation config, the chat template's."""
        return self._eos_ids

    @cached_property
    def vocabulary(self) -> int:
        """Ids are below this."""
        return 1 + max(self.tokenizer.get_vocab().values(), default=-1)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what prompts and turns depend on: vocabulary and rules, chat template, end tokens."""
        template = str(self.tokenizer.chat_template)
        parts = [self.tokenizer.backend_tokenizer.to_str(), template, str(sorted(self._eos_ids))]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with no special tokens added."""
        return list(self._encode(self._plain(text)))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids: special tokens kept, spaces left as they are."""
        text: str = self._decode(tuple(ids))
        return text

    def prompt(self, user_message: str) -> list[int]:
        """Prompt ids of one user message: the chat template, else the text after bos where there is one."""
        message = self._plain(user_message)
        if self.tokenizer.chat_template:
            conversation = [{"role": "user", "content": message}]
            text = self.tokenizer.apply_chat_template(
                conversation, tokenize=False, add_generation_prompt=True
            )
            ids = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        else:
            ids = self.tokenizer(message, add_special_tokens=True, verbose=False)["input_ids"]
            while ids and ids[-1] in self._eos_ids:  # some tokenizers close a text; the policy has to go on
                ids = ids[:-1]
        return [int(token) for token in ids]

    def _plain(self, text: str) -> str:
        if self._special is None:
            return text
        return self._special.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def _end_tokens(self, extra: Sequence[int]) -> frozenset[int]:
        found = set(extra)
        if self.tokenizer.eos_token_id is not None:
            found.add(int(self.tokenizer.eos_token_id))
        template = self.tokenizer.chat_template
        vocabulary = self.tokenizer.get_added_vocab()
        if isinstance(template, str):
            found |= {vocabulary[end] for end in _TURN_ENDS if end in template and end in vocabulary}
        return frozenset(found)


def _encode(backend: Any, text: str) -> tuple[int, ...]:
    return tuple(backend.encode(text, add_special_tokens=False).ids)


def load_codec(path_or_id: str | Path) -> HFCodec:
    """The codec of a Hugging Face folder or id, never with remote code.

    Raises ModelError where there is no usable tokenizer.
    """
    # transformers is slow to import, and scoring traces does not need it.
    from transformers import AutoTokenizer

    folder = Path(path_or_id)
    if folder.exists() and not (folder.is_dir() and _has_tokenizer(folder)):
        raise ModelError(f"{folder}: no tokenizer here; expected a model folder with a tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path_or_id), trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises bare Exception for a damaged file
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"{path_or_id}: no usable tokenizer: {reason[:200]}") from None
    return HFCodec(tokenizer, _generation_eos(_generation_config(str(path_or_id))))


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json"))


def _generation_config(path_or_id: str) -> Path | None:
    """The model's `generation_config.json`, in its folder or in the hub's cache; None where there is none."""
    from transformers.utils import cached_file

    found = cached_file(
        path_or_id,
        "generation_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found) if found else None


def _generation_eos(file: Path | None) -> list[int]:
    """Its `eos_token_id`, one or several; none without a file."""
    if file is None:
        return []
    try:
        value = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError) as error:
        raise ModelError(f"{file}: not readable as JSON: {error}") from None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise ModelError(f"{file}: eos_token_id: expected a token id or a list of them, got {value!r}")
    return ids
