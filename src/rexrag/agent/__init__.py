"""The search agent: its protocol, one rollout of it, and the reward of the rollout.

| module | what |
|---|---|
| `protocols` | how actions and evidence are written: tags, or a plug-in |
| `prompts` | instruction templates and cue pools, as named sets |
| `episode` | one multi-turn rollout as a state machine; probes fork from it |
| `codec` | text and token ids, by a transformers tokenizer |
| `lengths` | questions that are too long for `agent.total_tokens` |
| `reward` | EM, F1, sub-EM of an answer |
| `scoring` | reward and correctness of a rollout |
| `dead_end_judge` | what a dead-end judge is given, and must return |
| `protocol` | names of 0.1.0 |
"""
