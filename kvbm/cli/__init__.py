"""The ``kvbm`` command, one command group a file."""
