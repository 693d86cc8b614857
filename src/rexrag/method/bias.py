"""The table of biases moved to `rexrag.theory`."""

import sys

if __name__ == "__main__":
    print(
        "rexrag.method.bias is now called rexrag.theory.bias: python -m rexrag.theory.bias", file=sys.stderr
    )
    sys.exit(2)
