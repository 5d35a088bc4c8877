"""What this host has shown, and for how long that counts."""

from dataclasses import replace

import pytest

from l40sd.clock import now_s
from l40sd.codec import decode, encode
from l40sd.model import GpuId, ModelName, ReplicaKind, WorkerId
from l40sd.supervisor.learned import Learned
from l40sd.workers.lifecycle import Goal, Phase
from l40sd.workers.slot import Observed

M = ModelName("m")
SERVES = Observed(
    worker=WorkerId("m-gpu0"),
    model=M,
    gpus=(GpuId("gpu0"),),
    weight=1,
    kind=ReplicaKind(M, 1, 1),
    fingerprint="f",
    phase=Phase.READY,
    goal=Goal.SERVE,
)


def test_a_launch_that_served_is_proven_for_a_while() -> None:
    learned = Learned()
    learned.note([SERVES, replace(SERVES, fingerprint="comes up", phase=Phase.STARTING)])
    assert learned.proofs(60) == {"f"}
    assert learned.proofs(0) == frozenset(), "switched off"
    learned.served_at_s["f"] = now_s() - 61
    assert learned.proofs(60) == frozenset()


@pytest.mark.parametrize(
    "failed",
    [
        replace(SERVES, phase=Phase.BACKOFF, failed_starts=1),
        *(replace(SERVES, phase=phase) for phase in (Phase.QUARANTINED, Phase.FAILED, Phase.STUCK)),
    ],
)
def test_a_launch_that_failed_since_is_on_trial_again(failed: Observed) -> None:
    learned = Learned()
    learned.note([SERVES])
    learned.note([failed])
    assert learned.proofs(60) == frozenset()


def test_the_next_daemon_knows_proofs_of_this_boot_only_and_all_loads() -> None:
    learned = Learned()
    learned.note([SERVES])
    stored = decode(dict[str, object], encode(learned.saved({M: [3.5]})))
    same, other, neither = Learned(), Learned(), Learned()
    assert (same.adopt(stored), same.proofs(60)) == ({M: [3.5]}, {"f"})
    assert (other.adopt({**stored, "boot_id": "another"}), other.proofs(60)) == ({M: [3.5]}, frozenset())
    assert (neither.adopt({**stored, "served_at_s": "what another l40sd wrote"}), neither.proofs(60)) == (
        {},
        frozenset(),
    )
