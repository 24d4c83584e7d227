"""Every error that the project raises on purpose.

    MixMIMError                    the caller can act on it; one sentence says what, expected, what to do
    ├── ConfigError                an architecture, recipe or option that cannot work
    ├── CheckpointError            a file that is not a mixmim checkpoint and cannot be imported
    ├── BundleError                a bundle folder that is missing, incomplete or altered
    ├── HubError                   a repository that does not exist or cannot be reached
    ├── EngineError                a runtime that is not installed, or that refuses the bundle
    ├── DataError                  a data set without usable images
    │   └── OutsideError           a place outside the roots of a process that reads for others
    ├── OutputError                an output folder that cannot be written to or belongs to another run
    │   └── InUseError             another process holds its lock
    ├── NonFiniteError             a training step whose gradients are not finite
    ├── ResourceError              a training run that needs more memory than there is
    ├── ImageError                 one bad image; the rest of its batch is unaffected
    │   ├── UnsupportedImageError  not an image of an accepted format
    │   ├── ImageTooLargeError     more bytes or pixels than the limit
    │   └── UndecodableImageError  an accepted format, but empty, truncated or damaged
    └── ServerError                raised by the client: the server failed on a request
        ├── RefusedError           the request is wrong: its API key, options, route or size
        ├── UnavailableError       no answer in time, or only refusals such as 429 and 503
        └── ModelChangedError      the model changed between two requests

The command line prints the message and exits with 1. The service responds with an `ImageError`'s `status` and `code`.
"""

import reprlib

MAX_QUOTED = 200  # characters of what a client sent, in the message it gets back

_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = MAX_QUOTED
_REPR.maxlevel = 3


class MixMIMError(Exception):
    """Base class; `str(error)` is one sentence for the user."""


class ConfigError(MixMIMError):
    """An invalid configuration, detected when it is built."""


class CheckpointError(MixMIMError):
    """A checkpoint that cannot be read, recognised or matched to a model."""


class BundleError(MixMIMError):
    """A bundle folder that is missing, incomplete, altered or of another version."""


class HubError(MixMIMError):
    """A model repository that does not exist, or cannot be read, written or reached."""


class EngineError(MixMIMError):
    """A runtime that is not installed or cannot run the bundle."""


class DataError(MixMIMError):
    """A source without usable images."""


class OutsideError(DataError):
    """A place outside the roots of a process that reads for others; the message does not name it."""


class OutputError(MixMIMError):
    """An output folder that cannot be written to, is in use, or was written from other inputs."""


class InUseError(OutputError):
    """A folder whose lock another process holds."""


class NonFiniteError(MixMIMError):
    """A training step whose loss or gradients are not finite."""


class ResourceError(MixMIMError):
    """A training run that needs more memory than the machine has."""


class ImageError(MixMIMError):
    """One rejected image; `status` is the HTTP status and `code` the error code of the response.

    `param` names the image within a request of several, such as `input[3]`.
    """

    status = 422
    code = "bad_image"
    param: str | None = None


class UnsupportedImageError(ImageError):
    """Bytes that are not an image of an accepted format."""

    status = 415
    code = "unsupported_image"


class ImageTooLargeError(ImageError):
    """An image with more bytes or pixels than the limit."""

    status = 413
    code = "image_too_large"


class UndecodableImageError(ImageError):
    """An image of an accepted format whose content is empty, truncated or damaged."""

    status = 422
    code = "undecodable_image"


class ServerError(MixMIMError):
    """An error response: `status`, `code` and `param` as the server sent them, and the ID of the request."""

    def __init__(
        self,
        message: str,
        status: int | None = None,
        code: str | None = None,
        param: str | None = None,
        request: str | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.code, self.param, self.request = status, code, param, request


class RefusedError(ServerError):
    """A request that fails however often it is retried: its API key, options, route or size are wrong."""


class UnavailableError(ServerError):
    """A server that was unreachable, busy, starting or too slow until time or retries ran out."""


class ModelChangedError(ServerError):
    """A response from a different model than the responses before it."""


def quoted(value: object) -> str:
    """`repr` of what a client sent, cut at `MAX_QUOTED` characters; neither its size nor its depth costs anything."""
    text = _REPR.repr(value)
    return text if len(text) <= MAX_QUOTED else f"{text[: MAX_QUOTED - 3]}..."
