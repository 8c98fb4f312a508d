"""Uses of the `anthropic` package, whichever version the running Python has, and what each told its caller.

    python sdk_client.py URL KEY SCENARIO[,SCENARIO…] ['{"prompt": "Hello", "max_retries": 2, …}']
    python sdk_client.py        # the same, again and again: each line of standard input is a JSON list of arguments

It runs by itself in environments that have nothing else, and prints one line of JSON for each scenario:

    version, scenario, elapsed_s
    attempts    when each request was sent, in seconds since the first one
    credential  which headers carried the key;  api_version  what `anthropic-version` said
    usage, stop_reason, text, model, request_id   of the answer, as far as there was one
    result      of scenarios that have no message
    error       class, status, type, message, request_id, if the package raised one
"""

from __future__ import annotations

import asyncio
import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

anthropic: Any = importlib.import_module("anthropic")

OPTIONS: dict[str, Any] = {
    "model": "claude-sonnet-4-5",
    "prompt": "Grüße, 世界 🙂",
    "max_tokens": 64,
    "max_retries": 2,
    "timeout_s": 30.0,
    "calls": 50,
}


class Sent:
    """The requests that went out, as the HTTP library has them."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.headers: list[Any] = []

    def note(self, request: Any) -> None:
        self.times.append(time.monotonic())
        self.headers.append(request.headers)

    async def note_async(self, request: Any) -> None:
        self.note(request)

    def told(self) -> dict[str, Any]:
        first = self.headers[0] if self.headers else {}
        return {
            "attempts": [round(at - self.times[0], 3) for at in self.times],
            "credential": [name for name in ("x-api-key", "authorization") if name in first],
            "api_version": first.get("anthropic-version"),
        }


class Scenarios:
    """Each is one use of the package, and returns what it was told."""

    def __init__(self, url: str, key: str, options: dict[str, Any]) -> None:
        self._options = options
        self._asked = {
            "model": options["model"],
            "max_tokens": options["max_tokens"],
            "messages": [{"role": "user", "content": options["prompt"]}],
        }
        self._settings = {
            "base_url": url,
            "api_key": key,
            "max_retries": options["max_retries"],
            "timeout": options["timeout_s"],
        }
        hooks = {"request": [lambda request: self._sent.note(request)]}
        http_client = anthropic.DefaultHttpxClient(event_hooks=hooks)
        self._client = anthropic.Anthropic(**self._settings, http_client=http_client)

    def play(self, name: str) -> dict[str, Any]:
        """What one scenario was told."""
        self._sent = Sent()
        scenario: Callable[[], dict[str, Any]] = getattr(self, name)
        began = time.monotonic()
        try:
            told = scenario()
        except Exception as error:  # whatever the package raises is the result
            told = {"error": _failed(error)}
        elapsed_s = round(time.monotonic() - began, 3)
        return {"version": anthropic.__version__, "scenario": name, "elapsed_s": elapsed_s} | self._sent.told() | told

    def create(self) -> dict[str, Any]:
        return _of(self._client.messages.create(**self._asked))

    def beta_create(self) -> dict[str, Any]:
        return _of(self._client.beta.messages.create(**self._asked))

    def stream(self) -> dict[str, Any]:
        return self._streamed(self._client.messages)

    def beta_stream(self) -> dict[str, Any]:
        return self._streamed(self._client.beta.messages)

    def stream_raw(self) -> dict[str, Any]:
        """Event by event; `result` has the usage of message_start and of each message_delta."""
        told: dict[str, Any] = {"text": "", "stop_reason": None, "usage": {}, "result": []}
        for event in self._client.messages.create(**self._asked, stream=True):
            if event.type == "message_start":
                told |= {"model": event.message.model, "usage": event.message.usage.to_dict(mode="json")}
                told["result"].append(told["usage"])
            elif event.type == "message_delta":
                told["stop_reason"] = event.delta.stop_reason
                told["result"].append(event.usage.to_dict(mode="json"))
                told["usage"] = told["usage"] | {
                    k: v for k, v in event.usage.to_dict(mode="json").items() if v is not None
                }
            elif event.type == "content_block_delta" and event.delta.type == "text_delta":
                told["text"] += event.delta.text
        return told

    def break_midway(self) -> dict[str, Any]:
        """The caller has had enough after the first piece of text."""
        with self._client.messages.stream(**self._asked) as stream:
            return {"text": next(iter(stream.text_stream))}

    def count_tokens(self) -> dict[str, Any]:
        asked = {name: self._asked[name] for name in ("model", "messages")}
        return {"result": self._client.messages.count_tokens(**asked).input_tokens}

    def models_list(self) -> dict[str, Any]:
        """All of them, two a page."""
        return {"result": [model.id for model in self._client.models.list(limit=2)]}

    def models_get(self) -> dict[str, Any]:
        return {"result": self._client.models.retrieve(self._options["model"]).to_dict(mode="json")}

    def batches(self) -> dict[str, Any]:
        """Made, looked up, or listed, as the options say."""
        batches = self._client.messages.batches
        how = self._options["how"]
        if how == "create":
            return {"result": batches.create(requests=[{"custom_id": "a", "params": self._asked}]).id}
        return {"result": batches.retrieve("msgbatch_1").id if how == "retrieve" else list(batches.list())}

    def concurrent(self) -> dict[str, Any]:
        """Many calls at once, every other one streamed; `result` has the usage of each, or the class of its error."""
        return {"result": asyncio.run(self._many())}

    # What these two meet is up to the server; the client does nothing else than before.
    error_429_retry = create
    should_retry_false = create

    def _streamed(self, messages: Any) -> dict[str, Any]:
        with messages.stream(**self._asked) as stream:
            text = "".join(stream.text_stream)
            told = _of(stream.get_final_message())
        assert told["text"] == text, (told["text"], text)
        return told | {"request_id": stream.response.headers.get("request-id")}

    async def _many(self) -> list[Any]:
        hooks = {"request": [self._sent.note_async]}
        http_client = anthropic.DefaultAsyncHttpxClient(event_hooks=hooks)
        async with anthropic.AsyncAnthropic(**self._settings, http_client=http_client) as client:

            async def call(streamed: bool) -> Any:
                if not streamed:
                    return (await client.messages.create(**self._asked)).usage.to_dict(mode="json")
                async with client.messages.stream(**self._asked) as stream:
                    return (await stream.get_final_message()).usage.to_dict(mode="json")

            calls = (call(n % 2 == 1) for n in range(self._options["calls"]))
            told = await asyncio.gather(*calls, return_exceptions=True)
        return [type(each).__name__ if isinstance(each, BaseException) else each for each in told]


def _of(message: Any) -> dict[str, Any]:
    return {
        "usage": message.usage.to_dict(mode="json"),
        "stop_reason": message.stop_reason,
        "text": "".join(block.text for block in message.content if block.type == "text"),
        "model": message.model,
        "request_id": getattr(message, "_request_id", None),
    }


def _failed(error: Exception) -> dict[str, Any]:
    """What a caller can tell of an error; the type is the API's own word for it."""
    body = getattr(error, "body", None)
    of_api = body.get("error") if isinstance(body, dict) else None
    return {
        "class": type(error).__name__,
        "status": getattr(error, "status_code", None),
        "type": getattr(error, "type", None) or (of_api or {}).get("type"),
        "message": str(error),
        "request_id": getattr(error, "request_id", None),
    }


def main(url: str, key: str, names: str, options: str = "{}") -> None:
    scenarios = Scenarios(url, key, OPTIONS | json.loads(options))
    for name in names.split(","):
        print(json.dumps(scenarios.play(name)), flush=True)


if __name__ == "__main__":
    if sys.argv[1:]:
        main(*sys.argv[1:])
    else:
        for line in sys.stdin:
            main(*json.loads(line))
