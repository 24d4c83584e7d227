"""Publish bundles: to BentoML's model store, and to and from the Hugging Face Hub."""
