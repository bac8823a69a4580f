"""`torch.export` programs: `.pt2` files, and ExportedProgram objects.

The file's own description of the graph (JSON, versioned by torch) is read directly. `torch.export.load` would
unpickle, evaluate text as Python, and import a compiler for 1.4 s; of all it makes, nothing more would be used.
"""

from curvature_engine.formats.export.front import Export

__all__ = ["Export"]
