"""`rexrag eval`: policies and baselines on question sets, to scored records and tables with intervals.

| module | what |
|---|---|
| `attempts` | one try at a question: episodes that remember what they saw, and what they cost |
| `strategies` | the agent, its baselines, reflection without training, majority votes |
| `records` | a cell's rows on disk: appended, resumed, summed up |
| `plan` | which cells (set × strategy) there are, and the key that each is cached under |
| `runner` | runs what is missing, writes `eval.json` |
| `paired` | paired comparisons of two evaluations, macro averages |
| `published` | the paper's numbers, and whether ours may stand beside them |
| `audit` | which questions a corpus cannot answer |
| `policies` | a checkpoint, a model id, an endpoint: loading and identity |

Scores and figures are `rexrag.training.validation`'s, the ones of an evaluation during training.
"""
