"""From a submission to the container file that is built: the user's own, or one from the templates for packages."""

import shlex
from base64 import b64decode, b64encode
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from re import compile as compile_pattern
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from pydantic import BaseModel

from api.building.conda import add_channels, split_words, write_environment
from api.schema import MAX_CONDA_FILE_CHARS, CondaOptions, CranOptions, PackagesSpec, PixiOptions, Submission
from wave_proxy.errors import RequestInvalid, clip
from wave_proxy.image.build import LOCK_END, LOCK_START
from wave_proxy.image.reference import parse_reference

MICROMAMBA_V1 = "conda/micromamba:v1"
MICROMAMBA_V2 = "conda/micromamba:v2"
PIXI = "conda/pixi:v1"
INSTALLR = "cran/installr:v1"
_TEMPLATES = (MICROMAMBA_V1, MICROMAMBA_V2, PIXI, INSTALLR)

# What an option has that is not in the request; one that is null is left out. Source: ``wave.md`` §1.1.
MAMBA_IMAGE = "mambaorg/micromamba:1.5.10-noble"
MAMBA_V2_IMAGE = "mambaorg/micromamba:2-amazon2023"
PIXI_IMAGE = "public.cr.seqera.io/wave/pixi:0.61.0-noble"
BASE_IMAGE = "ubuntu:24.04"
R_IMAGE = "rocker/r-ver:4.4.1"
CONDA_BASE_PACKAGES = "conda-forge::procps-ng"
CRAN_BASE_PACKAGES = "littler r-cran-docopt"

# The builder puts the context's folder in its place, in container files for Singularity.
CONTEXT_FOLDER = "{{wave_context_dir}}"

