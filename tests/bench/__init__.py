"""Benchmarks against other loaders, run by hand: `python -m tests.bench.data`. pytest runs none of them."""
