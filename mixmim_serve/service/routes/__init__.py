"""The routes, by theme. Each reads the request, lets the engine room work, and writes the answer."""
