"""Write a model for other runtimes: as a plain checkpoint, or as a graph that needs neither torch nor this package."""

from slicegpt_fast.export.graph import Runtime, check_runtime, export_graph
from slicegpt_fast.export.plain import export_plain

__all__ = ["Runtime", "check_runtime", "export_graph", "export_plain"]
