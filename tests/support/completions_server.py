"""A completions server on a real port, in the dialects of the field, that can be told to misbehave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response

Model = Callable[[list[int], int, Sequence[str]], tuple[list[int], str | int | None, bool]]
"""(prompt ids, most tokens, stop strings) -> (written ids, the stop string or None, did it stop itself)."""
Fault = Callable[[dict[str, Any]], Response | None]


class CompletionsServer:
    """`dialect`: vllm, llama.cpp, old-vllm, text (no ids, stops cut off, unknown fields refused).

    `faults` are asked first, one for each request, in order; a fault that returns None lets it through.
    """

    def __init__(self, model: Model, decode: Callable[[list[int]], str], dialect: str = "vllm") -> None:
        self.model, self.decode, self.dialect = model, decode, dialect
        self.requests: list[dict[str, Any]] = []
        self.faults: list[Fault] = []
        self.names = ["the-model"]
        self.running = self.most_at_once = 0
        self._lock = threading.Lock()
        self.app = FastAPI()
        self.app.get("/v1/models")(lambda: {"data": [{"id": name} for name in self.names]})
        self.app.add_api_route("/v1/completions", self._endpoint(), methods=["POST"])

    def _endpoint(self) -> Callable[..., Any]:
        async def endpoint(request: Request) -> Response:
            from anyio.to_thread import run_sync

            body = await request.json()
            return await run_sync(self._answer, body)

        endpoint.__annotations__["request"] = Request
        return endpoint

    def _answer(self, body: dict[str, Any]) -> Response:
        with self._lock:
            self.requests.append(body)
            fault = self.faults.pop(0) if self.faults else None
            self.running += 1
            self.most_at_once = max(self.most_at_once, self.running)
        try:
            return (fault(body) if fault else None) or self._complete(body)
        finally:
            with self._lock:
                self.running -= 1

    def _complete(self, body: dict[str, Any]) -> Response:
        if self.dialect == "text" and "return_token_ids" in body:
            return JSONResponse({"error": "unknown field"}, 400)
        ids, stop, finished = self.model(body["prompt"], body["max_tokens"], body["stop"])
        text = self.decode(ids)
        keeps = body.get("include_stop_str_in_output", False) and self.dialect != "text"
        if stop and not keeps:
            text = text[: text.rfind(str(stop))]
        choice: dict[str, Any] = {"text": text, "finish_reason": "stop" if finished else "length"}
        if self.dialect == "vllm":
            choice |= {"token_ids": ids, "stop_reason": stop, "prompt_token_ids": body["prompt"]}
        elif self.dialect == "old-vllm":
            choice |= {"logprobs": {"tokens": [f"token_id:{i}" for i in ids]}, "stop_reason": stop}
        elif self.dialect == "llama.cpp":
            choice |= {"logprobs": {"content": [{"id": i, "logprob": -1.0} for i in ids]}}
        return JSONResponse({"choices": [choice]})


def scripted(
    say: Callable[[str], str], decode: Callable[[list[int]], str], encode: Callable[[str], list[int]]
) -> Model:
    """A model that says what a script says to the prompt's text, cut at a stop string or at the limit."""

    def model(prompt: list[int], most: int, stops: Sequence[str]) -> tuple[list[int], str | None, bool]:
        text, hit = say(decode(prompt)), None
        for end in range(1, len(text) + 1):
            hit = next((stop for stop in stops if text[:end].endswith(stop)), None)
            if hit:
                text = text[:end]
                break
        ids = encode(text)
        return ids[:most], hit if len(ids) <= most else None, len(ids) <= most

    return model


def status(code: int, **headers: str) -> Fault:
    return lambda body: PlainTextResponse("the server is unwell", code, headers=headers)


def says(value: object) -> Fault:
    """Whatever JSON, or text that is none."""
    if isinstance(value, str):
        return lambda body: PlainTextResponse(value)
    return lambda body: JSONResponse(value)


def slow(seconds: float) -> Fault:
    def fault(body: dict[str, Any]) -> None:
        time.sleep(seconds)

    return fault
