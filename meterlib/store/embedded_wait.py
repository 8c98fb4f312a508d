"""How long a call waits for an embedded server: as long as the call has, and then the store is unavailable.

A server that never served us yet, and is about to, is waited for however little time the call has: nobody can tell how
long a ledger takes to load, and to give up would stop it again and again. One that could not be started is left alone
for a while: who has the time waits for the next start, one for all, and who has not is told of the last one.
"""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import Future
from copy import copy

from meterlib.errors import EmbeddedError
from meterlib.store.embedded import EmbeddedServer

_AGAIN_SECONDS = 0.1


def wait_for(server: EmbeddedServer, seconds: float) -> None:
    """Return when the server serves.

    Raises:
        EmbeddedError: it does not within the time, or it cannot be started.
    """
    pause_s = _pause_s(server, seconds)
    time.sleep(pause_s)
    found, left = server.ensuring(), seconds - pause_s
    while True:
        try:
            found.exception(left)
            return _checked(found)
        except TimeoutError:
            if not server.coming:
                raise _late(server) from None
        left = _AGAIN_SECONDS


async def wait_for_async(server: EmbeddedServer, seconds: float) -> None:
    """`wait_for`, awaited; a caller that is cancelled disturbs nobody else who waits."""
    pause_s = _pause_s(server, seconds)
    await asyncio.sleep(pause_s)
    found, left = server.ensuring(), seconds - pause_s
    awaited = asyncio.wrap_future(found)
    try:
        while not (await asyncio.wait((awaited,), timeout=left))[0]:
            if not server.coming:
                raise _late(server)
            left = _AGAIN_SECONDS
    finally:
        if not awaited.cancel():
            awaited.exception()
    _checked(found)


def _pause_s(server: EmbeddedServer, seconds: float) -> float:
    pause_s, failure = server.rest()
    if failure is not None and pause_s >= seconds:
        raise copy(failure)
    return pause_s


def _checked(found: Future[None]) -> None:
    error = found.exception()
    if error is not None:
        raise copy(error)  # each caller adds its own traceback


def _late(server: EmbeddedServer) -> EmbeddedError:
    where = f"the embedded store in {server.folder}"
    return EmbeddedError(f"the server of {where} did not answer in time; the outcome is unknown, repeating is safe")
