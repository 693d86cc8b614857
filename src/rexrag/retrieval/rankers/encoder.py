"""A sentence encoder with its prefixes: the text in, unit vectors out (model code by sentence-transformers).

Retrieval encoders are trained with a prefix that says which side a text is on; without it they lose several
points of recall. Taken in this order: what the caller gives, what the model's own files name as prompts, the
table below by model name, none.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rexrag.errors import ConfigError, ModelError

PREFIXES: tuple[tuple[str, str, str], ...] = (  # pattern of the name, query prefix, passage prefix
    # Wang et al. 2022 (arXiv 2212.03533) and the model cards; the instruct variants take a task instead.
    (r"e5(?!.*(instruct|mistral))", "query: ", "passage: "),
    # Xiao et al. 2023 (arXiv 2309.07597) and the model cards; bge-m3 has none.
    (r"bge-(small|base|large)-en", "Represent this sentence for searching relevant passages: ", ""),
    (r"bge-(small|base|large)-zh", "为这个句子生成表示以用于检索相关文章：", ""),
)


NEEDED = "dense retrieval needs sentence-transformers and faiss: pip install -e '.[dense]'"


@dataclass(frozen=True, slots=True)
class EncoderCard:
    """What an index records of its encoder. Vectors of two encoders cannot be compared."""

    model: str
    weights: str
    """Hex SHA-256 of the parameters and of how token vectors are pooled."""
    dimension: int
    query_prefix: str
    passage_prefix: str
    max_tokens: int

    def difference(self, other: EncoderCard) -> str:
        """The first thing in which `other` gives other vectors; empty where nothing does."""
        ours, theirs = asdict(self), asdict(other)
        return next((f for f in ours if f != "model" and ours[f] != theirs[f]), "")


def known_prefixes(name: str) -> tuple[str, str]:
    """Query and passage prefix by the last part of a model's name; empty where it is not known."""
    leaf = Path(name).name.lower()
    return next(((q, p) for pattern, q, p in PREFIXES if re.search(pattern, leaf)), ("", ""))


class Encoder:
    """A sentence-transformers model. Safe to call from several threads: one encodes at a time."""

    def __init__(
        self,
        model: str,
        *,
        query_prefix: str | None = None,
        passage_prefix: str | None = None,
        device: str | None = None,
    ) -> None:
        """`model`: a folder or hub id, safetensors only. Raises ConfigError (extra missing), ModelError."""
        try:
            from sentence_transformers import SentenceTransformer
            from transformers.utils.logging import disable_progress_bar
        except ImportError:
            raise ConfigError(NEEDED) from None
        if not model:
            raise ConfigError("no encoder is named; give a sentence-transformers folder or id")
        disable_progress_bar()
        try:
            self.model = SentenceTransformer(
                model, device=device, trust_remote_code=False, model_kwargs={"use_safetensors": True}
            )
        except (OSError, ValueError, ImportError) as error:
            raise ModelError(f"encoder '{model}': {' '.join(str(error).split())[:300]}") from None
        prompts = self.model.prompts or {}
        table = known_prefixes(model)
        own = (prompts.get("query", ""), prompts.get("passage", "") or prompts.get("document", ""))
        query, passage = own if any(own) else table
        self.card = EncoderCard(
            model=model,
            weights=self._weights(),
            dimension=int(self.model.get_embedding_dimension() or 0),
            query_prefix=query if query_prefix is None else query_prefix,
            passage_prefix=passage if passage_prefix is None else passage_prefix,
            max_tokens=int(self.model.max_seq_length or 0),
        )
        self._lock = threading.Lock()

    def queries(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [len(texts), dimension]."""
        return self._encode([self.card.query_prefix + text for text in texts])

    def passages(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors [len(texts), dimension]."""
        return self._encode([self.card.passage_prefix + text for text in texts])

    def _encode(self, texts: list[str]) -> NDArray[np.float32]:
        if not texts:
            return np.zeros((0, self.card.dimension), np.float32)
        # The tokenizer keeps its padding as state, so only one thread may encode.
        with self._lock:
            vectors = self.model.encode(
                texts,
                prompt="",
                batch_size=64,
                normalize_embeddings=True,
                convert_to_numpy=True,
                show_progress_bar=False,
            )
        found: NDArray[np.float32] = np.ascontiguousarray(vectors, dtype=np.float32)
        return found

    def _weights(self) -> str:
        digest = hashlib.sha256()
        for module in self.model:
            digest.update(f"{type(module).__name__} {getattr(module, 'pooling_mode', '')}".encode())
        for name, values in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(values.detach().cpu().float().contiguous().numpy().data)
        return digest.hexdigest()
