"""A policy behind an OpenAI-compatible completions endpoint (vLLM, SGLang, llama.cpp): rollouts only.

| module | what |
|---|---|
| `client` | one completion over HTTP: retries, and what may be believed of the answer |
| `policy` | episodes driven through it, several at once |
"""

from rexrag.engine.endpoint.policy import EndpointPolicy, connect

__all__ = ["EndpointPolicy", "connect"]
