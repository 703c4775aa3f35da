"""Cython twins of ``kvbm._pure``: store, hashing, copies.

``kvbm._backend`` is the only module that imports from here; it loads all of them or none.
"""
