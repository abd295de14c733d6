"""Doing several things at the same time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

__all__ = ["run_parallel"]


async def run_parallel(work: Callable[[], Awaitable[None]], tasks: int) -> None:
    """Run `work` in several tasks at the same time.

    The first error cancels the others and is raised as it is, not in a group.
    """
    error: BaseException | None = None

    async def guarded() -> None:
        nonlocal error
        try:
            await work()
        except Exception as exc:
            error = error or exc
            nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        for _ in range(tasks):
            nursery.start_soon(guarded)
    if error is not None:
        raise error
