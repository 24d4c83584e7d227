"""A process that decodes large images, one after another, within limits on CPU time and memory.

The parent writes a line of JSON with the settings, then of each image its length, the sizes to make it, and its bytes;
the process answers each with a kind, a length and bytes: pixels, or an error. It ends when its standard input closes,
and runs at lower priority than the server.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import signal
import struct
import subprocess
import sys
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from mixmim_serve import heif
from mixmim_serve.config import Preprocessing
from mixmim_serve.errors import ImageError, ImageTooLargeError, UndecodableImageError, UnsupportedImageError
from mixmim_serve.preprocess import Pixels, decode, resize_and_crop

NICENESS = 10  # so that small images and the engine come first
CODE = (  # steps back before its imports, which take 0.3 s of CPU time
    f"import os; getattr(os, 'nice', int)({NICENESS}); from mixmim_serve.service.decode_process import main; main()"
)
PIPE_BYTES = 1 << 20
KEPT_BYTES = 80 << 20  # of a process between images, half of it without any
ASKED = struct.Struct("<QII")  # bytes of an image, and the `image_size` and `resize_size` to preprocess it with
HEADER = struct.Struct("<BQ")  # kind and length of an answer
PIXELS = 0
VARIABLES = {
    "OPENBLAS_NUM_THREADS": "1",  # thread pools would count against the limit on memory
    "OMP_NUM_THREADS": "1",
    # Huge pages save a fifth of the time; pieces up to 32 MiB are kept from one image to the next, larger ones are not.
    "GLIBC_TUNABLES": ":".join(
        ("glibc.malloc.hugetlb=1", "glibc.malloc.mmap_threshold=33554432", "glibc.malloc.trim_threshold=33554432")
    ),
}
ERRORS: tuple[type[ImageError], ...] = (ImageError, ImageTooLargeError, UnsupportedImageError, UndecodableImageError)


@dataclass(frozen=True)
class DecodeSettings:
    """Limits of a process, and what it makes of each image."""

    max_bytes: int
    max_pixels: int
    cpu_seconds: float  # per image
    memory_bytes: int  # beyond what the process needs without an image
    preprocessing: Preprocessing

    def to_json(self) -> str:
        """The first line that the process reads."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DecodeSettings:
        """The inverse of `to_json`."""
        values: dict[str, Any] = json.loads(text)
        fields: dict[str, Any] = values.pop("preprocessing")
        fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
        return cls(**values, preprocessing=Preprocessing(**fields))


class DecodeProcess:
    """The parent's side; used from one thread at a time, killed from any."""

    def __init__(self, settings: DecodeSettings) -> None:
        self.settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._killed = False

    @property
    def is_alive(self) -> bool:
        """Whether the process can decode another image."""
        return self._process is not None and self._process.poll() is None and not self._killed

    def decode(self, image: bytes, preprocessing: Preprocessing | None = None) -> Pixels:
        """Decode one image, to other sizes than those of the settings if asked; starts the process with the first.

        Raises:
            ImageError: when the image is refused, or exceeds the limits on CPU time or memory.
        """
        sizes = preprocessing or self.settings.preprocessing
        try:
            process = self._process or self._start()
            stdin, stdout = _pipes(process)
            stdin.write(ASKED.pack(len(image), sizes.image_size, sizes.resize_size))
            stdin.write(image)
            stdin.flush()
            kind, length = HEADER.unpack(_read(stdout, HEADER.size))
            answer = _read(stdout, length)
        except (OSError, EOFError, ValueError) as error:  # ValueError: `kill` has closed the pipes
            self.kill()
            raise self._limit_exceeded() from error
        if kind == PIXELS:
            return np.frombuffer(answer, np.uint8).reshape(sizes.image_size, sizes.image_size, 3)
        raise ERRORS[kind - 1](answer.decode())

    def kill(self) -> None:
        """End the process at once."""
        self._killed = True
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):
                    if pipe:
                        pipe.close()

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(  # noqa: S603 - the command holds nothing from a client
            [sys.executable, "-P", "-c", CODE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)} | VARIABLES,
        )
        self._process = process
        if self._killed:  # while it started
            raise EOFError
        stdin, _ = _pipes(process)
        _widen(stdin)
        stdin.write(self.settings.to_json().encode() + b"\n")
        return process

    def _limit_exceeded(self) -> ImageError:
        limits = f"{self.settings.cpu_seconds:g} s of CPU time or {self.settings.memory_bytes >> 20:,} MiB of memory"
        return UndecodableImageError(f"decoding the image took more than {limits}: send it smaller.")


