"""Judging frozen embeddings on labelled images: k nearest neighbours, a linear probe, and which classes are confused.

Everything here takes tensors, those of one call on one device, and knows neither images nor networks.
"""
