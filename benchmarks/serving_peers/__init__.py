"""Baselines of benchmarks/serve.py: the same engine and preprocessing behind other servers.

Each is configured as its manual recommends for many small requests, and started by `benchmarks/serve.py`.
"""
