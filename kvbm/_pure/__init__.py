"""Reference twins in plain Python: containers, store, hashing, copies.

The same class and function names as ``kvbm._native``, the same results and the same error texts, written to be read
first. ``kvbm._backend`` is the only module that imports from here.
"""
