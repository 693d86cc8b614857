"""What service and client share beside the protocol: where the token is, and what is this machine."""

from __future__ import annotations

import ipaddress

TOKEN_VARIABLE = "REXRAG_RETRIEVER_TOKEN"
"""Environment variable with the bearer token. Not in the configuration, which is copied into run folders."""


def is_loopback(host: str) -> bool:
    """Whether a host name or address can be this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
