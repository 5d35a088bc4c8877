"""What a worker has under way: one job of a name, each posting an event when it is done."""

import asyncio
from collections.abc import Callable, Collection, Coroutine
from types import TracebackType
from typing import Any, Self

import structlog

JOB_AGAIN_S = 1.0
"""Until a job is tried again that the system refused something."""

Job = Callable[[], Coroutine[Any, Any, None]]


class Jobs:
    """The jobs of one worker; there can be some inside ``async with``, and leaving it cancels them."""

    def __init__(self, owner: str, log: structlog.stdlib.BoundLogger) -> None:
        self._owner = owner
        self._group = asyncio.TaskGroup()
        self._log = log
        self._tasks: dict[str, asyncio.Task[None]] = {}

    async def __aenter__(self) -> Self:
        await self._group.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.keep(())
        await self._group.__aexit__(kind, error, trace)

    def start(self, name: str, job: Job) -> None:
        """Begin a job; one of the same name that is under way is cancelled."""
        previous = self._tasks.pop(name, None)
        if previous is not None:
            previous.cancel()
        self._tasks[name] = self._group.create_task(self._carry_out(name, job), name=f"{self._owner}:{name}")

    def keep(self, names: Collection[str]) -> None:
        """Cancel every job but these."""
        for name in [name for name in self._tasks if name not in names]:
            self._tasks.pop(name).cancel()

    def cancel(self, name: str, then: Callable[[], None]) -> None:
        """Cancel a job that is under way; ``then`` is called once it has ended so, not if it ends well after all."""
        job = self._tasks.pop(name, None)
        if job is not None:
            job.add_done_callback(lambda ended: then() if ended.cancelled() else None)
            job.cancel()

    async def _carry_out(self, name: str, job: Job) -> None:
        """Do a job. What the system refuses now (no file descriptor is left, say) ends neither worker nor daemon."""
        refused = ""
        while True:
            try:
                await job()
            except OSError as error:
                if str(error) != refused:
                    refused = str(error)
                    self._log.error("worker.job_failed", job=name, reason=refused, again_after_s=JOB_AGAIN_S)
                await asyncio.sleep(JOB_AGAIN_S)
            else:
                return
