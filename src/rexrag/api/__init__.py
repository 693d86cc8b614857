"""What `import rexrag` offers, each part in its own file.

| module | names |
|---|---|
| `runs` | `train`, `Trainer`, `Run` |
| `agents` | `load_agent`, `Agent` |
| `evaluations` | `evaluate`, `Evaluation` |
| `comparisons` | `compare`, `Comparison` |
| `arguments` | lists that are given as one text, and errors that name arguments |
"""
