"""The OpenAPI document tells the truth: what it allows is answered as it says, what it forbids is refused.

schemathesis draws requests from the document and checks each answer against it. Its pytest plugin is not used: it
would make every run of the suite a second slower.
"""

from __future__ import annotations

import contextlib
import json
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from anomalies import calibrated_bundle, normal_photos  # noqa: F401 - fixtures
from conftest import REPOSITORY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from serving import HAT, MODEL, PATIENCE, SHOES, Starlette, app_of

from mixmim_serve.engines import open_engine
from mixmim_serve.service.app import ENDPOINTS, create_app
from mixmim_serve.service.openapi.document import document
from mixmim_serve.service.openapi.purposes import PURPOSES
from mixmim_serve.service.routes.about import DOCS_ASSETS

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import schemathesis
    from schemathesis import Case, GenerationMode
    from schemathesis.specs.openapi.checks import negative_data_rejection

COMMITTED = REPOSITORY / "docs" / "openapi.json"
REGENERATE = (
    'python -c "import json; from mixmim_serve.service.app import ENDPOINTS; '
    "from mixmim_serve.service.openapi.document import document; "
    'print(json.dumps(document(ENDPOINTS), indent=2))" > docs/openapi.json'
)
EXAMPLES = 12  # requests for each route, as many again that break the document's rules
OPERATIONS = [(method.upper(), path) for path, item in document(ENDPOINTS)["paths"].items() for method in item]
# What depends on the model, so that the document cannot say it, and what does in the test model; deadlines that could
# pass have tests of their own.
KNOWN: dict[str, tuple[Callable[[Any], bool], Any]] = {
    "top": (lambda value: type(value) is int and value > 3, 3),
    "ratio": (lambda value: type(value) in (int, float) and 0 <= value <= 1, 0.5),
    "head": (lambda value: type(value) is str, "main"),
    "dimensions": (lambda value: type(value) is int, 64),
    "model": (lambda value: type(value) is str, MODEL),
    "X-Request-Timeout": (lambda value: _is_number(value) and 0 < float(value) < PATIENCE, str(PATIENCE)),
}


def _is_number(text: str) -> bool:
    with contextlib.suppress(ValueError):
        return math.isfinite(float(text))
    return False


def test_the_committed_document_is_the_served_one() -> None:
    assert COMMITTED.read_text() == json.dumps(document(ENDPOINTS), indent=2) + "\n", f"run: {REGENERATE}"


def test_every_route_is_documented_and_every_documented_route_is_there() -> None:
    found = set()
    for route in create_app().routes:
        methods = getattr(route, "methods", None) or {"POST"}  # /embed/stream is an app of its own
        path = route.path.replace(":path}", "}")  # type: ignore[attr-defined]
        found |= {(method, path) for method in methods - {"HEAD"}}
    assert found - {("GET", path) for path in ("/", *DOCS_ASSETS)} == set(OPERATIONS)


def test_routes_are_grouped_by_purpose_and_described() -> None:
    shown = document(ENDPOINTS)
    groups = {tag["name"]: tag["description"] for tag in shown["tags"]}
    assert [*groups] == ["Images", "OpenAI clients", "Jobs", "Model", "Operations", "Documentation"]
    operations = {
        (method.upper(), path): each for path, item in shown["paths"].items() for method, each in item.items()
    }
    for operation in operations.values():
        assert [tag in groups for tag in operation["tags"]] == [True]
        assert operation["description"].endswith(".")
        assert operation["description"] != operation["summary"]
    assert {each["tags"][0] for each in operations.values()} == {*groups}
    assert PURPOSES.keys() == operations.keys()
    for path in ("/livez", "/healthz", "/readyz", "/metrics"):
        assert operations["GET", path]["tags"] == ["Operations"]


def test_the_examples_keep_to_their_own_schemas() -> None:
    validators = pytest.importorskip("jsonschema_rs")
    components = {"components": document(ENDPOINTS)["components"]}
    checked = 0
    for item in document(ENDPOINTS)["paths"].values():
        for operation in item.values():
            answers = [each.get("content", {}) for each in operation["responses"].values()]
            contents = [operation.get("requestBody", {}).get("content", {}), *answers]
            for media in [media for content in contents for media in content.values()]:
                examples = [each["value"] for each in media.get("examples", {}).values()]
                for example in examples + ([media["example"]] if "example" in media else []):
                    validators.validate(media["schema"] | components, example)
                    checked += 1
    assert checked >= 12


@pytest.fixture(scope="module")
def app(calibrated_bundle: Path) -> Iterator[Starlette]:  # noqa: F811
    """The app over a small model."""
    app = app_of(open_engine(calibrated_bundle, "onnx", threads=1))
    yield app
    app.state.runtime.close()


@pytest.fixture(scope="module")
def schema(app: Starlette) -> Any:
    """The document as the app serves it; bodies that JSON schema cannot describe are photos, and bytes of all kinds."""
    lines = json.dumps({"input": "AAAA"}).encode()
    schemathesis.openapi.media_type("image/*", st.sampled_from([HAT, SHOES, HAT[:900]]) | st.binary(max_size=64))
    schemathesis.openapi.media_type("application/x-ndjson", st.just(lines) | st.binary(max_size=64))
    found = schemathesis.openapi.from_asgi("/openapi.json", app)
    checks = found.config.checks
    # Never 400: what keeps to the document may be no image, but it is not malformed.
    checks.positive_data_acceptance.expected_statuses = ["2xx", "404", "413", "415", "422"]
    checks.negative_data_rejection.expected_statuses = ["400", "404", "405", "406", "413", "415", "422"]

    def fit(context: Any, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        return {name: KNOWN[name][1] if name in KNOWN and KNOWN[name][0](value) else value
                for name, value in values.items()}  # fmt: skip

    for part in ("query", "headers", "body"):
        found.hook(f"map_{part}")(fit)
    return found


def conforms(schema: Any, method: str, path: str, mode: GenerationMode) -> None:
    """Send what the document describes, or breaks it, and compare each answer with it."""

    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=[*HealthCheck]
    )
    @given(schema[path][method].as_strategy(mode))
    def check(case: Case) -> None:
        response = case.call()
        begun = path == "/embed/stream" and b'"broken_off"' in response.content  # 200 was sent before its body was read
        case.validate_response(response, excluded_checks=[negative_data_rejection] if begun else [])

    check()


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_what_the_document_allows_is_answered_as_it_says(schema: Any, method: str, path: str) -> None:
    conforms(schema, method, path, GenerationMode.POSITIVE)


@pytest.mark.parametrize(("method", "path"), [each for each in OPERATIONS if each[0] == "POST"])
def test_what_the_document_forbids_is_refused(schema: Any, method: str, path: str) -> None:
    conforms(schema, method, path, GenerationMode.NEGATIVE)
