"""The OpenAPI 3.1 document, from what the endpoints say of themselves."""

from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema, JsonSchemaMode
from starlette.routing import compile_path

from api.endpoints import Answer, Described, Endpoint, Login, Parameter, Schema
from api.replies import JSON
from api.shapes import Document, Message
from wave_proxy import __version__

_REF = "#/components/schemas/{model}"

_ABOUT = """\
Containers for compute clusters, on request: existing images with layers and settings added, and images that are built.
It is the API of Seqera's Wave; what it names is pulled at `/v2/`, as the OCI distribution specification has it.

Members without a value are left out of answers. In requests, unknown members are ignored, null and empty text mean
that a member is absent, a single value stands for an array of one, and digits in a string for a number.

A path that does not exist is answered with 404, a method that a path does not have with 405 and `Allow`, and both with
a document that has `message`, `_embedded` and `_links`.
"""

_PATHS: Mapping[str, Parameter] = {
    "token": Parameter("token", "The token in an image's name: 32 hexadecimal digits.", place="path"),
    "build_id": Parameter(
        "build_id",
        "The id of a build, `bd-<16 hex digits>_<number>`; also without `bd-`, and without the number for the newest.",
        place="path",
    ),
    "mirror_id": Parameter(
        "mirror_id",
        "The id of a mirror, `mr-<16 hex digits>_<number>`; without the number that of the newest.",
        place="path",
    ),
    "scan_id": Parameter(
        "scan_id",
        "The id of a scan, `sc-<16 hex digits>_<number>`; also without `sc-`, and without the number for the newest.",
        place="path",
    ),
}

# What every endpoint may answer besides its own.
_COMMON: Mapping[int, Answer] = {
    405: Answer("Crawlers, by their `User-Agent`, and paths that the operator has closed.", None, may_be_empty=True),
    500: Answer("A bug; the message has the id under which the server's log says more.", Message),
    503: Answer(
        "Something that this needs does not answer, such as the state store; try again.",
        Message,
        headers={"Retry-After": "After how many seconds."},
    ),
}

_Found = Mapping[tuple[Any, JsonSchemaMode], Schema]

_SECURITY: Mapping[Login, list[dict[str, list[str]]]] = {"account": [{"account": []}], "token": [{}, {"token": []}]}
_SCHEMES = {
    "account": {"type": "http", "scheme": "basic", "description": "An account of `[accounts]`."},
    "token": {"type": "http", "scheme": "bearer", "description": "An access token that the operator has issued."},
}


def document(endpoints: Iterable[Described], public_url: str) -> Document:
    """The document of a server that is reached at ``public_url``."""
    told = list(endpoints)
    schemas, definitions = _schemas([one.endpoint for one in told])
    paths: dict[str, dict[str, Any]] = {}
    for one in told:
        paths.setdefault(one.endpoint.path, {})[one.endpoint.method.lower()] = _operation(one, schemas)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "wave-proxy",
            "version": __version__,
            "description": _ABOUT,
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": public_url}],
        "tags": [{"name": name} for name in dict.fromkeys(one.endpoint.group for one in told)],
        "paths": paths,
        "components": {"schemas": definitions, "securitySchemes": _SCHEMES},
    }


def answers_of(endpoint: Endpoint) -> dict[int, Answer]:
    """Every answer that an endpoint has, by status."""
    return dict(sorted({**_COMMON, **endpoint.answers}.items()))


class _Schemas(GenerateJsonSchema):
    """Without titles of members, which only say their names again."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def _schemas(endpoints: list[Endpoint]) -> tuple[dict[tuple[Any, JsonSchemaMode], dict[str, Any]], dict[str, Any]]:
    """The schema of every type that a body or an answer has, by type and direction, and the definitions they name."""
    bodies = {endpoint.body for endpoint in endpoints if endpoint.body}
    shapes = {answer.shape for endpoint in endpoints for answer in answers_of(endpoint).values() if answer.shape}
    inputs: list[tuple[Any, JsonSchemaMode, TypeAdapter[Any]]] = [
        *((body, "validation", TypeAdapter(body)) for body in bodies),
        *((shape, "serialization", TypeAdapter(shape)) for shape in shapes),
    ]
    schemas, rest = TypeAdapter.json_schemas(inputs, ref_template=_REF, schema_generator=_Schemas)
    definitions: dict[str, Any] = rest.get("$defs", {})
    for name in definitions:
        # What an answer has today; tomorrow it may have more.
        definitions[name].pop("additionalProperties", None)
    return schemas, dict(sorted(definitions.items()))


def _operation(one: Described, schemas: _Found) -> dict[str, Any]:
    endpoint = one.endpoint
    operation: dict[str, Any] = {"tags": [endpoint.group], "operationId": one.name, "summary": one.summary}
    if one.text:
        operation["description"] = one.text
    if parameters := [_parameter(parameter) for parameter in _parameters(endpoint)]:
        operation["parameters"] = parameters
    if endpoint.body:
        content: dict[str, Any] = {"schema": schemas[(endpoint.body, "validation")]}
        if endpoint.example:
            content["example"] = dict(endpoint.example)
        operation["requestBody"] = {"required": True, "content": {JSON: content}}
    operation["responses"] = {
        str(status): _response(answer, schemas) for status, answer in answers_of(endpoint).items()
    }
    if endpoint.login:
        operation["security"] = _SECURITY[endpoint.login]
    if endpoint.deprecated:
        operation["deprecated"] = True
    return operation


def _parameters(endpoint: Endpoint) -> tuple[Parameter, ...]:
    _, _, names = compile_path(endpoint.path)
    own = {parameter.name: parameter for parameter in endpoint.parameters}
    in_path = [own.pop(name) if name in own else _PATHS[name] for name in names]
    return (*in_path, *own.values())


def _parameter(parameter: Parameter) -> dict[str, Any]:
    return {
        "name": parameter.name,
        "in": parameter.place,
        "required": parameter.place == "path",
        "description": parameter.text,
        "schema": dict(parameter.schema),
    }


def _response(answer: Answer, schemas: _Found) -> dict[str, Any]:
    response: dict[str, Any] = {"description": answer.text}
    if answer.headers:
        response["headers"] = {
            name: {"description": text, "schema": {"type": "string"}} for name, text in answer.headers.items()
        }
    content: dict[str, Schema] = {name: {"type": "string"} for name in answer.media_types}
    if answer.shape:
        content = {JSON: schemas[(answer.shape, "serialization")], **content}
    if content:
        response["content"] = {name: {"schema": schema} for name, schema in content.items()}
    return response
