"""What benchmarks/serve.py is compared with: the same engine and preprocessing behind other servers.

Each is configured as its manual advises for many small requests, and started by `benchmarks/serve.py`.
"""
