"""A retriever of the user's own, held to what a retriever returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rexrag.errors import PluginError
from rexrag.plugins import calling, dotted_name, load_plugin, require_parameters
from rexrag.retrieval.base import Retriever
from rexrag.types import Document


@dataclass(frozen=True, slots=True)
class PluginRetriever:
    """Passes searches on and checks what comes back. `digest` is the plug-in's own, or its name."""

    inner: Any
    name: str

    @property
    def digest(self) -> str:
        return str(calling(f"retriever {self.name}, digest", getattr, self.inner, "digest", self.name))

    def search(self, queries: Sequence[str], topk: int) -> list[list[Document]]:
        """Raises PluginError where a search fails or a query has no list of documents."""
        found = calling(f"retriever {self.name}", self.inner.search, queries, topk)
        if not isinstance(found, list) or len(found) != len(queries):
            got = f"{len(found)} lists" if isinstance(found, list) else type(found).__name__
            raise PluginError(f"retriever {self.name}: returned {got} for {len(queries)} queries")
        for documents in found:
            if not isinstance(documents, list | tuple):
                got = "None" if documents is None else f"a {type(documents).__name__}"
                raise PluginError(
                    f"retriever {self.name}: returned {got} for a query, expected a list of Document"
                )
            for document in documents:
                if not isinstance(document, Document):
                    kind = type(document).__name__
                    raise PluginError(f"retriever {self.name}: returned a {kind}, expected Document")
        return found


def checked_retriever(inner: Any, name: str = "") -> Retriever:
    """A user's object as a retriever. Raises PluginError where it has no `search(queries, topk)`."""
    name = name or dotted_name(inner)
    if not hasattr(inner, "search"):
        raise PluginError(f"retriever {name}: it has no 'search'")
    require_parameters(inner.search, 2, f"retriever {name}, search")
    return PluginRetriever(inner, name)


def load_retriever(name: str) -> Retriever:
    """What `retriever.plugin` names: a retriever, or what makes one. Raises PluginError."""
    found = load_plugin(name, "retriever.plugin")
    if isinstance(found, type) or (callable(found) and not hasattr(found, "search")):
        found = calling(f"retriever.plugin = '{name}'", found)
    return checked_retriever(found, name)
