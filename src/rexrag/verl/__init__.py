"""REX-RAG on verl: `engine = "verl"`. An adapter only: every formula is called where it lives, in `method/`.

| module | what | needs verl |
|---|---|---|
| `mapping` | our configuration → verl's Hydra tree, one table | to compose the tree |
| `checks` | what must hold before a process starts | |
| `cost` | memory of a GPU, tokens and seconds of a step, from a stated model | |
| `records` | questions and rollouts as plain rows, and back | |
| `search` | searches of many episodes at once → few requests | |
| `parts` | what the episodes of a process share | |
| `drive` | one episode against an engine that samples a turn at once | |
| `agent` | an episode as an agent loop; a probe is a session of its own | yes |
| `trainer` | score → filter → correct → write back → a fixed number of updates | yes |
| `plugin` | what verl imports in each of its processes | yes |
| `launch` | the data files, the retriever's service, and the hand-over | yes |
| `export` | a checkpoint → a Hugging Face folder | for sharded checkpoints |

verl owns the loop here, so this package stands where `train.py` stands for the local engine, and may use what
that may use.
"""
