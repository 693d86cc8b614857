"""One completion from an OpenAI-compatible server: token ids in and, where the server can, token ids out.

Prompts are always sent as token ids. Ids come back in one of these places, in this order:

| server | asked for with | found in the choice |
|---|---|---|
| vLLM | `return_token_ids` | `token_ids` |
| llama.cpp | `logprobs` | `logprobs.content[].id` |
| older vLLM | `return_tokens_as_token_ids` and `logprobs` | `logprobs.tokens` as `token_id:N` |

Where there are none the text is encoded anew: then the continuation is not token-exact. Records
and summary of an evaluation count such turns as `encoded_anew`.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from rexrag.agent.protocols.tags import LONGEST_TOKEN
from rexrag.errors import ConfigError, EndpointError
from rexrag.http import (
    BadAnswer,
    Client,
    first_words,
    may_pass,
    parse_address,
    parse_json,
    pause,
    retry_after,
)
from rexrag.io import brief, say_once

TOKEN_VARIABLE = "REXRAG_POLICY_TOKEN"
STOPS = ("</search>", "</answer>")
"""Those of the protocol `tags`: an action ends the turn, so the server need not write on."""
OPTIONS: Mapping[str, Any] = {
    "return_token_ids": True,
    "return_tokens_as_token_ids": True,
    "logprobs": 1,
    "include_stop_str_in_output": True,
    "no_stop_trim": True,
    "skip_special_tokens": False,
    "spaces_between_special_tokens": False,
    # A server may take its defaults from the model's generation config; these switch them off.
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
}
"""What is asked for beyond the standard fields. A server that refuses them is asked again without them."""
MOST_BYTES = 2**25
"""Of an answer: more than its tokens with all their log-probs can take."""
REFUSED = frozenset({401, 403, 404})
"""Statuses that no other question would change: a wrong token, address or model."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What a server wrote. `ids` is None where it returned text only."""

    text: str
    ids: tuple[int, ...] | None
    finished: bool
    """It stopped by itself (an end token or a stop string), not at the token limit."""
    stopped_by: str | int | None
    """The stop string or token id, where the server names it."""
    names_stop: bool
    """The server says what stopped it: then a missing name means an end token."""


