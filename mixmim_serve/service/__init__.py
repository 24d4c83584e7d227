"""HTTP in, engine out: an ASGI app of our own, mounted in a BentoML service."""
