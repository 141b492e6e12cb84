"""Container files from packages: what the templates run, with words that try to be more than words."""

import re
import shlex
import shutil
import subprocess
from base64 import b64encode
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from api.building.recipes import Recipe, decode_base64, recipe_for
from api.locations import OpenHosts
from api.schema import parse_submission
from tests.patience import PATIENCE_S
from wave_proxy.errors import RequestInvalid
from wave_proxy.image.build import LOCK_END, LOCK_START

V1, V2, PIXI, INSTALLR = "conda/micromamba:v1", "conda/micromamba:v2", "conda/pixi:v1", "cran/installr:v1"
HEX = "0123456789abcdef" * 4
CONTEXT = {"location": "data:AAAA", "gzipDigest": f"sha256:{HEX}", "gzipSize": 3, "tarDigest": f"sha256:{HEX}"}
OPTIONS = {V1: "condaOpts", V2: "condaOpts", PIXI: "pixiOpts", INSTALLR: "cranOpts"}


def recipe(default_template: str = V1, **attributes: Any) -> Recipe:
    return recipe_for(parse_submission(attributes, OpenHosts()), default_template=default_template)


def recipe_of(
    template: str, options: dict[str, Any] | None = None, kind: str = "docker", context: bool = False, **packages: Any
) -> Recipe:
    packages = {"type": "CRAN" if template == INSTALLR else "CONDA", **packages}
    if options is not None:
        packages[OPTIONS[template]] = options
    more: dict[str, Any] = {"buildContext": CONTEXT} if context else {}
    return recipe(packages=packages, buildTemplate=template, format=kind, **more)


def refusal(**attributes: Any) -> str:
    with pytest.raises(RequestInvalid) as caught:
        recipe(**attributes)
    return str(caught.value)


def base64(text: str) -> str:
    return b64encode(text.encode()).decode()


