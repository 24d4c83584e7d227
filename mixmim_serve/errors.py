"""Every error that the project raises on purpose.

    MixMIMError                    the caller can act on it; the message is one sentence: what, expected, what to do
    ├── ConfigError                an architecture, recipe or option that cannot work
    ├── CheckpointError            a file that is no checkpoint of ours, or not one that can be imported
    ├── BundleError                a bundle folder that is missing, incomplete or altered
    ├── EngineError                a runtime that is not installed, or that refuses the bundle
    ├── DataError                  a data set with nothing usable in it
    ├── OutputError                a folder of results that cannot be written to, or belongs to another run
    ├── NonFiniteError             a training step whose gradients are not finite
    └── ImageError                 one bad image; never the fault of the images beside it
        ├── UnsupportedImageError  bytes that are no image of an accepted format
        ├── ImageTooLargeError     more bytes or pixels than the limit
        └── UndecodableImageError  an accepted format, but the content is damaged

The command line prints the message and exits with 1. The service answers with `ImageError.status`.
"""


class MixMIMError(Exception):
    """Base of all errors below; `str(error)` is one sentence for a person."""


class ConfigError(MixMIMError):
    """A configuration that cannot work, found when it is built."""


class CheckpointError(MixMIMError):
    """A checkpoint that cannot be read, recognised or matched to a model."""


class BundleError(MixMIMError):
    """A bundle folder that is missing, incomplete, altered or of another version."""


class EngineError(MixMIMError):
    """A runtime that is not installed or cannot run the bundle."""


class DataError(MixMIMError):
    """A source of images with nothing usable in it."""


class OutputError(MixMIMError):
    """A folder of results that cannot be written to, is in use, or was made from something else."""


class NonFiniteError(MixMIMError):
    """A training step whose loss or gradients are not finite."""


class ImageError(MixMIMError):
    """One image that is refused; `status` is the HTTP status that says so."""

    status = 422


class UnsupportedImageError(ImageError):
    """Bytes that are not an image of an accepted format."""

    status = 415


class ImageTooLargeError(ImageError):
    """An image with more bytes or pixels than the limit."""

    status = 413


class UndecodableImageError(ImageError):
    """An image of an accepted format whose content is empty, truncated or damaged."""

    status = 422
