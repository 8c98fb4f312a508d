"""What failures hold on to."""

from __future__ import annotations


def without_frames(error: BaseException) -> None:
    """Take from a library's failure, and from what caused it, the frames that they came through.

    These hold what all callers hold, such as prompts. Where one of them knows the failure, as some of redis-py's and
    aiohttp's do, all that would stay until the collector comes.
    """
    cause: BaseException | None = error
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__context__
