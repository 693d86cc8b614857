"""Moved: the table of biases is `python -m rexrag.theory.bias`."""

raise SystemExit(
    2 if __import__("sys").stderr.write("rexrag: this is python -m rexrag.theory.bias now\n") else 2
)