_LOCK_URL = ("http://", "https://")
_MAMBA_1 = compile_pattern(r".*micromamba:1[.-].*")
_FORBIDDEN = {"/.docker/config.json": 100, "/kaniko": 101}
_UNPRINTABLE = compile_pattern(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ufeff]")
_DEFAULT_PATH = "${PATH:-/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What a build is made from. ``template`` is empty for a container file of the user's own, and all of it when the
    submission is about an image alone: what there may be to build then is in ``api.building.freeze``.
    """

    container_file: str
    conda_file: str = ""
    template: str = ""


def recipe_for(submission: Submission, *, default_template: str) -> Recipe:
    """The recipe that a submission asks for.

    ``default_template`` is that of Conda packages whose submission names none. Reading large environment files takes a
    moment (up to a second for hostile ones), so call it in a thread. Raises RequestInvalid.
    """
    if submission.container_file:
        container_file = decode_base64(submission.container_file, "containerFile")
        if not container_file.strip():
            raise RequestInvalid("Missing dockerfile content")
        conda_file = decode_base64(submission.conda_file, "condaFile") if submission.conda_file else ""
        recipe = Recipe(container_file, conda_file)
    elif submission.packages or submission.conda_file:
        recipe = _packages_recipe(submission, default_template)
    else:
        return Recipe("")
    _check_content(recipe.container_file)
    return recipe


def decode_base64(text: str, field: str) -> str:
    """The text that ``field`` carries: UTF-8 in base64, with its padding, and without line breaks.

    Raises RequestInvalid. Source: ``wave.md`` §4.9, 2.
    """
    invalid = f"Invalid '{field}' attribute - make sure it encoded as a base64 string - Cause: "
    try:
        content = b64decode(text, validate=True)
    except ValueError as err:
        raise RequestInvalid(f"{invalid}{err}") from None
    if b64encode(content).decode() != text:
        raise RequestInvalid(f"{invalid}not in the canonical form, which has padding and no bits to spare")
    try:
        decoded = content.decode()
    except UnicodeDecodeError as err:
        raise RequestInvalid(f"{invalid}what it encodes is not UTF-8: {err.reason} at byte {err.start}") from None
    if "\0" in decoded:
        raise RequestInvalid(f"{invalid}what it encodes has the character NUL")
    return decoded


def _check_content(container_file: str) -> None:
    """Source: ``wave.md`` §4.9, 7."""
    for text, code in _FORBIDDEN.items():
        if text in container_file:
            raise RequestInvalid(f"Provided container file is not allowed (error code: {code})")


# --- packages --------------------------------------------------------------------------------------------------------


def _packages_recipe(submission: Submission, default_template: str) -> Recipe:
    packages = submission.packages or PackagesSpec(type="CONDA")
    template = submission.build_template or (INSTALLR if packages.type == "CRAN" else default_template)
    if template not in _TEMPLATES:
        raise RequestInvalid(f"buildTemplate: expected one of {', '.join(_TEMPLATES)}, got {clip(template)}")
    _check_size(packages)
    if template == INSTALLR:
        return Recipe(_render(template, submission, _cran_words(submission, packages)), template=template)
    lock_url = _lock_url(packages)
    if lock_url and template == PIXI:
        raise RequestInvalid(f"Conda lock file is not supported by '{PIXI}' template")
    conda_file = "" if lock_url else _conda_file(submission, packages)
    if not conda_file and not lock_url and not submission.build_context:
        raise RequestInvalid("packages: names nothing to install: expected 'entries' or 'environment'")
    words = _conda_words(submission, packages, template) | _source_words(submission, packages, lock_url)
    return Recipe(_render(template, submission, words), conda_file, template)


def _check_size(packages: PackagesSpec) -> None:
    options = (packages.conda_opts, packages.pixi_opts, packages.cran_opts)
    commands = [command for option in options if option for command in option.commands or ()]
    size = sum(map(len, [*(packages.entries or ()), *(packages.channels or ()), *commands]))
    if size > MAX_CONDA_FILE_CHARS:
        raise RequestInvalid(
            f"packages: entries, channels and commands have {size} characters together, and may have "
            f"{MAX_CONDA_FILE_CHARS}"
        )


def _lock_url(packages: PackagesSpec) -> str:
    """Source: ``wave.md`` §4.7b. An environment wins over entries."""
    entries = [] if packages.environment else split_words(packages.entries or ())
    urls = [entry for entry in entries if entry.startswith(_LOCK_URL)]
    if urls and len(entries) > 1:
        raise RequestInvalid("No more than one Conda lock remote file can be specified at the same time")
    return urls[0] if urls else ""


def _conda_file(submission: Submission, packages: PackagesSpec) -> str:
    channels = packages.channels or []
    if packages.environment:
        return add_channels(decode_base64(packages.environment, "packages.envFile"), channels)
    if submission.conda_file:
        return decode_base64(submission.conda_file, "condaFile")
    return write_environment(packages.entries or [], channels)


# --- what the templates are filled with ------------------------------------------------------------------------------


def _conda_words(submission: Submission, packages: PackagesSpec, template: str) -> dict[str, object]:
    options: CondaOptions | PixiOptions
    if template == PIXI:
        options = packages.pixi_opts or PixiOptions()
        images = {"pixi_image": _image(options, "pixi_image", PIXI_IMAGE)}
    else:
        options = packages.conda_opts or CondaOptions()
        images = {"mamba_image": _image(options, "mamba_image", MAMBA_IMAGE)}
    if template == MICROMAMBA_V1 and submission.container_image:
        images["mamba_image"] = submission.container_image
    elif template == MICROMAMBA_V2 and _MAMBA_1.fullmatch(images["mamba_image"]):
        images["mamba_image"] = MAMBA_V2_IMAGE
    return {
        **images,
        "base_image": submission.container_image or _image(options, "base_image", BASE_IMAGE),
        "base_packages": _base_packages(options, CONDA_BASE_PACKAGES),
        "commands": options.commands or [],
    }


def _source_words(submission: Submission, packages: PackagesSpec, lock_url: str) -> dict[str, object]:
    """How micromamba is told what to install: a file from the context, or the address of a lock file."""
    conda_file = "/scratch/conda.yml" if submission.format == "sif" else "/tmp/conda.yml"  # noqa: S108 - in the image
    source = ["-f", conda_file]
    if lock_url:
        channels = [_word(channel, "packages.channels") for channel in packages.channels or ()]
        flags = [flag for channel in channels for flag in ("-c", channel)]
        source = [*flags, "-f", _word(lock_url, "packages.entries")]
    install = f"micromamba install -y -n base {_quoted(source)}"
    return {"has_file": not lock_url, "conda_file": conda_file, "install": install}


def _cran_words(submission: Submission, packages: PackagesSpec) -> dict[str, object]:
    """Source: ``wave.md`` §4.7e, §5.6."""
    options = packages.cran_opts or CranOptions()
    entries = [_word(entry, "packages.entries") for entry in split_words(packages.entries or ())]
    if not entries and not submission.build_context:
        raise RequestInvalid("packages: names nothing to install: expected 'entries', or a 'buildContext' that does")
    return {
        "r_image": submission.container_image or _image(options, "r_image", R_IMAGE),
        "base_packages": _base_packages(options, CRAN_BASE_PACKAGES),
        "commands": options.commands or [],
        "has_packages": bool(entries),
        "arguments": _cran_arguments(entries, packages.channels or []),
    }


def _cran_arguments(entries: Sequence[str], channels: Sequence[str]) -> list[str]:
    """What the R script of the template is called with."""
    repositories = [_word(channel, "packages.channels") for channel in channels if channel != "bioconductor"]
    arguments = [f"repository={repository}" for repository in repositories or ["cran"]]
    arguments += ["bioconductor"] if "bioconductor" in channels else []
    for entry in entries:
        if entry.startswith(_LOCK_URL):
            arguments.append(f"url={entry}")
        elif entry.startswith("bioc::"):
            arguments.append(f"bioconductor={_word(entry.removeprefix('bioc::'), 'packages.entries')}")
        else:
            arguments.append(f"package={entry}")
    return arguments


def _image(options: CondaOptions | PixiOptions | CranOptions, name: str, default: str) -> str:
    """The image that an option names; null is no image, so it stands for the default as well."""
    value = getattr(options, name)
    if value is None:
        return default
    field = _path(options, name)
    try:
        reference = parse_reference(value)
    except RequestInvalid as err:
        raise RequestInvalid(f"{field}: {err}") from None
    if reference.scheme:
        raise RequestInvalid(f"{field}: expected the name of a container image, got {clip(value)}")
    return str(value)


def _base_packages(options: CondaOptions | PixiOptions | CranOptions, default: str) -> list[str]:
    """The words of the option; none when it is null or empty."""
    field = _path(options, "base_packages")
    given = options.base_packages if "base_packages" in options.model_fields_set else default
    return [_word(word, field) for word in split_words([given or ""])]


def _path(options: BaseModel, name: str) -> str:
    kinds: dict[type[BaseModel], str] = {CondaOptions: "condaOpts", PixiOptions: "pixiOpts", CranOptions: "cranOpts"}
    return f"packages.{kinds[type(options)]}.{type(options).model_fields[name].alias}"


def _word(text: str, field: str) -> str:
    """``text``, which can stand as one word in one line of a container file.

    ``{{`` begins a variable in container files for Singularity. Raises RequestInvalid.
    """
    if not text.strip() or _UNPRINTABLE.search(text) or "{{" in text:
        raise RequestInvalid(
            f"{field}: expected a name without line breaks, control characters and {{{{, got {clip(text)}"
        )
    return text


# --- templates -------------------------------------------------------------------------------------------------------


def _quoted(words: Iterable[str]) -> str:
    """Words for a shell's command line, each of which stays one word whatever is in it."""
    return " ".join(map(shlex.quote, words))


def _marker(line: str) -> str:
    """A shell word for ``line`` in which ``line`` itself can't be found: logs repeat the commands, too."""
    middle = len(line) - 4
    return f"'{line[:middle]}''{line[middle:]}'"


_environment = Environment(
    loader=PackageLoader("api.building"),
    autoescape=False,  # noqa: S701 - shells are no HTML: what users write goes through `quoted`
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_environment.filters["quoted"] = _quoted
_environment.globals |= {
    "context_folder": CONTEXT_FOLDER,
    "default_path": _DEFAULT_PATH,
    "lock_start": _marker(LOCK_START),
    "lock_end": _marker(LOCK_END),
}


def _render(template: str, submission: Submission, words: dict[str, Any]) -> str:
    suffix = "def" if submission.format == "sif" else "dockerfile"
    name = template.rpartition("/")[2].replace(":", "-")
    return _environment.get_template(f"{name}.{suffix}.j2").render(words).rstrip("\n") + "\n"
