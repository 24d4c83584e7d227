"""Explore features: nearest neighbours, near-duplicates, a map, and HTML pages that show them."""
