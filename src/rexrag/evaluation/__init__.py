"""`rexrag eval`, `ask` and `score`: agents and baselines on questions, to scored rows with intervals.

| module | what |
|---|---|
| `policies` | which agent is meant, and how its parts are loaded: a run, a checkpoint, a model, an endpoint |
| `ask` | one question, answered |
| `attempt`, `context` | one attempt at a question and its cost; what every strategy runs with |
| `strategies` | the agent, its baselines, reflection without training, majority votes |
| `side_by_side` | many questions at once, each reported as it ends |
| `cells` | which cells (question set × strategy) there are, and the key that each is cached under |
| `records` | a cell's rows on disk: appended, resumed, summed up |
| `runner`, `result` | answers what is missing; what `eval.json` holds |
| `paired_tests` | paired comparisons of two evaluations, macro averages |
| `published` | the paper's numbers, and whether ours may stand beside them |
| `corpus_audit` | which questions a corpus cannot answer |
| `rescore` | traces made elsewhere, scored again |

Scores and figures are `rexrag.training.validation`'s, the ones of an evaluation during training.
"""
