"""How a change of phase is told in the log: one line each, the operator's story of the day."""

from l40sd.workers.lifecycle import OCCUPIES_GPUS, Phase


def line_of(before: Phase, phase: Phase, *, is_wish: bool, is_ejected: bool) -> tuple[str, str]:
    """Return the level and the event of the line.

    Args:
        is_wish: It was told to restart.
        is_ejected: It is out for the requests that failed on it, not for its probes.
    """
    match phase:
        case Phase.UNREADY:
            return "warning", "worker.ejected" if is_ejected else "worker.unready"
        case Phase.BACKOFF:
            return "warning", "worker.backoff"
        case Phase.QUARANTINED | Phase.FAILED | Phase.STUCK:
            return "error", f"worker.{phase}"
        case Phase.WAITING if is_wish:
            return "info", "worker.exited"
        case Phase.WAITING if before in OCCUPIES_GPUS:
            return "warning", "worker.exited"
        case _:
            return "info", f"worker.{phase}"