class CompletionClient:
    """Use it as long as the policy lives, from any thread; `close` it at the end. `timeout`: seconds.

    `url` is what OpenAI clients call the base URL (…/v1); `/completions` is added. Tried again with growing
    pauses, up to `retries` times: no connection, a time-out, status 429 and 5xx, an answer that is no
    completion.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        timeout: float = 120.0,
        retries: int = 5,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """The token is $REXRAG_POLICY_TOKEN, where it is set. Raises ConfigError where `url` is unusable."""
        self.url, self.model, self.retries = base_url(url), model, retries
        self._sleep = sleep
        self._jitter = random.Random()
        self._plain = False
        self._said = False
        self._http = Client(self.url.host, timeout=timeout, token=os.environ.get(TOKEN_VARIABLE))

    def close(self) -> None:
        self._http.close()

    def models(self) -> list[str]:
        """Names of the models that the server offers. Raises EndpointError, ConfigError."""
        body = self._ask("GET", "/models", None, _model_names)
        return list(body)

    def complete(
        self,
        prompt: Sequence[int],
        max_tokens: int,
        temperature: float,
        seed: int,
        stops: Sequence[str] = STOPS,
    ) -> Completion:
        """At most `max_tokens` more tokens, up to the first of `stops`.

        Raises EndpointError after every retry, ConfigError (REFUSED).
        """
        request = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "seed": seed,
            "stop": list(stops),
        }

        def parse(body: object) -> Completion:
            return parse_completion(body, prompt, max_tokens)

        found: Completion = self._ask("POST", "/completions", request, parse)
        return found

    def _ask(
        self, method: str, path: str, request: dict[str, Any] | None, parse: Callable[[object], Any]
    ) -> Any:
        where = f"{self.url}{path}"
        for attempt in range(self.retries + 1):
            asked = None
            try:
                response = self._send(method, where, request)
                if response.is_success:
                    return parse(parse_json(response))
                cause = f"status {response.status_code}: {first_words(response)}"
                self._refuse(where, response, cause)
                asked = retry_after(response.headers.get("Retry-After"))
            except httpx.HTTPError as error:
                cause = f"{type(error).__name__}: {error}"
            except ConfigError:
                raise
            except (ValueError, RecursionError, BadAnswer) as error:
                cause = f"no completion: {error}"
            if attempt < self.retries:
                self._say_first(f"{where}: {cause}; trying again, {self.retries} times at most")
                self._sleep(pause(attempt, asked, self._jitter))
        raise EndpointError(f"{where}: failed {self.retries + 1} times, the last time with {cause}")

    def _refuse(self, where: str, response: httpx.Response, cause: str) -> None:
        """Raises ConfigError or EndpointError where trying again is of no use."""
        if response.status_code in REFUSED:
            raise ConfigError(f"{where}: {cause} (a token is read from ${TOKEN_VARIABLE})")
        if not may_pass(response):
            raise EndpointError(f"{where}: {cause}")

    def _say_first(self, message: str) -> None:
        """The first failure is said at once: retries can take minutes."""
        if not self._said:
            self._said = True
            say_once(message)

    def _send(self, method: str, where: str, request: dict[str, Any] | None) -> httpx.Response:
        if request is None:
            return self._request(method, where, None)
        if not self._plain:
            response = self._request(method, where, {**request, **OPTIONS})
            if response.status_code not in (400, 422):
                return response
        plain = self._request(method, where, request)
        # Only a server that takes the plain request has refused the options.
        self._plain = self._plain or plain.is_success
        return plain

    def _request(self, method: str, where: str, body: object) -> httpx.Response:
        return self._http.request(method, where, body=body, most_bytes=MOST_BYTES)


def base_url(url: str) -> httpx.URL:
    """The address up to /v1, without a final slash. Raises ConfigError."""
    short = url.rstrip("/").removesuffix("/completions")
    parsed = parse_address(short, "policy", TOKEN_VARIABLE, "http://127.0.0.1:8000/v1")
    if parsed.query:
        raise ConfigError(f"policy of host '{parsed.host}': an address without a query is expected")
    return parsed.copy_with(path="/v1") if parsed.path in ("", "/") else parsed


def parse_completion(body: object, prompt: Sequence[int], max_tokens: int) -> Completion:
    """The first choice of a completion. Raises ValueError for anything that cannot be one."""
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError(f"expected an object with a list 'choices', got {brief(body)}")
    choice = choices[0]
    text, reason = choice.get("text"), choice.get("finish_reason")
    if not isinstance(text, str):
        raise ValueError(f"choices.0.text: expected a text, got {brief(text)}")
    if len(text) > LONGEST_TOKEN * (max_tokens + 1):
        raise ValueError(f"a text of {len(text):,} characters for {max_tokens} tokens at most")
    text.encode("utf-8")  # JSON can spell half a surrogate pair; no tokenizer takes it
    if reason not in ("stop", "length"):
        raise ValueError(f"choices.0.finish_reason: expected 'stop' or 'length', got {brief(reason)}")
    echoed = choice.get("prompt_token_ids")
    if isinstance(echoed, list) and echoed != list(prompt):
        raise ValueError("choices.0.prompt_token_ids: the server read another prompt than was sent")
    ids = _token_ids(choice)
    if ids is not None and len(ids) > max_tokens:
        raise ValueError(f"{len(ids)} tokens, but at most {max_tokens} were asked for")
    if reason == "length" and (not ids if ids is not None else not text):
        raise ValueError("an empty completion at the token limit")
    stop_fields = [field for field in ("stop_reason", "matched_stop") if field in choice]
    stopped_by = choice[stop_fields[0]] if stop_fields else None
    return Completion(text, ids, reason == "stop", stopped_by, bool(stop_fields))


def _token_ids(choice: Mapping[str, Any]) -> tuple[int, ...] | None:
    ids = choice.get("token_ids")
    if ids is None and isinstance(logprobs := choice.get("logprobs"), dict):
        content, tokens = logprobs.get("content"), logprobs.get("tokens")
        if isinstance(content, list) and content and all(isinstance(t, dict) and "id" in t for t in content):
            ids = [token["id"] for token in content]
        elif isinstance(tokens, list) and tokens and all(str(t).startswith("token_id:") for t in tokens):
            ids = [int(str(token).removeprefix("token_id:")) for token in tokens]
    if ids is None:
        return None
    if not isinstance(ids, list) or not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        raise ValueError(f"expected token ids, got {brief(ids)}")
    return tuple(ids)


def _model_names(body: object) -> list[str]:
    rows = body.get("data") if isinstance(body, dict) else None
    names = [row.get("id") for row in rows if isinstance(row, dict)] if isinstance(rows, list) else []
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"expected an object with a list 'data' of models, got {brief(body)}")
    return [str(name) for name in names]
