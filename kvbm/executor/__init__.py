"""The half that moves bytes: an executor runs the jobs of one rank on its storages and answers for every block."""

from kvbm.executor.executor import Executor

__all__ = ["Executor"]
