"""What ``kvbm bench`` runs; results and scripts that measure peers live in ``benchmarks/``."""
