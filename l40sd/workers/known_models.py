"""What is known of the models at present: what their files say, and how long their latest loads took on this host."""

from collections.abc import Mapping, Sequence

from l40sd.model import ModelFacts, ModelName

LOADS_KEPT = 20


class KnownModels:
    """Read by workers and placement; workers add their loads, a reload brings the facts anew.

    Attributes:
        facts: What the models' own files say.
        loads_s: Seconds that each model's latest starts took, oldest first, at most ``LOADS_KEPT``.
    """

    __slots__ = ("facts", "loads_s")

    def __init__(self, facts: Mapping[ModelName, ModelFacts]) -> None:
        self.facts = facts
        self.loads_s: dict[ModelName, list[float]] = {}

    def take(self, facts: Mapping[ModelName, ModelFacts]) -> Mapping[ModelName, ModelFacts]:
        """Go by these facts from now on; return those from before."""
        former, self.facts = self.facts, facts
        return former

    def loads_of(self, model: ModelName) -> Sequence[float]:
        """Return how long this model's latest loads took; empty where none was seen."""
        return self.loads_s.get(model, ())

    def note_load(self, model: ModelName, took_s: float) -> None:
        """Add a load; the oldest goes."""
        loads_s = self.loads_s.setdefault(model, [])
        loads_s.append(took_s)
        del loads_s[:-LOADS_KEPT]
