"""Bundles into BentoML's model store, and to and from the Hugging Face hub."""
