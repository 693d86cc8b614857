"""rexrag: train search agents that explore beyond dead ends (REX-RAG, arXiv 2508.08149)."""

__version__ = "0.1.0"
