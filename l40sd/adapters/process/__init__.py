"""Workers as processes: start their shims, watch them through pidfds, kill them whole, find them again."""

from l40sd.adapters.process.instance import Instance
from l40sd.adapters.process.logs import Position
from l40sd.adapters.process.processes import Adoption, Processes
from l40sd.adapters.process.records import ExitRecord, InstanceSpec

__all__ = ["Adoption", "ExitRecord", "Instance", "InstanceSpec", "Position", "Processes"]
