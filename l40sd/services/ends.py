"""How a run ended, for the operator: what its exit record says, and what it said itself."""

import asyncio
import signal
from dataclasses import dataclass

from l40sd.adapters.process import ExitRecord, InstanceSpec, Processes
from l40sd.core import logcauses
from l40sd.core.messages import LastEnd

LAST_LINES = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class End:
    """What is told of one run's end.

    Attributes:
        kind: What a failure is filed under.
        says: What happened, in a phrase.
        log_says: Why, as its own output has it; empty where it has nothing.
        last_lines: The end of its output, and from further above what tells the reason.
    """

    kind: str
    says: str
    log_says: str
    last_lines: tuple[str, ...]

    @property
    def reason(self) -> str:
        """What happened and why."""
        return f"{self.says}: {self.log_says}" if self.log_says else self.says


async def end_of(processes: Processes, spec: InstanceSpec, record: ExitRecord, *, is_wish: bool) -> End:
    """Return what is told of an end. Of a wished one no reason is looked for: engines complain when they stop, too."""
    lines = await processes.last_run(spec, logcauses.LOG_BYTES)
    cause = None if is_wish else await asyncio.to_thread(logcauses.find, lines)
    kind, says = describe_exit(record)
    log_says = cause.text if cause is not None else ""
    return End(kind=kind, says=says, log_says=log_says, last_lines=logcauses.shown(lines, cause, LAST_LINES))


def last_end_of(record: ExitRecord, how: str, *, why: str) -> LastEnd:
    """Return an end as `status WORKER` tells it; ``why``: the failure that it was killed for, or the wish."""
    return LastEnd(how=how, why=why, at=record.ended_at, ran_s=record.ran_s, instance=record.instance)


def told_of_the_end(record: ExitRecord, reason: str, log_says: str) -> str:
    """Return what is added to the failure that a run was ended for, by what became of it then; empty: nothing new.

    What runs out of memory stands still first, so that the kernel may come second.
    """
    if record.oom:
        return f"; {reason}"
    return f"; its log: {log_says}" if log_says else ""


def describe_exit(record: ExitRecord) -> tuple[str, str]:
    """Return what an exit is filed under, and a phrase for the operator."""
    if record.oom:
        return "oom", "out of memory: the kernel killed a process of it"
    match record.cause:
        case "shim-lost":
            return "shim-lost", "its shim was killed; what was left of it has been ended"
        case "exec-failed":
            return "exec_failed", record.detail
        case "orphaned":
            return "orphaned", "stopped itself: no daemon for longer than orphan_grace_s"
        case _:
            pass
    if record.cause == "stopped" and (record.code == 0 or record.signal == signal.SIGTERM):
        return f"exit {record.code}", "stopped as told"
    if record.signal is not None:
        return f"signal {record.signal}", f"ended by signal {record.signal}"
    if record.code == 0 and record.cause == "exited":
        return "exit 0", "ended by itself with status 0, as if told to, and nobody had told it to"
    return f"exit {record.code}", f"exited with status {record.code}"
