"""Which images a container file needs, read without running anything of it."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from wave_proxy.errors import RequestInvalid, clip
from wave_proxy.image.oci import Platform, parse_platform
from wave_proxy.image.reference import Reference, parse_reference

_DIRECTIVE = re.compile(r"#\s*([a-zA-Z][a-zA-Z0-9]*)\s*=\s*(.+?)\s*")
_HEREDOC = re.compile(r"""(?<!\S)[0-9]*<<(-?)["']?([A-Za-z0-9_][A-Za-z0-9_.]*)["']?(?!\S)""")
_WITH_HEREDOC = frozenset({"RUN", "COPY", "ADD"})
_FLAG = re.compile(r"--([a-z][a-z-]*)(?:=(\S*))?(?:\s+|$)")
_VARIABLE = re.compile(r"\\\$|\$(?:([A-Za-z_][A-Za-z0-9_]*)|\{([A-Za-z_][A-Za-z0-9_]*)(?::?([-+])([^}]*))?\})")
_ARGUMENT = re.compile(r"""([A-Za-z_][A-Za-z0-9_]*)(?:=("(?:[^"\\]|\\.)*"|'[^']*'|\S*))?(?:\s+|$)""")

_DEPTH = 10  # of variables in the defaults of variables
_MAX_VALUE = 4096


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: its word in capitals, its flags (name, value), and the rest, continuation lines joined."""

    word: str
    flags: tuple[tuple[str, str], ...]
    rest: str


@dataclass(slots=True)
class _Stages:
    """What the file has said so far."""

    arguments: dict[str, str]
    platform: Platform
    bases: dict[str, tuple[Reference, Platform] | None] = field(default_factory=dict)  # by names and numbers of stages
    names: set[str] = field(default_factory=set)
    count: int = 0
    images: dict[Reference, None] = field(default_factory=dict)

    def need(self, name: str) -> None:
        if name and name.lower() not in self.names and name.lower() != "scratch":
            self.images.setdefault(parse_reference(name))


def base_images(text: str, platform: str = "linux/amd64") -> tuple[Reference, ...]:
    """The images of FROM, ``COPY --from=`` and ``RUN --mount=from=``, each once, in the order of the file.

    Stages of the file itself and ``scratch`` are left out. Variables have the defaults of their ARG. Raises
    RequestInvalid for a FROM without an image, and for a name that is none.
    """
    return tuple(_read(text, platform).images)


def final_base(text: str, platform: str) -> tuple[Reference, Platform] | None:
    """The image that the last stage comes from, be it through other stages, and the platform that it has to be for.

    That is ``platform``, or what FROM says. None for ``scratch``, and where the builder's own platform is meant.
    Raises as ``base_images``.
    """
    stages = _read(text, platform)
    return stages.bases[str(stages.count - 1)]


def _read(text: str, platform: str) -> _Stages:
    stages = _Stages(_platform_arguments(platform), parse_platform(platform))
    for instruction in instructions(text):
        match instruction.word:
            case "ARG":
                _define(instruction.rest, stages.arguments)
            case "FROM":
                _read_from(instruction, stages)
            case "COPY" | "ADD":
                for name, value in instruction.flags:
                    if name == "from":
                        _read_source(value, stages)
            case "RUN":
                for name, value in instruction.flags:
                    if name == "mount":
                        _read_mount(value, stages)
    if not stages.count:
        raise RequestInvalid("the container file has no FROM instruction")
    return stages


def _read_from(instruction: Instruction, stages: _Stages) -> None:
    words = instruction.rest.split()
    image = substitute(words[0], stages.arguments) if words else ""
    if not image:
        raise RequestInvalid(f"FROM {clip(instruction.rest)} names no image: give its ARG a default")
    stages.need(image)
    names = [str(stages.count)]
    if len(words) == 3 and words[1].upper() == "AS":
        names.append(words[2].lower())
    stages.bases |= dict.fromkeys(names, _base_of(image, dict(instruction.flags).get("platform", ""), stages))
    stages.names.update(names)
    stages.count += 1


def _base_of(image: str, platform: str, stages: _Stages) -> tuple[Reference, Platform] | None:
    """What ``final_base`` says of a stage; ``platform`` is the flag's value as it is written."""
    if image.lower() in stages.names:
        return stages.bases[image.lower()]
    if image.lower() == "scratch" or "BUILD" in platform:
        return None
    try:
        wanted = parse_platform(substitute(platform.strip("\"'"), stages.arguments)) if platform else stages.platform
    except RequestInvalid:
        return None  # it is the engine's to say so
    return parse_reference(image), wanted


def _read_source(value: str, stages: _Stages) -> None:
    source = substitute(value.strip("\"'"), stages.arguments)
    if not source.isdigit():
        stages.need(source)


def _read_mount(value: str, stages: _Stages) -> None:
    for part in value.strip("\"'").split(","):
        key, _, source = part.partition("=")
        if key.strip().lower() == "from":
            _read_source(source, stages)


# --- variables ---------------------------------------------------------------------------------------------------


def _platform_arguments(platform: str) -> dict[str, str]:
    """What BuildKit and buildah define by themselves."""
    target = parse_platform(platform)
    values = {"PLATFORM": str(target), "OS": target.os, "ARCH": target.architecture, "VARIANT": target.variant}
    return {f"{kind}{name}": value for kind in ("TARGET", "BUILD") for name, value in values.items()}


def _define(rest: str, arguments: dict[str, str]) -> None:
    for match in _ARGUMENT.finditer(rest):
        name, value = match.groups()
        if value is None:
            arguments.setdefault(name, "")  # in a stage, it brings the value from before FROM into view
        elif value.startswith("'"):
            arguments[name] = value[1:-1]
        else:
            arguments[name] = substitute(value.strip('"'), arguments)


def substitute(text: str, arguments: Mapping[str, str], depth: int = _DEPTH) -> str:
    """``text`` with ``$NAME``, ``${NAME}``, ``${NAME:-default}`` and ``${NAME:+other}`` replaced; unknown: empty."""

    def value_of(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if not name:
            return "$"
        value = arguments.get(name, "")
        if match[3] == "-":
            value = value or (substitute(match[4], arguments, depth - 1) if depth else "")
        elif match[3] == "+":
            value = substitute(match[4], arguments, depth - 1) if value and depth else ""
        return value

    return _VARIABLE.sub(value_of, text)[:_MAX_VALUE]


# --- lines -------------------------------------------------------------------------------------------------------


def instructions(text: str) -> Iterator[Instruction]:
    """The instructions of a container file; comments, and what heredocs contain, are left out."""
    lines = [line.rstrip("\r") for line in text.removeprefix("\ufeff").split("\n")]
    continued = re.compile(re.escape(_escape_of(lines)) + r"[ \t]*$")
    position = 0
    while position < len(lines):
        whole, position = _join(lines, position, continued)
        word, _, rest = whole.strip().replace("\t", " ").partition(" ")
        if not word:
            continue
        instruction = _parse(word.upper(), rest.strip())
        if instruction.word in _WITH_HEREDOC:
            for match in _HEREDOC.finditer(instruction.rest):
                position = _behind(lines, position, match[2], strip_tabs=bool(match[1]))
        yield instruction


def _escape_of(lines: list[str]) -> str:
    """What continues a line: a backslash, or what the directive ``# escape=`` at the top says."""
    for line in lines:
        match = _DIRECTIVE.fullmatch(line.strip())
        if match is None:
            break
        if match[1].lower() == "escape" and match[2] in ("\\", "`"):
            return match[2]
    return "\\"


def _join(lines: list[str], position: int, continued: re.Pattern[str]) -> tuple[str, int]:
    """The line at ``position`` with those that continue it, comments left out; and where the next one is."""
    parts: list[str] = []
    while position < len(lines):
        line = lines[position]
        position += 1
        if line.lstrip().startswith("#") or (parts and not line.strip()):
            if parts:
                continue
            return "", position
        match = continued.search(line)
        parts.append(line[: match.start()] if match else line)
        if match is None:
            break
    return "".join(parts), position


def _parse(word: str, rest: str) -> Instruction:
    flags: list[tuple[str, str]] = []
    while match := _FLAG.match(rest):
        flags.append((match[1], match[2] or ""))
        rest = rest[match.end() :]
    return Instruction(word, tuple(flags), rest)


def _behind(lines: list[str], position: int, end: str, *, strip_tabs: bool) -> int:
    """Where the heredoc's content is over; ``position`` when it never is, since then it was none."""
    for number in range(position, len(lines)):
        if (lines[number].lstrip("\t") if strip_tabs else lines[number]) == end:
            return number + 1
    return position
