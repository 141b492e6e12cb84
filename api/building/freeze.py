"""A request's changes written into the container file of the image that they are baked into (freeze)."""

import json
import shlex
from collections.abc import Iterator, Sequence
from re import ASCII, IGNORECASE, Match, Pattern
from re import compile as compile_pattern

from wave_proxy.errors import RequestInvalid, clip
from wave_proxy.image.build import Format
from wave_proxy.image.reference import parse_reference
from wave_proxy.image.request import ContainerConfig, Layer

COMMENT = "# wave generated container file"
ENTRY_CHAIN = "WAVE_ENTRY_CHAIN"

_FROM = compile_pattern(r"\s*(?:FROM|[Ff]rom:)\s+(?:--\S+\s+)*(\S+)(?:\s+[Aa][Ss]\s+(\S+))?\s*")
_ENTRYPOINT = compile_pattern(r"\s*ENTRYPOINT(?:\s+(.*))?", IGNORECASE)
_ARGUMENT = compile_pattern(r"\s*ARG\s+(\w+)=(.*)", IGNORECASE)
_VARIABLE = compile_pattern(r"\$(?:(\w+)|\{(\w+)(?::?-([^}]*))?\})")
_ESCAPE = compile_pattern(r"#\s*escape\s*=\s*([\\`])\s*", IGNORECASE)
_DIRECTIVE = compile_pattern(r"#\s*\w+\s*=.*")
_PLAIN = compile_pattern(r"[\w.,:/@%+=-]+", ASCII)
_SPECIAL = compile_pattern(r"[\\\"$]")
_LINE_BREAK = compile_pattern(r"[\r\n\0]")
# A name that Dockerfile's ENV takes, and one that a shell does.
_ENV_NAME = compile_pattern(r"[\w.][^\s\"'$\\`=]*")
_SHELL_NAME = compile_pattern(r"[A-Za-z_][A-Za-z0-9_]*")


# --- what a container file builds on ---------------------------------------------------------------------------------


def base_of(container_file: str) -> str:
    """The image that the last stage of a container file comes from, through stages before it.

    Empty when there is none, or when only the build can tell.
    """
    return _trace(container_file)[0]


def entrypoint_of(container_file: str) -> tuple[str, ...] | None:
    """The entrypoint that a container file itself sets; None when its image has that of ``base_of``.

    Source: ``wave.md`` §4.8, vectors V24.
    """
    return _trace(container_file)[1]


def _trace(container_file: str) -> tuple[str, tuple[str, ...] | None]:
    """The base image and the entrypoint, one of which decides: from the last stage back through those it builds on."""
    lines = list(_logical_lines(container_file))
    froms = [number for number, line in enumerate(lines) if _FROM.fullmatch(line)]
    wanted, end = "", len(lines)
    while froms:
        start = froms.pop()
        image, stage = _parse_stage(lines[start])
        if stage == wanted or not wanted:
            for line in reversed(lines[start + 1 : end]):
                if (words := parse_entrypoint(line)) is not None:
                    return "", words
            wanted = image.lower()
            if wanted not in {_parse_stage(lines[number])[1] for number in froms}:
                return _expand(image, _global_arguments(lines)), None
        end = start
    return "", None


def _parse_stage(line: str) -> tuple[str, str]:
    """The image of a FROM, and the stage's name in small letters, which may be empty."""
    match = _FROM.fullmatch(line)
    return (match[1], (match[2] or "").lower()) if match else ("", "")


def parse_from(line: str) -> str | None:
    """The image that a line names; None for a line of another kind. Source: ``wave.md`` vectors V24."""
    match = _FROM.fullmatch(line)
    return match[1] if match else None


def parse_entrypoint(line: str) -> tuple[str, ...] | None:
    """The words of an ENTRYPOINT; None for a line of another kind. Source: ``wave.md`` vectors V24."""
    match = _ENTRYPOINT.fullmatch(line)
    if match is None:
        return None
    text = (match[1] or "").strip()
    try:
        words = json.loads(text)
    except (ValueError, RecursionError):
        return tuple(text.split())
    return tuple(words) if isinstance(words, list) and all(isinstance(word, str) for word in words) else (text,)


def _logical_lines(container_file: str) -> Iterator[str]:
    """The instructions, those over several lines as one; without comments and blank lines."""
    escape, begun = _escape_of(container_file), ""
    for line in container_file.split("\n"):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        begun += line.rstrip()
        if begun.endswith(escape):
            begun = begun.removesuffix(escape)
        else:
            yield begun
            begun = ""
    if begun:
        yield begun


def _escape_of(container_file: str) -> str:
    """The character that a directive at the top of the file makes the escape; else the backslash."""
    for line in container_file.split("\n"):
        if match := _ESCAPE.fullmatch(line.strip()):
            return match[1]
        if not _DIRECTIVE.fullmatch(line.strip()):
            break
    return "\\"


