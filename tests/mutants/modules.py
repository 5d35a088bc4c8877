"""Which modules are changed, against which tests each; and the changes that change nothing."""

from dataclasses import dataclass

MODULES = {
    "l40sd/supervisor/reconcile.py": ("tests/supervisor/test_reconcile.py",),
    "l40sd/supervisor/rollout.py": ("tests/supervisor/test_rollout.py",),
    "l40sd/workers/lifecycle.py": ("tests/workers/test_lifecycle.py",),
    "l40sd/workers/restart_policy.py": ("tests/workers/test_restart_policy.py",),
    "l40sd/workers/failures.py": ("tests/workers/test_failures.py",),
    "l40sd/workers/beginning.py": ("tests/workers/test_beginning.py",),
    "l40sd/workers/startup.py": ("tests/workers/test_startup.py",),
    "l40sd/workers/health.py": ("tests/workers/test_health.py",),
    "l40sd/workers/fitness.py": ("tests/workers/test_fitness.py",),
    "l40sd/proxy/retry_policy.py": ("tests/proxy/test_retry_policy.py",),
    "l40sd/proxy/poison.py": ("tests/proxy/test_retry_policy.py",),
    "l40sd/placement/place.py": ("tests/placement/test_place.py",),
    "l40sd/placement/patterns.py": ("tests/placement/test_patterns.py",),
    "l40sd/placement/pcie_tree.py": ("tests/placement/test_pcie_tree.py",),
    "l40sd/placement/parallelism.py": ("tests/placement/test_pcie_tree.py",),
    "l40sd/placement/optimum.py": ("tests/placement/test_place.py",),
    "l40sd/placement/candidates.py": ("tests/placement/test_pcie_tree.py", "tests/placement/test_place.py"),
    "l40sd/placement/stability.py": ("tests/placement/test_place.py",),
    "l40sd/placement/pinning.py": ("tests/placement/test_pinning.py",),
    "l40sd/routing/balancer.py": ("tests/routing/test_balancer.py",),
    "l40sd/routing/outliers.py": ("tests/routing/test_outliers.py",),
}
"""Path of a module -> its own test files, the quickest to notice first."""


@dataclass(frozen=True, slots=True)
class Same:
    """A change that no test can notice, by the text of its line (however spaced), and why not."""

    path: str
    before: str
    after: str
    why: str


_RESTART = "l40sd/workers/restart_policy.py"
_STARTUP = "l40sd/workers/startup.py"
_TREE = "l40sd/placement/pcie_tree.py"
_ONE = "the first of one is the last"
_PORT = "PORT = 0  # the health probe is refused"
_TEXT = 'text = mends.get(result.status or 0, "")'
_POWER = "return min(limit_s, first_s * 2.0 ** min(times, 30))"
_LOADS = "return max(deadline_s, 2 * max(past_loads_s, default=0.0))"

SAME: tuple[Same, ...] = (
    *(
        Same(
            _RESTART, _POWER, _POWER.replace("30", number), "it keeps the power from an overflow; limits are far below"
        )
        for number in ("29", "31")
    ),
    Same("l40sd/supervisor/reconcile.py", "break", "continue", "what ended the round holds for the sets to come, too"),
    Same(
        "l40sd/workers/health.py", "self._canary_moved = False", "self._canary_moved = True", "asking for one sets it"
    ),
    Same(_TREE, "return parts[0]", "return parts[ -1]", _ONE),
    Same(_TREE, "return members[0]", "return members[ -1]", _ONE),
    Same(_TREE, "return left[0] if left else None", "return left[ -1] if left else None", _ONE),
    Same(
        _TREE,
        "for level in list(Link)[1:]:",
        "for level in list(Link)[ 0:]:",
        "no link between two is that of one to itself",
    ),
    Same(_STARTUP, _LOADS, _LOADS.replace("0.0", " -1.0"), "no deadline is below 0"),
    Same(_STARTUP, _PORT, _PORT.replace("0", " -1"), "only the order of the stages counts"),
    Same(_STARTUP, "READY = 4", "READY =  5", "only the order of the stages counts"),
    Same(_STARTUP, _TEXT, _TEXT.replace("0", " 1"), "no status either"),
    Same(_STARTUP, _TEXT, _TEXT.replace("0", " -1"), "no status either"),
)
