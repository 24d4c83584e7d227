"""Export: a checkpoint becomes a verified bundle."""
