"""What a request says: its head, its body, and what is made of them on the way to the provider."""

from __future__ import annotations

import hmac
import re

import msgspec

from meterlib.core.checks import check_attributes
from meterlib.errors import InvalidInput
from meterlib.gateway.answers import Refusal
from meterlib.gateway.call import Outgoing
from meterlib.gateway.callers import Caller
from meterlib.gateway.encodings import TooLarge, Unreadable, decoder_for
from meterlib.gateway.exchange import BodyLate, BodyTooLarge, Exchange
from meterlib.gateway.headers import for_upstream, value_of
from meterlib.gateway.prompt import Prompt, prompt_of
from meterlib.settings import GatewaySettings

HEAD_BYTES_MAX = 16 << 10
HEADERS_MAX = 64
PROMPT_DIGITS = 16
MESSAGES = "/v1/messages"
COUNT_TOKENS = "/v1/messages/count_tokens"
BATCHES = "/v1/messages/batches"
MODELS = "/v1/models"
_METHODS = {MESSAGES: "POST", COUNT_TOKENS: "POST", MODELS: "GET"}
_MODEL_PATH = re.compile(r"/v1/models/(?!\.{1,2}$)([A-Za-z0-9._:@-]{1,256})")

_lines = msgspec.json.Encoder()


class Invalid(Refusal):
    """The request makes no sense, whoever sent it."""


def check_head(exchange: Exchange) -> None:
    """Pass if the head of a request is no larger than any that a client needs."""
    size = len(exchange.path) + len(exchange.query)
    size += sum([len(name) + len(value) for name, value in exchange.headers])
    if len(exchange.headers) > HEADERS_MAX or size > HEAD_BYTES_MAX:
        message = f"the head of a request may have at most {HEADERS_MAX} headers and {HEAD_BYTES_MAX:,} bytes"
        raise Refusal(431, "invalid_request_error", message)


def model_in(path: str) -> str | None:
    """The model whose description a path asks for."""
    found = _MODEL_PATH.fullmatch(path)
    return found[1] if found else None


def check_route(method: str, path: str) -> None:
    """Pass if there is something at this path, and this is the way to ask for it."""
    expected = "GET" if model_in(path) else _METHODS.get(path)
    if expected is None:
        batch = path == BATCHES or path.startswith(f"{BATCHES}/")
        what = "message batches are not served here: what they use is told only days later" if batch else ""
        raise Refusal(404, "not_found_error", what or "there is no such path here")
    if method != expected:
        raise Refusal(405, "invalid_request_error", f"this path takes {expected}", [("allow", expected)])


async def body_of(exchange: Exchange, settings: GatewaySettings) -> bytes:
    """The body, as it came.

    Raises:
        Refusal: it is too large, or was not there in time.
    """
    try:
        return await exchange.body(settings.body_bytes_max, settings.body_timeout_ms)
    except BodyTooLarge:
        message = f"a request may have at most {settings.body_bytes_max:,} bytes"
        raise Refusal(413, "request_too_large", message) from None
    except BodyLate:
        raise Refusal(408, "timeout_error", "the request took too long to arrive") from None


def prompt_in(exchange: Exchange, caller: Caller, body: bytes, bytes_max: int) -> Prompt:
    """What the body says.

    Raises:
        Refusal: it makes no sense (`Invalid`), or its model is none that the caller may use.
    """
    plain = _decompressed(exchange, body, bytes_max)
    try:
        prompt = prompt_of(plain)
        check_attributes({"model": prompt.model}, "body")
    except InvalidInput as error:
        raise Invalid(400, "invalid_request_error", str(error)) from None
    if caller.models and not _says_each_once(plain):
        raise Invalid(400, "invalid_request_error", "body: a field is there twice, or its name is escaped")
    check_model(caller, prompt.model)
    return prompt


def check_model(caller: Caller, model: str) -> None:
    """Pass if the caller may use the model; to others it does not exist."""
    if not caller.may_use(model):
        raise Refusal(404, "not_found_error", f"model: {model}")


def attributes_of(exchange: Exchange, caller: Caller, model: str | None, settings: GatewaySettings) -> dict[str, str]:
    """The facts of a call; a header that cannot be one is passed over, since it must not fail a call."""
    attributes = {"provider": settings.provider, "key": caller.key}
    if model is not None:
        attributes["model"] = model
    for name, header in settings.attributes.items():
        value = value_of(exchange.headers, header.lower())
        if value is not None:
            try:
                check_attributes({name: value})
            except InvalidInput:
                continue
            attributes[name] = value
    return attributes


def facts_of(caller: Caller, prompt: Prompt) -> dict[str, str]:
    """What tells that two calls are tries of the same one: the prompt's digest, and whether it is to be streamed.

    Clients that try again send the same prompt, perhaps with other settings: Claude Code that gives up streaming asks
    for fewer tokens, too. The digest is nothing without the caller's secret.
    """
    content = hmac.digest(caller.digest_key, _lines.encode_lines(prompt.blocks), "sha256")
    return {"prompt": content.hex()[:PROMPT_DIGITS], "stream": "true" if prompt.stream else "false"}


def outgoing(
    exchange: Exchange, caller: Caller, path: str, body: bytes | None, settings: GatewaySettings
) -> tuple[Outgoing, list[str]]:
    """The request as it goes to the provider, and the beta values that do not."""
    headers, dropped = for_upstream(exchange.headers, caller.credential, settings.betas)
    return Outgoing(exchange.method, path, exchange.query, headers, body), dropped


def _decompressed(exchange: Exchange, body: bytes, bytes_max: int) -> bytes:
    encoding = value_of(exchange.headers, "content-encoding")
    if encoding is None:
        return body
    try:
        return decoder_for(encoding, bytes_max).feed(body)
    except TooLarge:
        message = f"a request may have at most {bytes_max:,} bytes when decompressed"
        code = "request_body_too_large_after_decoding"
        raise Invalid(413, "request_too_large", message, error_code=code) from None
    except Unreadable as error:
        code = "request_body_encoding_unsupported"
        raise Invalid(400, "invalid_request_error", f"content-encoding: {error}", error_code=code) from None


def _says_each_once(body: bytes) -> bool:
    """Whether no field of a JSON object is there twice: the provider might go by the other one.

    Decoding keeps one of each name, and so makes the text shorter; escapes in names do that too, and so do blanks, but
    most clients send none.
    """
    kept = msgspec.json.encode(msgspec.json.decode(body, type=dict[str, msgspec.Raw]))
    if len(kept) == len(body):
        return True
    return len(msgspec.json.format(kept, indent=-1)) == len(msgspec.json.format(body, indent=-1))
