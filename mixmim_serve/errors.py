"""Every error that the project raises on purpose.

    MixMIMError                    the caller can act on it; the message is one sentence: what, expected, what to do
    ├── ConfigError                an architecture, recipe or option that cannot work
    ├── CheckpointError            a file that is no checkpoint of ours, or not one that can be imported
    ├── BundleError                a bundle folder that is missing, incomplete or altered
    ├── HubError                   a repository that does not exist or cannot be reached
    ├── EngineError                a runtime that is not installed, or that refuses the bundle
    ├── DataError                  a data set with nothing usable in it
    ├── OutputError                a folder of results that cannot be written to, or belongs to another run
    │   └── InUseError             another run is writing to it now
    ├── NonFiniteError             a training step whose gradients are not finite
    ├── ResourceError              a machine with too little memory for a run
    ├── ImageError                 one bad image; never the fault of the images beside it
    │   ├── UnsupportedImageError  bytes that are no image of an accepted format
    │   ├── ImageTooLargeError     more bytes or pixels than the limit
    │   └── UndecodableImageError  an accepted format, but the content is damaged
    └── ServerError                what the client of a server met; the server failed on the request
        ├── RefusedError           the request is wrong: its key, an option, the route, its size
        ├── UnavailableError       no answer in time, or only "come back later", however often it was asked
        └── ModelChangedError      another model answers than a moment ago

The command line prints the message and exits with 1. The service answers with an `ImageError`'s
`status` and `code`.
"""


class MixMIMError(Exception):
    """Base of all errors below; `str(error)` is one sentence for a person."""


class ConfigError(MixMIMError):
    """A configuration that cannot work, found when it is built."""


class CheckpointError(MixMIMError):
    """A checkpoint that cannot be read, recognised or matched to a model."""


class BundleError(MixMIMError):
    """A bundle folder that is missing, incomplete, altered or of another version."""


class HubError(MixMIMError):
    """A repository of models that does not exist, or cannot be read, written or reached."""


class EngineError(MixMIMError):
    """A runtime that is not installed or cannot run the bundle."""


class DataError(MixMIMError):
    """A source of images with nothing usable in it."""


class OutputError(MixMIMError):
    """A folder of results that cannot be written to, is in use, or was made from something else."""


class InUseError(OutputError):
    """A folder of results that another run is writing to at this moment."""


class NonFiniteError(MixMIMError):
    """A training step whose loss or gradients are not finite."""


class ResourceError(MixMIMError):
    """A training run that needs more memory than there is."""


class ImageError(MixMIMError):
    """One image that is refused; `status` and `code` are the HTTP status and the word that say so.

    `param` is which image it was, such as `input[3]`, where a request had several.
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
    """A server's answer that is no result: `status`, `code` and `param` as it gave them, and the request's id."""

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
    """A request that no repetition makes right: another key, option, route or size is needed."""


class UnavailableError(ServerError):
    """A server that cannot be reached, or was busy, starting or too slow, until the time or the tries were used up."""


class ModelChangedError(ServerError):
    """An answer of another model than those before it."""
