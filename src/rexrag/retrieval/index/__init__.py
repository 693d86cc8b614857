"""Index folders.

| module | what |
|---|---|
| `folder` | the files of an index, their manifest and checksums; opening and checking it |
| `documents` | the passages, in a mapped file |
| `build` | building an index from a corpus file, streamed, resumed after a kill |
| `estimate` | the disk and memory that a build needs, before it starts |
"""
