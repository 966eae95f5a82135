"""The backends of the ops, one file each: ``cpu``, ``cuda``, ``triton``."""
