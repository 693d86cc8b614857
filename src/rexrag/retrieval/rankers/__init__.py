"""Rankers: each orders the passages of a corpus by how well they answer a query.

| module | kind of index | what |
|---|---|---|
| `bm25` | `bm25` | BM25 in memory or in mapped files, by bm25s; the word splitter that all BM25 share |
| `tantivy` | `bm25-disk` | BM25 on disk, by tantivy |
| `seismic` | `bm25-fast` | approximate BM25, by Seismic |
| `encoder`, `dense` | `dense` | texts to unit vectors; exact and approximate search of them, by faiss |
| `hybrid` | `hybrid` | reciprocal rank fusion of two rankings |
| `bm25s_alone` | – | bm25s, imported without JAX |
"""
