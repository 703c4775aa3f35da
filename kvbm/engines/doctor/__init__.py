"""What ``kvbm doctor`` looks at before an engine is started: one subject a file, each giving findings.

Nothing here imports an engine. What can hang or die, an engine and the tiers' own I/O, runs in a child process.
"""
