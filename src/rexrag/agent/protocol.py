"""The tag protocol under its name of version 0.1.0."""

from rexrag.agent.protocols.tags import extract_answer, parse_action

__all__ = ["extract_answer", "parse_action"]
