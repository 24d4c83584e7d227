"""The routes by theme: each reads a request, has the runtime do the work, and writes the response."""
