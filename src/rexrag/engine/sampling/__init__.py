"""Rollouts and scores by the local engine: many episodes at once, on one key-value cache.

| module | what |
|---|---|
| `policy` | `LocalPolicy`: opens sessions, scores token sequences |
| `sampler` | `LocalSession`: runs episodes until they are done |
| `batch` | which rows take part in the next forward |
| `rows` | episodes that share a row of the cache |
| `cache` | the key-value cache, in banks of rows of similar length |
| `appending` | attention of new tokens to cached ones |
| `decoder` | a faster forward for Llama-like decoders |
| `cpu_weights` | weights in the layout of the CPU's matrix kernels |
| `cuda_graphs` | decode steps captured as CUDA graphs |
| `speculation` | speculative tokens from n-grams |
| `token_draw` | random numbers, and tokens drawn with them |
"""
