"""The search agent: how it talks, one rollout of it, and what the rollout is worth.

| module | what |
|---|---|
| `protocol` | the tag grammar: actions, answers, evidence that cannot act |
| `prompts` | instruction templates and cue pools, as named sets |
| `episode` | one multi-turn rollout as a state machine; probes fork from it |
| `codec` | text and token ids, by a transformers tokenizer |
| `reward` | EM, F1, sub-EM and the reward of a rollout |
| `score` | traces made elsewhere, scored again |
"""
