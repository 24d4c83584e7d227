"""Import this before torch: OpenMP's waiting threads then sleep, as in the training commands, unless the user decided.

It must be the first import of a script, set apart by `# isort: split`.
"""

from __future__ import annotations

from mixmim_serve.cli.environment import prepare_training

prepare_training()
