"""Benchmark of fcos_d2 against other FCOS implementations: ``python tools/benchmark``."""
