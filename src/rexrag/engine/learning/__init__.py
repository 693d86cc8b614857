"""Training by the local engine: optimizer updates from per-token streams.

| module | what |
|---|---|
| `learner` | `LocalLearner`: mini-batches, micro-batches, AdamW |
| `packing` | rows packed for one forward, shared prefixes once |
| `checkpoint` | weights, moments and counters on disk |
| `muon` | optimizers of supervised fine-tuning |
"""
