"""Workers as processes: start their shims, watch them through pidfds, kill them whole, find them again."""

from l40sd.workers.process.instance import Instance
from l40sd.workers.process.logs import Position
from l40sd.workers.process.manager import Adoption, Processes
from l40sd.workers.process.records import ExitRecord, InstanceSpec

__all__ = ["Adoption", "ExitRecord", "Instance", "InstanceSpec", "Position", "Processes"]
