"""A protocol of your own: the built-in tags, but evidence as a numbered list of titles and texts.

python examples/protocol.py
rexrag train --set agent.protocol=examples.protocol:NumberedEvidence
"""

from collections.abc import Sequence

import rexrag
from rexrag.agent.protocols.base import TokenCodec
from rexrag.agent.protocols.tags import Tags


class NumberedEvidence(Tags):
    """`tags` with another text of the evidence; its frame and the neutralised tags stay."""

    def render_evidence(
        self, documents: Sequence[rexrag.Document], codec: TokenCodec, max_tokens: int
    ) -> list[int]:
        """Token ids of the evidence block, at most `max_tokens`."""
        shown = [
            rexrag.Document(document.id, f"({i}) {document.title}\n{document.text}")
            for i, document in enumerate(documents, start=1)
        ]
        return super().render_evidence(shown, codec, max_tokens)


if __name__ == "__main__":
    from sizes import SMALL

    run = rexrag.train("quickstart", overrides=[*SMALL, "name=example-protocol"], protocol=NumberedEvidence())
    print(run.evaluations()[-1]["em"])
