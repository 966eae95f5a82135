"""The ops: one file each, with the reference formulation that every kernel is held to."""
