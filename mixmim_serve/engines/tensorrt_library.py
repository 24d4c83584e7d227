"""TensorRT's Python module, for those who build engines and those who run them.

`tensorrt` and `tensorrt-rtx` (TensorRT for RTX, complete on PyPI) have one API and share all code.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

from mixmim_serve.engines.hardware import first_line
from mixmim_serve.errors import EngineError

MODULES = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}


def load(runtime: str) -> ModuleType:
    """The module.

    Raises:
        EngineError: when it is not installed.
    """
    try:
        return importlib.import_module(MODULES[runtime])
    except ImportError as error:
        raise EngineError(f"{runtime} is not installed: run pip install 'mixmim-serve[{runtime}]'.") from error


@functools.cache  # TensorRT keeps the first logger that it is given for as long as the process lives
def logger(trt: ModuleType) -> Any:
    """Collects `errors`; `reason()` is the first of them as a sentence."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Keeps the errors, which TensorRT prints instead of raising."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

        def reason(self) -> str:
            return first_line(self.errors[0]) if self.errors else "it gave no reason"

    return Log()
