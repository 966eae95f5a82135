"""The backends of the ops, one file each: ``cpu``, ``cuda``, ``triton``. Each ends with what it offers to which op."""
