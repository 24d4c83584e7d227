"""TensorRT's Python module, for compiling and running engines.

`tensorrt` and `tensorrt-rtx` (TensorRT for RTX, complete on PyPI) have the same API and share all code.
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
    """Import the module of a runtime.

    Raises:
        EngineError: when it is not installed.
    """
    try:
        return importlib.import_module(MODULES[runtime])
    except ImportError as error:
        raise EngineError(f"{runtime} is not installed: run pip install 'mixmim-serve[{runtime}]'.") from error


@functools.cache  # TensorRT keeps the first logger for the life of the process
def logger(trt: ModuleType) -> Any:
    """A logger that collects `errors`; `reason()` returns the first line of the first one."""

    class Log(trt.ILogger):  # type: ignore[misc, name-defined]
        """Collects the errors, which TensorRT logs instead of raising."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR:
                self.errors.append(message)

        def reason(self) -> str:
            return first_line(self.errors[0]) if self.errors else "it gave no reason"

    return Log()
