"""Cython twins of ``kvbm._pure``: store, hashing, copies; and disk_io, which has no pure twin.

``kvbm._backend`` is the only module that imports from here; it loads the three or none of them, and disk_io where it
is there.
"""