def _pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes]]:
    assert process.stdin is not None  # noqa: S101 - PIPE
    assert process.stdout is not None  # noqa: S101 - PIPE
    return process.stdin, process.stdout


def _widen(pipe: IO[bytes]) -> None:
    """Let an image pass in fewer pieces than the 64 KiB that a pipe takes by default."""
    with contextlib.suppress(ImportError, AttributeError, OSError):  # not Linux, or more than the system allows
        import fcntl

        fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, PIPE_BYTES)


def _read(stream: IO[bytes], size: int) -> bytes:
    """Exactly `size` bytes.

    Raises:
        EOFError: when the other side is gone.
    """
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


def main() -> None:
    """Decode the images on standard input until it closes."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    settings = DecodeSettings.from_json(sys.stdin.buffer.readline().decode())
    if heif.is_installed():  # its libraries must not count against the limit on memory
        with contextlib.suppress(ImageError):
            heif.load()
    _limit_memory(settings.memory_bytes)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            length, image_size, resize_size = ASKED.unpack(_read(sys.stdin.buffer, ASKED.size))
            image = _read(sys.stdin.buffer, length)
            _allow_cpu_seconds(settings.cpu_seconds)
            sizes = dataclasses.replace(settings.preprocessing, image_size=image_size, resize_size=resize_size)
            kind, answer = _answer(image, dataclasses.replace(settings, preprocessing=sizes))
            _allow_cpu_seconds(0)  # until the next image, for ever
            out.write(HEADER.pack(kind, len(answer)) + answer)
            out.flush()
            _give_memory_back()


def _answer(image: bytes, settings: DecodeSettings) -> tuple[int, bytes]:
    """The kind of an answer, and its bytes."""
    try:
        decoded = decode(image, max_bytes=settings.max_bytes, max_pixels=settings.max_pixels)
        return PIXELS, resize_and_crop(decoded, settings.preprocessing).tobytes()
    except ImageError as error:
        return ERRORS.index(type(error)) + 1, str(error).encode()
    except MemoryError:  # while resizing; `decode` has a sentence of its own for it
        message = f"the image needs more than {settings.memory_bytes >> 20:,} MiB of memory: send a smaller one."
        return ERRORS.index(ImageTooLargeError) + 1, message.encode()


def _limit_memory(beyond: int) -> None:
    """Limit the address space to what is mapped now and so many bytes more."""
    try:
        import resource

        mapped, _ = _memory()
        resource.setrlimit(resource.RLIMIT_AS, (mapped + beyond, mapped + beyond))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, OSError, ValueError):  # not Linux
        pass


def _memory() -> tuple[int, int]:
    """Bytes of this process that are mapped, and that are resident. Linux only: OSError elsewhere."""
    with open("/proc/self/statm") as file:
        mapped, resident = (int(pages) * os.sysconf("SC_PAGESIZE") for pages in file.read().split()[:2])
    return mapped, resident


def _give_memory_back() -> None:
    """Return what glibc keeps for the next image where that is much: some formats leave hundreds of MB in pieces."""
    with contextlib.suppress(OSError, AttributeError):  # not Linux, or not glibc
        if _memory()[1] > KEPT_BYTES:
            ctypes.CDLL(None).malloc_trim(0)


def _allow_cpu_seconds(seconds: float) -> None:
    """End this process with SIGPROF once it has used so many more seconds of CPU time."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)