def instructions(container_file: str) -> list[tuple[str, str]]:
    """The instructions of a Dockerfile, as a parser sees them: lines that go on are one, words behind the keyword."""
    joined = re.sub(r"\\[ \t]*\n", "", container_file)
    lines = [line for line in joined.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


def sections(container_file: str) -> list[tuple[str, str]]:
    """Header and body of each section of a container file for Singularity; the header of a stage comes first."""
    parts = re.split(r"(?m)^(%[a-z].*|BootStrap: .*)\n", container_file)
    return [(header, body) for header, body in zip(parts[1::2], parts[2::2], strict=True)]


# --- running what a template runs --------------------------------------------------------------------------------


@dataclass
class Scene:
    """A folder that stands for the image's file system, and programs in it that note what they are called with."""

    folder: Path
    shell: list[str]

    def program(self, name: str, body: str = "") -> None:
        script = self.folder / "bin" / name
        note = f"{{ printf '%s\\0' \"${{0##*/}}\" \"$@\"; printf '\\036'; }} >> '{self.folder}/calls'"
        script.write_text(f"#!/bin/sh\n{note}\n{body}\n")
        script.chmod(0o755)

    def run(self, script: str) -> subprocess.CompletedProcess[str]:
        for path in ("/tmp/", "/shell-hook.sh", "/usr/", "/opt/", "/var/", "/scratch/"):
            script = re.sub(rf"(?<![\w.:/]){re.escape(path)}", f"{self.folder}{path}", script)
        return subprocess.run(
            [*self.shell, script],
            cwd=self.folder / "work",
            env={"PATH": str(self.folder / "bin"), "R_LIBS_USER": "lib"},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )

    @property
    def calls(self) -> list[list[str]]:
        noted = (self.folder / "calls").read_text().split("\036")
        return [[word.replace(str(self.folder), "") for word in call.split("\0")[:-1]] for call in noted if call]

    def calls_of(self, name: str) -> list[list[str]]:
        return [call[1:] for call in self.calls if call[0] == name]


SHELLS = {"dash": ["dash", "-c"], "bash": ["bash", "-o", "pipefail", "-c"]}


@pytest.fixture(params=SHELLS)
def scene(request: pytest.FixtureRequest, tmp_path: Path) -> Scene:
    name, *arguments = SHELLS[request.param]
    shell = shutil.which(name)
    if shell is None:
        pytest.skip(f"no {name} here")
    made = Scene(tmp_path, [shell, *arguments])
    for folder in ("bin", "work", "tmp", "usr/bin", "opt/wave", "scratch"):
        (tmp_path / folder).mkdir(parents=True)
    for folder in ("work", "opt/wave"):
        (tmp_path / folder / "pixi.lock").write_text("version: 6\n")
    for program in ("touch", "tee", "cat", "grep"):
        (tmp_path / "bin" / program).symlink_to(shutil.which(program) or "")
    for program in ("which", "mkdir", "rm", "ln", "apt-get", "Rscript", "tar", "cp"):
        made.program(program)
    made.program("micromamba", """case "$*" in *--explicit*) echo @EXPLICIT; esac""")
    made.program("pixi", """case "$1" in shell-hook) echo 'export A=b'; esac""")
    return made


def run_of(text: str) -> str:
    """The shell script of a Dockerfile's only RUN."""
    (script,) = [rest for keyword, rest in instructions(text) if keyword == "RUN"]
    return script


def post_of(text: str) -> str:
    """The script of the first %post."""
    return next(body for header, body in sections(text) if header == "%post")


WORDS = [
    "a;id",
    "$(id)",
    "`id`",
    "${HOME}",
    "a'b",
    'a"b',
    "'\"'\"'",
    "back\\",
    "\\",
    "\\n",
    "a&&b",
    "a|b>c",
    "*",
    "~",
    "#x",
    "<<EOF",
    "%post",
    "x=1",
    "!",
    "é日本🎉",
    "[x]",
    "a,b",
]


@pytest.mark.parametrize("kind", ["docker", "sif"])
def test_base_packages_are_words_whatever_is_in_them(scene: Scene, kind: str) -> None:
    wanted = [word for word in WORDS if word != "'\"'\"'"]  # quotes around a word are taken off
    asked = " ".join(wanted)
    for template, program in ((V1, "micromamba"), (V2, "micromamba"), (PIXI, "pixi"), (INSTALLR, "apt-get")):
        text = recipe_of(template, {"basePackages": asked}, kind, entries=["x"]).container_file
        done = scene.run(run_of(text) if kind == "docker" else post_of(text))
        assert done.returncode == 0, done.stderr
        call = next(call for call in scene.calls_of(program) if wanted[0] in call)
        assert call[-len(wanted) :] == wanted
        assert call[: -len(wanted)] in (["install", "-y", "-n", "base"], ["add"], ["install", "-y", "--"])
        (scene.folder / "calls").unlink()


@pytest.mark.parametrize("kind", ["docker", "sif"])
def test_channels_and_lock_files_are_words_whatever_is_in_them(scene: Scene, kind: str) -> None:
    channels = [*WORDS, "a b", "'quoted'"]
    url = "https://foo.com/$(id)';id;`id`\"\\"
    for template in (V1, V2):
        text = recipe_of(template, {"basePackages": None}, kind, entries=[url], channels=channels).container_file
        done = scene.run(run_of(text) if kind == "docker" else post_of(text))
        assert done.returncode == 0, done.stderr
        flags = [word for channel in channels for word in ("-c", channel)]
        assert scene.calls_of("micromamba")[0] == ["install", "-y", "-n", "base", *flags, "-f", url]
        assert recipe_of(template, entries=[url], channels=channels).conda_file == ""
        (scene.folder / "calls").unlink()


@pytest.mark.parametrize("kind", ["docker", "sif"])
def test_r_packages_and_repositories_are_words_whatever_is_in_them(scene: Scene, kind: str) -> None:
    entries = [word for word in WORDS if word != "'\"'\"'"]
    text = recipe_of(INSTALLR, {}, kind, entries=entries, channels=["cran", *WORDS]).container_file
    done = scene.run(run_of(text) if kind == "docker" else post_of(text))
    assert done.returncode == 0, done.stderr
    (call,) = scene.calls_of("Rscript")
    repositories = [f"repository={word}" for word in ("cran", *WORDS)]
    assert call == ["/tmp/install.R", *repositories, *(f"package={entry}" for entry in entries)]


def test_entries_are_words_of_the_environment_file_whatever_is_in_them() -> None:
    entries = [word for word in WORDS if word != "'\"'\"'"]
    for template in (V1, V2, PIXI):
        made = recipe_of(template, entries=entries, channels=WORDS)
        assert yaml.safe_load(made.conda_file) == {"channels": WORDS, "dependencies": entries}
        assert made.container_file == recipe_of(template, entries=["x"]).container_file


@pytest.mark.parametrize("template", [V1, V2, PIXI, INSTALLR])
def test_hostile_words_make_no_further_instruction(template: str) -> None:
    asked: dict[str, Any] = {"channels": [*WORDS, "a b"], "entries": ["https://x/;id" if template == V1 else "x"]}
    hostile = {"basePackages": " ".join(WORDS)}
    plain: dict[str, Any] = {"channels": ["conda-forge"], "entries": ["https://x/y" if template == V1 else "x"]}
    for kind, parse in (("docker", instructions), ("sif", sections)):
        attacked = parse(recipe_of(template, hostile, kind, **asked).container_file)
        usual = parse(recipe_of(template, {}, kind, **plain).container_file)
        assert [first for first, _ in attacked] == [first for first, _ in usual]
        assert [rest for first, rest in attacked if first not in ("RUN", "%post")] == [
            rest for first, rest in usual if first not in ("RUN", "%post")
        ]


BREAKS = ["a\nRUN id", "a\rRUN id", "a\0b", "\n", "a\u2028b", "a\x85b", "x{{wave_context_dir}}"]


@pytest.mark.parametrize("word", BREAKS, ids=repr)
def test_words_that_would_break_a_line_are_refused(word: str) -> None:
    assert "packages.channels:" in refusal(packages={"type": "CRAN", "entries": ["x"], "channels": [word]})
    assert "packages.channels:" in refusal(packages={"type": "CONDA", "entries": ["https://x"], "channels": [word]})
    spaceless = re.sub(r"\s", "\x01", word)
    for kind, options in (("CONDA", "condaOpts"), ("CRAN", "cranOpts")):
        packages = {"type": kind, "entries": ["x"], options: {"basePackages": f"x {spaceless}"}}
        assert f"packages.{options}.basePackages:" in refusal(packages=packages)
    assert "packages.entries:" in refusal(packages={"type": "CRAN", "entries": [spaceless]})
    assert "packages.entries:" in refusal(packages={"type": "CONDA", "entries": [f"https://x/{spaceless}"]})


@pytest.mark.parametrize(
    "image", ["a b", "a\nRUN id", "$IMAGE", "x AS y", "--platform=x y", "oras://foo.com/x", "A", "-"]
)
@pytest.mark.parametrize(
    ("template", "option"),
    [
        (V1, "mambaImage"),
        (V2, "mambaImage"),
        (V2, "baseImage"),
        (PIXI, "pixiImage"),
        (PIXI, "baseImage"),
        (INSTALLR, "rImage"),
    ],
)
def test_images_must_be_images(template: str, option: str, image: str) -> None:
    with pytest.raises(RequestInvalid, match=rf"^packages\.{OPTIONS[template]}\.{option}: "):
        recipe_of(template, {option: image}, entries=["x"])


# --- what the templates do ---------------------------------------------------------------------------------------


def test_micromamba_v1(scene: Scene) -> None:
    made = recipe_of(V1, entries=["salmon=1.10.0", "bwa"], channels=["conda-forge", "bioconda"])
    assert made.template == V1
    assert made.conda_file == "channels:\n- conda-forge\n- bioconda\ndependencies:\n- salmon=1.10.0\n- bwa\n"
    steps = instructions(made.container_file)
    assert [first for first, _ in steps] == ["FROM", "COPY", "RUN", "USER", "ENV"]
    assert steps[0] == ("FROM", "mambaorg/micromamba:1.5.10-noble")
    assert steps[1][1].endswith(" conda.yml /tmp/conda.yml")
    assert steps[3] == ("USER", "root")
    assert steps[4][1].startswith('PATH="$MAMBA_ROOT_PREFIX/bin:')
    done = scene.run(run_of(made.container_file))
    assert scene.calls_of("micromamba") == [
        ["install", "-y", "-n", "base", "-f", "/tmp/conda.yml"],
        ["install", "-y", "-n", "base", "conda-forge::procps-ng"],
        ["env", "export", "--name", "base", "--explicit"],
        ["clean", "-a", "-y"],
    ]
    assert done.stdout.splitlines() == [LOCK_START, "@EXPLICIT", LOCK_END]


def test_micromamba_v2(scene: Scene) -> None:
    made = recipe_of(V2, {"basePackages": "conda-forge::procps-ng 'bash'"}, entries=["bwa=0.7.15"])
    steps = instructions(made.container_file)
    assert [first for first, _ in steps] == ["FROM", "USER", "ENV", "COPY", "RUN", "FROM", "COPY", "USER", "ENV", "ENV"]
    assert [rest for first, rest in steps if first == "FROM"] == [
        "mambaorg/micromamba:2-amazon2023 AS build",
        "ubuntu:24.04",
    ]
    assert steps[6] == ("COPY", "--from=build /opt/conda /opt/conda")
    done = scene.run(run_of(made.container_file))
    assert scene.calls_of("micromamba") == [
        ["install", "-y", "-n", "base", "-f", "/tmp/conda.yml"],
        ["install", "-y", "-n", "base", "conda-forge::procps-ng", "bash"],
        ["clean", "-a", "-y"],
        ["env", "export", "--name", "base", "--explicit"],
    ]
    assert done.stdout.splitlines() == [LOCK_START, "@EXPLICIT", LOCK_END]


def test_micromamba_v2_brings_which_where_there_is_none(scene: Scene) -> None:
    (scene.folder / "bin" / "which").unlink()
    scene.run(run_of(recipe_of(V2, entries=["x"]).container_file))
    if len(scene.calls_of("micromamba")) == 4:
        pytest.skip("this shell has which built in")
    assert scene.calls_of("micromamba")[0] == ["install", "-y", "-n", "base", "conda-forge::which"]
    assert scene.calls_of("ln") == [["-s", "/opt/conda/bin/which", "/usr/bin/which"]]


CUDA = """case "$*" in *conda.yml*) [ "$CONDA_OVERRIDE_CUDA" = 99 ] || { echo "$WHY" >&2; exit 1; }; esac"""


@pytest.mark.parametrize(("why", "installs", "status"), [("needs __cuda >=12", 2, 0), ("no such package", 1, 1)])
def test_micromamba_v2_tries_again_when_cuda_is_missing(scene: Scene, why: str, installs: int, status: int) -> None:
    scene.program("micromamba", CUDA.replace("$WHY", why))
    done = scene.run(run_of(recipe_of(V2, entries=["pytorch"]).container_file))
    assert bool(done.returncode) == bool(status)
    assert why in done.stdout
    assert len([call for call in scene.calls_of("micromamba") if "/tmp/conda.yml" in call]) == installs
    assert (LOCK_START in done.stdout) == (status == 0)


@pytest.mark.parametrize("template", [V1, V2, PIXI, INSTALLR])
@pytest.mark.parametrize("kind", ["docker", "sif"])
def test_a_failing_step_fails_the_build(scene: Scene, template: str, kind: str) -> None:
    text = recipe_of(template, kind=kind, entries=["x"]).container_file
    for program in ("micromamba", "pixi", "Rscript"):
        scene.program(program, "exit 7")
    done = scene.run(run_of(text) if kind == "docker" else post_of(text))
    assert done.returncode != 0
    assert LOCK_START not in done.stdout


@pytest.mark.parametrize(
    ("image", "wanted"),
    [
        ("mambaorg/micromamba:1.5.10-noble", "mambaorg/micromamba:2-amazon2023"),
        ("mambaorg/micromamba:1.5.11-noble", "mambaorg/micromamba:2-amazon2023"),
        ("mambaorg/micromamba:1-noble", "mambaorg/micromamba:2-amazon2023"),
        ("my.registry/mambaorg/micromamba:1.5.10-noble", "mambaorg/micromamba:2-amazon2023"),
        ("mambaorg/micromamba:2-amazon2023", "mambaorg/micromamba:2-amazon2023"),
        ("mambaorg/micromamba:2.0.0", "mambaorg/micromamba:2.0.0"),
        ("quay.io/custom/base:latest", "quay.io/custom/base:latest"),
        (None, "mambaorg/micromamba:2-amazon2023"),
        ("", "mambaorg/micromamba:2-amazon2023"),
    ],
)
def test_micromamba_1_is_replaced_in_v2(image: str | None, wanted: str) -> None:  # V14
    made = recipe_of(V2, {"mambaImage": image}, entries=["x"])
    assert made.container_file.startswith(f"FROM {wanted} AS build\n")


def test_pixi(scene: Scene) -> None:
    made = recipe_of(PIXI, entries=["numpy", "pandas"], channels=["conda-forge"])
    steps = instructions(made.container_file)
    assert [rest for first, rest in steps if first == "FROM"] == [
        "public.cr.seqera.io/wave/pixi:0.61.0-noble AS build",
        "ubuntu:24.04",
    ]
    assert steps[-2:] == [("ENTRYPOINT", '["/bin/bash", "/shell-hook.sh"]'), ("CMD", '["/bin/bash"]')]
    assert ("COPY", "--from=build /opt/wave/.pixi/envs/default /opt/wave/.pixi/envs/default") in steps
    done = scene.run(run_of(made.container_file))
    assert scene.calls_of("pixi") == [
        ["init", "--import", "conda.yml"],
        ["add", "conda-forge::procps-ng"],
        ["install"],
        ["shell-hook", "--shell", "bash"],
    ]
    assert done.stdout.splitlines() == [LOCK_START, "version: 6", LOCK_END]
    assert (scene.folder / "shell-hook.sh").read_text() == 'export A=b\nexec "$@"\n'


def test_installr(scene: Scene) -> None:
    made = recipe_of(
        INSTALLR,
        entries=["dplyr", "'ggplot2'", "bioc::GenomicRanges", "https://x.org/y_1.0.tar.gz"],
        channels=["cran", "https://r.example.com"],
    )
    assert (made.conda_file, made.template) == ("", INSTALLR)
    steps = instructions(made.container_file)
    assert [first for first, _ in steps] == ["FROM", "USER", "ENV", "RUN"]
    assert steps[0][1] == "rocker/r-ver:4.4.1"
    scene.run(run_of(made.container_file))
    assert scene.calls_of("apt-get") == [["update"], ["install", "-y", "--", "littler", "r-cran-docopt"]]
    assert scene.calls_of("Rscript") == [
        [
            "/tmp/install.R",
            "repository=cran",
            "repository=https://r.example.com",
            "package=dplyr",
            "package=ggplot2",
            "bioconductor=GenomicRanges",
            "url=https://x.org/y_1.0.tar.gz",
        ]
    ]
    script = (scene.folder / "tmp" / "install.R").read_text()
    assert "install.packages(packages)" in script
    assert "BiocManager::install(bioconductor" in script
    assert "options(repos" in script


@pytest.mark.parametrize(
    ("channels", "wanted"),
    [
        (None, ["repository=cran", "package=x"]),
        (["cran"], ["repository=cran", "package=x"]),
        (["bioconductor"], ["repository=cran", "bioconductor", "package=x"]),
        (["https://a.b"], ["repository=https://a.b", "package=x"]),
        (["bioconductor", "https://a.b"], ["repository=https://a.b", "bioconductor", "package=x"]),
    ],
)
def test_r_repositories_follow_the_channels(channels: list[str] | None, wanted: list[str]) -> None:
    text = recipe_of(INSTALLR, entries=["x"], channels=channels).container_file
    (call,) = [part for part in run_of(text).split("&&") if "Rscript" in part]
    assert shlex.split(call)[2:] == wanted


@pytest.mark.skipif(shutil.which("Rscript") is None, reason="R is not installed")
def test_the_r_script_is_r(scene: Scene) -> None:
    for context in (True, False):
        scene.run(run_of(recipe_of(INSTALLR, entries=None if context else ["x"], context=context).container_file))
        script = scene.folder / "tmp" / "install.R"
        subprocess.run(["Rscript", "-e", "invisible(parse(commandArgs(TRUE)))", str(script)], check=True)


def test_r_from_the_build_context(scene: Scene) -> None:
    made = recipe_of(INSTALLR, context=True)
    steps = instructions(made.container_file)
    assert ("COPY", ". /opt/wave_context_dir") in steps
    scene.run(run_of(made.container_file))
    script = (scene.folder / "tmp" / "install.R").read_text()
    assert 'source("install.R")' in script
    assert "renv::restore" in script
    assert "wave_context_dir" not in run_of(made.container_file)
    text = recipe_of(INSTALLR, kind="sif", context=True).container_file
    assert ("%files", "    {{wave_context_dir}} /opt/wave_context_dir\n\n") in sections(text)


@pytest.mark.parametrize("template", [V1, V2, PIXI, INSTALLR])
def test_null_leaves_base_packages_out_and_absence_does_not(template: str) -> None:
    usual = recipe_of(template, entries=["x"]).container_file
    default = "littler r-cran-docopt" if template == INSTALLR else "conda-forge::procps-ng"
    assert default in usual
    assert recipe_of(template, {}, entries=["x"]).container_file == usual
    for nothing in (None, "", "  "):
        text = recipe_of(template, {"basePackages": nothing}, entries=["x"]).container_file
        assert default not in text
        assert "apt-get" not in text


@pytest.mark.parametrize("template", [V1, V2, PIXI, INSTALLR])
def test_commands_are_lines_as_they_are(template: str) -> None:
    commands = ["RUN echo \"$HOME\" 'a'", "USER nobody", "RUN a \\\n  b"]
    text = recipe_of(template, {"commands": commands}, entries=["x"]).container_file
    assert text.endswith("\n" + "\n".join(commands) + "\n")
    text = recipe_of(template, {"commands": ["echo {{x}}", "a\nb"]}, "sif", entries=["x"]).container_file
    assert text.endswith("\n%post\n    echo {{x}}\n    a\n    b\n")


@pytest.mark.parametrize("kind", ["docker", "sif"])
@pytest.mark.parametrize("template", [V1, V2, PIXI, INSTALLR])
def test_a_container_image_is_the_base_image(template: str, kind: str) -> None:
    packages = {"type": "CRAN" if template == INSTALLR else "CONDA", "entries": ["x"]}
    made = recipe(packages=packages, buildTemplate=template, containerImage="127.0.0.1:5000/base:1", format=kind)
    froms = [line.partition(" ")[2] for line in made.container_file.splitlines() if re.match(r"FROM |From: ", line)]
    assert froms[-1] == "127.0.0.1:5000/base:1"
    assert len(froms) == (1 if template in (V1, INSTALLR) else 2)


@pytest.mark.parametrize("template", [V1, V2, PIXI, INSTALLR])
def test_images_can_be_chosen(template: str) -> None:
    names = {V1: ["mambaImage"], V2: ["mambaImage", "baseImage"], PIXI: ["pixiImage", "baseImage"]}.get(template)
    options = {name: f"127.0.0.1:5000/{name.lower()}:1" for name in names or ["rImage"]}
    text = recipe_of(template, options, entries=["x"]).container_file
    assert re.findall(r"(?m)^FROM (\S+)", text) == list(options.values())


@pytest.mark.parametrize("template", [V1, V2, PIXI])
def test_singularity_has_the_same_steps(scene: Scene, template: str) -> None:
    made = recipe_of(template, kind="sif", entries=["bwa"])
    headers = [header for header, _ in sections(made.container_file)]
    stages = 1 if template == V1 else 2
    assert headers.count("BootStrap: docker") == stages
    assert headers[1:3] == ["%files", "%post"]
    assert "%environment" in headers
    assert "    {{wave_context_dir}}/conda.yml /scratch/conda.yml\n" in made.container_file
    done = scene.run(post_of(made.container_file))
    assert done.returncode == 0, done.stderr
    assert LOCK_START in done.stdout.splitlines()
    program = "pixi" if template == PIXI else "micromamba"
    docker = recipe_of(template, entries=["bwa"]).container_file
    calls = [[word.replace("/scratch/", "/tmp/") for word in call] for call in scene.calls_of(program)]
    (scene.folder / "calls").unlink()
    scene.run(run_of(docker))
    assert scene.calls_of(program) == calls


def test_the_lock_markers_are_in_what_runs_and_not_in_its_text() -> None:
    for template in (V1, V2, PIXI):
        for kind in ("docker", "sif"):
            text = recipe_of(template, kind=kind, entries=["x"]).container_file
            assert LOCK_START not in text
            assert LOCK_END not in text


@pytest.mark.parametrize("template", [V1, V2, PIXI, INSTALLR])
@pytest.mark.parametrize("kind", ["docker", "sif"])
def test_texts_are_the_same_each_time_and_well_kept(template: str, kind: str) -> None:
    text = recipe_of(template, kind=kind, entries=["x"]).container_file
    assert text == recipe_of(template, kind=kind, entries=["x"]).container_file
    assert not re.search(r"[ \t]+$", text, re.MULTILINE)
    assert "\n\n\n" not in text
    assert text.endswith("\n")
    assert not text.endswith("\n\n")


# --- which recipe ------------------------------------------------------------------------------------------------


def test_the_default_template_is_the_operators() -> None:
    packages = {"type": "CONDA", "entries": ["x"]}
    assert recipe(V1, packages=packages).template == V1
    assert recipe(V2, packages=packages).template == V2
    assert recipe(V2, packages=packages, buildTemplate=V1).template == V1
    assert recipe(V2, packages={"type": "CRAN", "entries": ["x"]}).template == INSTALLR
    assert recipe(V2, packages={"type": "CRAN", "entries": ["x"]}, buildTemplate=V1).template == V1


def test_a_container_file_is_used_as_it_is() -> None:
    text = "FROM ubuntu\r\nRUN echo é\n"
    assert recipe(containerFile=base64(text)) == Recipe(text)
    made = recipe(containerFile=base64(text), condaFile=base64("dependencies: [x]"))
    assert made == Recipe(text, "dependencies: [x]")


def test_an_image_alone_has_no_container_file() -> None:
    assert recipe(containerImage="ubuntu", freeze=True) == Recipe("")


def test_a_conda_file_is_an_environment() -> None:
    text = "dependencies:  [bwa]  # mine"
    made = recipe(V2, condaFile=base64(text))
    assert made == recipe(V2, packages={"type": "CONDA", "environment": base64(text)})
    assert (made.conda_file, made.template) == (text, V2)


def test_an_environment_wins_over_entries() -> None:
    packages = {"type": "CONDA", "environment": base64("dependencies: [a]"), "entries": ["b"], "channels": ["c"]}
    assert recipe(packages=packages).conda_file == "dependencies:\n- a\nchannels:\n- c\n"


def test_a_build_context_may_bring_the_conda_file() -> None:
    made = recipe(packages={"type": "CONDA"}, buildContext=CONTEXT)
    assert made.conda_file == ""
    assert "-f /tmp/conda.yml" in made.container_file


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"packages": {"type": "CONDA"}}, "packages: names nothing to install"),
        ({"packages": {"type": "CONDA", "entries": [" ", "''"]}}, "packages: names nothing to install"),
        ({"packages": {"type": "CRAN", "entries": []}}, "packages: names nothing to install"),
        ({"packages": {"type": "CONDA", "entries": ["pip::x"]}}, "Invalid pip prefix - Likely you want"),
        (
            {"packages": {"type": "CONDA", "entries": ["https://a/b", "https://a/c"]}},
            "No more than one Conda lock remote file can be specified at the same time",
        ),
        (
            {"packages": {"type": "CONDA", "entries": ["'https://a/b'"]}, "buildTemplate": PIXI},
            f"Conda lock file is not supported by '{PIXI}' template",
        ),
        ({"packages": {"type": "CRAN", "entries": ["bioc::"]}}, "packages.entries: "),
        ({"condaFile": base64("a: b"), "buildTemplate": "x"}, "buildTemplate: expected one of conda/micromamba:v1"),
        ({"containerFile": base64("  \n")}, "Missing dockerfile content"),
        ({"containerFile": base64("COPY x /root/.docker/config.json")}, "is not allowed (error code: 100)"),
        ({"containerFile": base64("FROM x\nRUN /kaniko/executor")}, "is not allowed (error code: 101)"),
        ({"packages": {"type": "CONDA", "entries": ["x" * 4000] * 20}}, "have 80000 characters together"),
        (
            {"packages": {"type": "CONDA", "environment": base64("- a"), "channels": ["c"]}},
            "packages.environment: not a Conda environment file",
        ),
    ],
)
def test_what_can_not_be_built_is_refused(attributes: dict[str, Any], message: str) -> None:
    assert message in refusal(**attributes)


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("RlJPTSBmb28", "padding"),
        ("RlJPTSBmb28==", ""),
        ("RlJPTSBmb2-_", ""),
        ("RlJP\nTSBm", ""),
        (" RlJPTSBm", ""),
        ("RlJPTSBmb29=", "not in the canonical form"),
        ("é", ""),
        ("//79", "not UTF-8"),
        (base64("FROM x\0"), "NUL"),
    ],
)
@pytest.mark.parametrize("field", ["containerFile", "condaFile", "packages.envFile"])
def test_base64_is_strict(text: str, cause: str, field: str) -> None:
    with pytest.raises(RequestInvalid) as caught:
        decode_base64(text, field)
    message = str(caught.value)
    assert message.startswith(f"Invalid '{field}' attribute - make sure it encoded as a base64 string - Cause: ")
    assert cause in message


@pytest.mark.parametrize(
    ("make", "field"),
    [
        (lambda text: {"containerFile": text}, "containerFile"),
        (lambda text: {"condaFile": text}, "condaFile"),
        (lambda text: {"packages": {"type": "CONDA", "environment": text}}, "packages.envFile"),
    ],
)
def test_base64_errors_name_the_field(make: Callable[[str], dict[str, Any]], field: str) -> None:
    assert refusal(**make("%%%")).startswith(f"Invalid '{field}' attribute")


@pytest.mark.parametrize("template", [V1, V2, PIXI, INSTALLR])
def test_the_page_names_what_a_mirror_must_hold(template: str) -> None:
    """All images that a container file begins with when the request names none."""
    kind = "CRAN" if template == INSTALLR else "CONDA"
    made = recipe(packages={"type": kind, "entries": ["a"]}, buildTemplate=template)
    images = re.findall(r"^FROM (\S+)", made.container_file, re.MULTILINE)
    page = (Path(__file__).parent.parent / "docs" / "builds.md").read_text()
    assert images
    assert [image for image in images if f"`{image}`" not in page] == []
