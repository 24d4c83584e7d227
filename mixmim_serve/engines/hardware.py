"""Names and capabilities of this machine's CPU and GPU."""

from __future__ import annotations

import ctypes
import functools
import platform
from pathlib import Path

_CAPABILITY_MAJOR, _CAPABILITY_MINOR = 75, 76  # CUdevice_attribute, CUDA driver API


@functools.cache
def processor() -> str:
    """Model name of the CPU and its best matrix instructions, such as "AMD EPYC (avx512_bf16)"."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
                break
    except OSError:
        pass  # not Linux
    supported = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
    return f"{name} ({supported[-1]})" if supported else name


@functools.cache
def has_cuda_device() -> bool:
    """Whether the CUDA driver finds a GPU; CUDA packages install on machines without one too."""
    try:
        driver = _driver()
        count = ctypes.c_int(0)
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0
    except OSError:
        return False


@functools.cache
def gpu() -> str:
    """Compute capability of the first CUDA device, such as "sm90"; empty without one."""
    if not has_cuda_device():
        return ""
    driver = _driver()
    device, major, minor = _first_device(), ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(major), _CAPABILITY_MAJOR, device)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), _CAPABILITY_MINOR, device)
    return f"sm{major.value}{minor.value}"


@functools.cache
def gpu_name() -> str:
    """Name and compute capability of the first CUDA device, such as "NVIDIA L4 (sm89)"; empty without one."""
    if not has_cuda_device():
        return ""
    name = ctypes.create_string_buffer(256)
    _driver().cuDeviceGetName(name, len(name), _first_device())
    return f"{name.value.decode(errors='replace')} ({gpu()})"


def gpu_memory_used() -> float | None:
    """MB of the first CUDA device's memory that all processes use; None if NVML cannot tell."""
    try:
        import pynvml
    except ImportError:
        return None
    if not has_cuda_device():
        return None
    try:
        address = ctypes.create_string_buffer(32)
        _driver().cuDeviceGetPCIBusId(address, len(address), _first_device())
        pynvml.nvmlInit()
        # NVML numbers all GPUs, CUDA only those in CUDA_VISIBLE_DEVICES: the bus address identifies a GPU in both.
        handle = pynvml.nvmlDeviceGetHandleByPciBusId(address.value)
        return float(pynvml.nvmlDeviceGetMemoryInfo(handle).used) / 1e6
    except pynvml.NVMLError:
        return None


def _first_device() -> ctypes.c_int:
    device = ctypes.c_int()
    _driver().cuDeviceGet(ctypes.byref(device), 0)
    return device


def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if platform.system() == "Windows" else "libcuda.so.1")


def first_line(error: Exception | str) -> str:
    """The first line of a runtime's error report."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
