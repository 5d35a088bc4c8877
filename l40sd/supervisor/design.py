"""How a pattern becomes something to want: placed on this host, every launch built; nothing is changed."""

from collections.abc import Sequence

from l40sd.config.options import Config
from l40sd.errors import L40sError
from l40sd.model import Layout, Placement
from l40sd.placement.patterns import find_pattern, patterns_of
from l40sd.placement.place import part_of, place
from l40sd.supervisor.change import Want
from l40sd.supervisor.worker_set import WorkerSet
from l40sd.workers.context import WorkerContext
from l40sd.workers.run_spec import launch_of
from l40sd.workers.slot import Wanted


class Designer:
    """Reads the host, the models' facts and the workers as they are at each question; owns nothing."""

    def __init__(self, context: WorkerContext, workers: WorkerSet) -> None:
        self._context = context
        self._workers = workers

    def design(
        self, pattern_name: str, config: Config, *, force: bool = False, current: Sequence[Placement] | None = None
    ) -> Want:
        """Return the pattern placed on this host, whole and checked; changes nothing (invariant 6).

        Args:
            current: Where things are, for the placement to move as little as possible; by default the workers'.

        Raises:
            L40sError: No such pattern (hint: the nearest known one), or it does not fit.
        """
        inventory = self._context.host.inventory
        layout = place(
            find_pattern(pattern_name, patterns_of(config, inventory)),
            config,
            inventory,
            facts=self._context.models.facts,
            current=self._workers.placements() if current is None else current,
            force=force,
            unusable=self._workers.unusable(),
        )
        return self.want_of(layout, config, force=force)

    def want_of(self, layout: Layout, config: Config, *, force: bool = False) -> Want:
        """Return a want with every launch's fingerprint; a launch that cannot be built is refused here.

        Raises:
            L40sError: An engine, a placeholder or a parallelism that the engine cannot run.
        """
        launches = [launch_of(p, config, self._context) for p in layout.placements]
        pairs = zip(layout.placements, launches, strict=True)
        wanted = tuple(Wanted(placement=p, fingerprint=launch.fingerprint) for p, launch in pairs)
        return Want(layout=layout, config=config, force=force, wanted=wanted)

    def left_of(self, pattern: str, former: Sequence[Placement], config: Config, why: L40sError) -> tuple[Want, str]:
        """Return what can still be wanted of a pattern that does not fit any more, and a sentence on it.

        Raises:
            L40sError: A launch that cannot be built.
        """
        want = self.want_of(part_of(pattern, former, config, self._context.host.inventory), config)
        count = len(want.wanted)
        self._context.log.error("pattern.degraded", pattern=pattern, reason=str(why), workers=count)
        rest = "what is left of it runs" if count else "nothing of it can run"
        return want, f"pattern {pattern} does not fit this host as it is, {rest}: {why.what}"
