"""HTTP in, engine out: an ASGI app, served by uvicorn or inside a BentoML service."""