def _global_arguments(lines: list[str]) -> dict[str, str]:
    """Defaults of the arguments before the first FROM."""
    found: dict[str, str] = {}
    for line in lines:
        if parse_from(line):
            break
        if match := _ARGUMENT.fullmatch(line):
            found[match[1]] = match[2].strip().strip("\"'")
    return found


def _expand(image: str, arguments: dict[str, str]) -> str:
    """The image with the arguments put in; empty for what is no image's name then."""

    def value(match: Match[str]) -> str:
        return arguments.get(match[1] or match[2]) or match[3] or ""

    name = _VARIABLE.sub(value, image.strip("\"'"))
    try:
        parse_reference(name)
    except RequestInvalid:
        return ""
    return "" if name == "scratch" else name


# --- the changes -----------------------------------------------------------------------------------------------------


def frozen(
    *,
    container_file: str = "",
    image: str = "",
    config: ContainerConfig,
    entrypoint: Sequence[str] = (),
    kind: Format = "docker",
) -> str:
    """The container file of an image with the changes in it.

    It is made from a container file, which stays as it is when there are no changes, or from an image alone.
    ``entrypoint`` is the one that the image has without the changes. Layers are added from ``layer-<hex>.tar.gz`` in
    the build context (for Singularity: the unpacked folder ``layer-<hex>``). Raises RequestInvalid for what no
    container file can hold. Source: ``wave.md`` §4.8, vectors V23.
    """
    if container_file and not config:
        return container_file
    if container_file:
        head = [container_file, COMMENT]
    elif kind == "sif":
        head = [COMMENT, "BootStrap: docker", f"From: {image}"]
    else:
        head = [COMMENT, f"FROM {image}"]
    chain = " ".join(entrypoint)
    if kind == "sif":
        changes = _singularity_lines(config, chain)
    else:
        changes = _docker_lines(config, chain, _escape_of(container_file))
    return "\n".join([*head, *changes]) + "\n"


def _docker_lines(config: ContainerConfig, chain: str, escape: str) -> Iterator[str]:
    if chain and not _LINE_BREAK.search(chain):
        yield f"ENV {ENTRY_CHAIN}={_docker_quoted(chain, escape)}"
    for layer in config.layers:
        yield f"ADD {layer_folder(layer)}.tar.gz /"
    if config.working_dir:
        _check_line(config.working_dir, "containerConfig.workingDir")
        plain = _PLAIN.fullmatch(config.working_dir)
        yield f"WORKDIR {config.working_dir if plain else _docker_quoted(config.working_dir, escape)}"
    if config.env:
        yield f"ENV {' '.join(_docker_variable(*named, escape) for named in _variables(config, _ENV_NAME))}"
    if config.entrypoint:
        yield f"ENTRYPOINT {json.dumps(config.entrypoint)}"
    if config.cmd:
        yield f"CMD {json.dumps(config.cmd)}"


def _docker_variable(name: str, value: str, escape: str) -> str:
    return f"{name}={value if _PLAIN.fullmatch(value) else _docker_quoted(value, escape)}"


def _docker_quoted(text: str, escape: str) -> str:
    # With another escape character, BuildKit and buildah disagree on what a backslash is.
    if escape != "\\" and (_SPECIAL.search(text) or escape in text):
        raise RequestInvalid(f"containerFile: its directive escape={escape} can't go with {clip(text)}: leave it out")
    return f'"{_SPECIAL.sub(_escaped, text)}"'


def _escaped(special: Match[str]) -> str:
    return f"\\{special[0]}"


def _singularity_lines(config: ContainerConfig, chain: str) -> Iterator[str]:
    """Singularity has no working directory and no command beside the entrypoint."""
    if config.layers:
        yield "%files"
        yield from (f"  {{{{wave_context_dir}}}}/{layer_folder(layer)}/* /" for layer in config.layers)
    variables = [f"{name}={shlex.quote(value)}" for name, value in _variables(config, _SHELL_NAME)]
    if chain and not _LINE_BREAK.search(chain):
        variables.insert(0, f"{ENTRY_CHAIN}={shlex.quote(chain)}")
    if variables:
        yield "%environment"
        yield f"  export {' '.join(variables)}"
    if config.entrypoint:
        for number, word in enumerate(config.entrypoint):
            _check_line(word, f"containerConfig.entrypoint[{number}]")
        yield "%runscript"
        yield f"  {shlex.join(config.entrypoint)}"


def layer_folder(layer: Layer) -> str:
    """What a layer is called in the build context, without ``.tar.gz``."""
    return f"layer-{layer.gzip_digest.rpartition(':')[2]}"


def _variables(config: ContainerConfig, names: Pattern[str]) -> Iterator[tuple[str, str]]:
    for number, variable in enumerate(config.env):
        name, _, value = variable.partition("=")
        field = f"containerConfig.env[{number}]"
        if not names.fullmatch(name):
            raise RequestInvalid(f"{field}: {clip(name)} is no name that a container file can set")
        _check_line(value, field)
        yield name, value


def _check_line(text: str, field: str) -> None:
    if _LINE_BREAK.search(text):
        raise RequestInvalid(f"{field}: a container file can't hold line breaks: use the request without 'freeze'")
