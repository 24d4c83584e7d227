"""Many images to features, in order, decoding ahead of the engine."""
