"""Engines: what samples rollouts and trains a policy.

| module | what |
|---|---|
| `base` | the interface: `Policy`, `Session`, `Learner` |
| `loading` | configuration -> policy and learner |
| `sources` | `policy.path` -> a checked folder or hub id |
| `precision` | float32 or bfloat16 |
| `lora` | LoRA adapters in peft's format |
| `export` | model folders |
| `gguf` | GGUF files -> model folders |
| `attention` | attention over packed rows |
| `sampling/` | rollouts and scores |
| `learning/` | optimizer updates |
| `endpoint/` | rollouts by a server |
"""
