"""Options in the query string, each declared once: `read` gives a request's value, `parameter` documents it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from starlette.requests import Request

from mixmim_serve.bundle import STAGE_OUTPUTS
from mixmim_serve.errors import quoted
from mixmim_serve.service.errors import RequestError
from mixmim_serve.service.jobs.store import STATES

Json = dict[str, Any]
NumberType = TypeVar("NumberType", int, float)


@dataclass(frozen=True)
class Option(ABC):
    """What all options have."""

    name: str
    description: str

    @abstractmethod
    def schema(self) -> Json:
        """The JSON schema of the values it takes."""

    def parameter(self) -> Json:
        """The option in the OpenAPI document."""
        return {"name": self.name, "in": "query", "description": self.description, "schema": self.schema()}

    def refuse(self, expected: str, text: str) -> RequestError:
        """The error for a value that the option does not take."""
        return RequestError(400, "bad_option", f"{self.name} must be {expected}, got {quoted(text)}.", self.name)


@dataclass(frozen=True)
class Number(Option, Generic[NumberType]):
    """A number of the type of its default, within bounds; a `maximum` of None depends on the model."""

    default: NumberType
    minimum: NumberType
    maximum: NumberType | None = None

    def schema(self) -> Json:
        """The JSON schema of the values it takes."""
        bounds: Json = {"minimum": self.minimum}
        if self.maximum is not None:
            bounds["maximum"] = self.maximum
        kind = "integer" if isinstance(self.default, int) else "number"
        return {"type": kind, **bounds, "default": self.default}

    def read(self, request: Request, maximum: NumberType | None = None) -> NumberType:
        """The value of a request.

        Raises:
            RequestError: 400 for what is not such a number or out of range.
        """
        text = request.query_params.get(self.name)
        if text is None:
            return self.default
        highest = self.maximum if maximum is None else maximum
        try:
            value = type(self.default)(text)
        except ValueError:
            value = None
        if value is None or not self.minimum <= value or (highest is not None and not value <= highest):
            kind = "a whole number" if isinstance(self.default, int) else "a number"
            raise self.refuse(f"{kind} from {self.minimum} to {highest}", text)
        return value


@dataclass(frozen=True)
class Choice(Option):
    """One of several words, the first unless told otherwise."""

    choices: tuple[str, ...]

    def schema(self) -> Json:
        """The JSON schema of the values it takes."""
        return {"enum": list(self.choices), "default": self.choices[0]}

    def read(self, request: Request) -> str:
        """The value of a request.

        Raises:
            RequestError: 400 for another word.
        """
        text = request.query_params.get(self.name, self.choices[0])
        if text not in self.choices:
            raise self.refuse(f"one of {', '.join(self.choices)}", text)
        return text


@dataclass(frozen=True)
class Switch(Option):
    """`true` or `false`; off unless told otherwise."""

    def schema(self) -> Json:
        """The JSON schema of the values it takes."""
        return {"type": "boolean", "default": False}

    def read(self, request: Request) -> bool:
        """The value of a request.

        Raises:
            RequestError: 400 for anything but `true` and `false`.
        """
        text = request.query_params.get(self.name, "false")
        if text not in ("true", "false"):
            raise self.refuse("one of true, false", text)
        return text == "true"


@dataclass(frozen=True)
class Words(Option):
    """Words between commas, each counted once; all of them where there is no default."""

    choices: tuple[str, ...]
    default: str | None = None

    def schema(self) -> Json:
        """The JSON schema of the values it takes."""
        word = f"({'|'.join(self.choices)})"
        schema = {"type": "string", "pattern": f"^{word}(,{word})*$"}
        return schema if self.default is None else schema | {"default": self.default}

    def read(self, request: Request) -> tuple[str, ...]:
        """The value of a request.

        Raises:
            RequestError: 400 for a word that is not among the choices.
        """
        default = ",".join(self.choices) if self.default is None else self.default
        words = tuple(dict.fromkeys(request.query_params.get(self.name, default).split(",")))
        for word in words:
            if word not in self.choices:
                raise self.refuse(f"of {', '.join(self.choices)}", word)
        return words


@dataclass(frozen=True)
class Text(Option):
    """Any text."""

    required: bool = False

    def schema(self) -> Json:
        """The JSON schema of the values it takes."""
        return {"type": "string"}

    def parameter(self) -> Json:
        """The option in the OpenAPI document."""
        return super().parameter() | ({"required": True} if self.required else {})

    def read(self, request: Request) -> str:
        """The value of a request; empty where there is none."""
        return request.query_params.get(self.name, "")


NORMALIZE = Switch("normalize", "Scale each vector to length 1.")
DTYPE = Choice("dtype", "Type of the floats in the result.", ("float32", "float16"))
HEAD = Text("head", "Name of a classification head of this model, as /model lists them; the default one without.")
TOP = Number("top", "Number of classes, at most all of them.", default=5, minimum=1)
STAGES = Words(
    "stages", f"One or more of {', '.join(STAGE_OUTPUTS)}, separated by commas.", tuple(STAGE_OUTPUTS), "stage4"
)
LAYOUT = Choice("layout", "Shape per image: map is (D, H, W), tokens is (H * W, D).", ("map", "tokens"))
MASKS = Number("masks", "Number of mask pairs; each covers every unit once.", default=2, minimum=1, maximum=16)
WITH_MAP = Switch("map", "Add the error of each unit of 32 x 32 pixels.")
WITH_PLACES = Switch("map", "Add the distance of each place from normal ones, rows of columns.")
OVERLAY = Switch("overlay", "Add the image with its unusual places coloured, as a PNG data URI; JSON only.")
SEED = Number("seed", "Seed of the random mask.", default=0, minimum=0, maximum=2**32 - 1)
RATIO = Number[float](
    "ratio", "Share of units that image B covers; at least one unit, and not all.", default=0.5, minimum=0, maximum=1
)

JOB_ID = Text("id", "Id of the job.", required=True)
SHOWN_JOB_ID = Text("id", "Id of one job, shown with its files; without it all jobs, the newest first.")
JOB_STATES = Words("state", "List only jobs in these states, separated by commas.", STATES)
JOB_LIMIT = Number("limit", "Maximum number of jobs in the list.", default=100, minimum=1, maximum=1000)
RETRY_FAILED = Switch("retry_failed", "Afterwards, try images that could not be read again.")
FILE_NAME = Text("name", "Name of the file, as the job lists it.", required=True)
