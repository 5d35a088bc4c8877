"""What this host has shown so far: which launches served a short while ago, and how long each model takes to load.

Kept on disk beside what is wanted. Loads outlive a boot, proofs do not: the driver may be another one then.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from l40sd.clock import boot_id, now_s
from l40sd.codec import restore
from l40sd.model import ModelName
from l40sd.workers.lifecycle import Phase
from l40sd.workers.slot import Observed

PROOFS_KEPT = 1000


@dataclass(slots=True)
class Learned:
    """Owned by the supervisor.

    Attributes:
        served_at_s: When each launch, by its fingerprint, was last seen ready; the latest ones.
    """

    served_at_s: dict[str, float] = field(default_factory=dict)

    def note(self, observed: Iterable[Observed]) -> None:
        """Take a look at the workers: who is ready has a proof, whose start failed has none any more."""
        for o in observed:
            if o.phase is Phase.READY:
                self.served_at_s.pop(o.fingerprint, None)
                self.served_at_s[o.fingerprint] = now_s()
            elif o.failed_starts or o.phase in (Phase.QUARANTINED, Phase.FAILED, Phase.STUCK):
                self.served_at_s.pop(o.fingerprint, None)
        while len(self.served_at_s) > PROOFS_KEPT:
            self.served_at_s.pop(next(iter(self.served_at_s)))

    def proofs(self, kept_s: float) -> frozenset[str]:
        """Return the fingerprints of the launches that served within so many seconds."""
        since_s = now_s() - kept_s
        return frozenset(f for f, served_at_s in self.served_at_s.items() if kept_s and served_at_s >= since_s)

    def saved(self, loads_s: Mapping[ModelName, list[float]]) -> dict[str, Any]:
        """Return what the next daemon is told."""
        return {"boot_id": boot_id(), "served_at_s": dict(self.served_at_s), "loads_s": dict(loads_s)}

    def adopt(self, stored: Any) -> dict[ModelName, list[float]]:
        """Go on with the proofs of this boot that ``saved`` gave; return the loads. Another l40sd's are nothing."""
        try:
            known = restore(dict[str, Any], stored or {})
            loads_s = restore(dict[ModelName, list[float]], known.get("loads_s", {}))
            served_at_s = restore(dict[str, float], known.get("served_at_s", {}))
        except msgspec.ValidationError:
            return {}
        if known.get("boot_id") == boot_id():
            self.served_at_s = served_at_s
        return loads_s
