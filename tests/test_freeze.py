"""Changes written into container files: the vectors of the wire facts, and values that try to be more than values."""

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from api.building.freeze import base_of, entrypoint_of, frozen, parse_entrypoint, parse_from
from wave_proxy.errors import RequestInvalid
from wave_proxy.image.request import ContainerConfig, Layer

COMMENT = "# wave generated container file"


def layer(name: str) -> Layer:
    return Layer("data:", f"sha256:{name}", 1, "sha256:00")


def lines(**asked: Any) -> list[str]:
    text = frozen(**{"config": ContainerConfig(), **asked})
    assert text.endswith("\n")
    return text.split("\n")[:-1]


ENV = ContainerConfig(env=("FOO=1", "BAR=2"))
ALL = ContainerConfig(
    entrypoint=("/my", "--entry"),
    cmd=("/this", "--that"),
    env=("FOO=1", "BAR=2"),
    working_dir="/work/dir",
    layers=(layer("012abc"), layer("000aaa"), layer("999fff")),
)


# --- vectors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ({"image": "ubuntu:latest"}, [COMMENT, "FROM ubuntu:latest"]),
        ({"image": "ubuntu:latest", "config": ENV}, [COMMENT, "FROM ubuntu:latest", "ENV FOO=1 BAR=2"]),
        (
            {"image": "ubuntu:latest", "config": ENV, "entrypoint": ("/foo/entry.sh",)},
            [COMMENT, "FROM ubuntu:latest", 'ENV WAVE_ENTRY_CHAIN="/foo/entry.sh"', "ENV FOO=1 BAR=2"],
        ),
        (
            {
                "container_file": "FROM foo\nRUN this\n",
                "config": ContainerConfig(env=("FOO=1", "BAR=2"), working_dir="/work/dir"),
            },
            ["FROM foo", "RUN this", "", COMMENT, "WORKDIR /work/dir", "ENV FOO=1 BAR=2"],
        ),
        (
            {"container_file": "FROM foo\nRUN this\n", "config": ENV, "entrypoint": ("/a", "b")},
            ["FROM foo", "RUN this", "", COMMENT, 'ENV WAVE_ENTRY_CHAIN="/a b"', "ENV FOO=1 BAR=2"],
        ),
        (
            {"container_file": "FROM foo", "config": ALL},
            [
                "FROM foo",
                COMMENT,
                "ADD layer-012abc.tar.gz /",
                "ADD layer-000aaa.tar.gz /",
                "ADD layer-999fff.tar.gz /",
                "WORKDIR /work/dir",
                "ENV FOO=1 BAR=2",
                'ENTRYPOINT ["/my", "--entry"]',
                'CMD ["/this", "--that"]',
            ],
        ),
        (
            {
                "image": "ubuntu:latest",
                "kind": "sif",
                "config": ContainerConfig(
                    entrypoint=("bash", "--this", "--that"),
                    env=("FOO=1", "BAR=2"),
                    layers=(layer("digest1"), layer("digest2")),
                ),
            },
            [
                COMMENT,
                "BootStrap: docker",
                "From: ubuntu:latest",
                "%files",
                "  {{wave_context_dir}}/layer-digest1/* /",
                "  {{wave_context_dir}}/layer-digest2/* /",
                "%environment",
                "  export FOO=1 BAR=2",
                "%runscript",
                "  bash --this --that",
            ],
        ),
    ],
)
def test_changes_are_written_behind_the_image(asked: dict[str, Any], wanted: list[str]) -> None:  # V23
    assert lines(**asked) == wanted


def test_a_file_without_changes_stays_as_it_is() -> None:  # V23
    assert frozen(container_file="FROM foo\nRUN x", config=ContainerConfig(), entrypoint=("a",)) == "FROM foo\nRUN x"


@pytest.mark.parametrize(
    ("line", "image"),
    [
        ("FROM  foo ", "foo"),
        ("FROM --platform=xyz foo as this", "foo"),
        ("From: foo", "foo"),
        ("from: foo", "foo"),
        ("from foo", None),
        ("# FROM foo", None),
        ("FROMAGE foo", None),
        ("ENTRYPOINT x", None),
    ],
)
def test_from_lines(line: str, image: str | None) -> None:  # V24
    assert parse_from(line) == image


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ENTRYPOINT this --that", ("this", "--that")),
        ('ENTRYPOINT  [ "this" ,  "--that" ] ', ("this", "--that")),
        ('ENTRYPOINT ["this", "a b c"]', ("this", "a b c")),
        ("ENTRYPOINT []", ()),
        ("ENTRYPOINT [x", ("[x",)),
        ("foo", None),
    ],
)
def test_entrypoint_lines(line: str, words: tuple[str, ...] | None) -> None:  # V24
    assert parse_entrypoint(line) == words


@pytest.mark.parametrize(
    ("text", "base", "entrypoint"),
    [
        ("FROM ubuntu\nRUN x\nENTRYPOINT x\nFROM debian\nRUN y", "debian", None),  # V24
        ("FROM ubuntu\nENTRYPOINT a b\nRUN x", "", ("a", "b")),
        ("FROM ubuntu\nENTRYPOINT a\nENTRYPOINT b", "", ("b",)),
        ("FROM ubuntu AS one\nENTRYPOINT a\nFROM one", "", ("a",)),
        ("FROM ubuntu AS one\nFROM debian as Two\nENTRYPOINT no\nFROM ONE AS three\nFROM three", "ubuntu", None),
        ("ARG TAG=24.04\nARG NAME='debian'\nFROM --platform=$X ${NAME}:$TAG", "debian:24.04", None),
        ("ARG TAG\nFROM debian:${TAG:-12}", "debian:12", None),
        ("ARG TAG\nFROM debian:$TAG", "", None),
        ("FROM \\\n  ubuntu \\\n  AS x\nRUN a \\\n# FROM no\n\n  FROM no", "ubuntu", None),
        ("# escape=`\nFROM `\n ubuntu\nRUN c:\\\nENTRYPOINT x", "", ("x",)),
        ("FROM a\r\nENTRYPOINT b\r\n", "", ("b",)),
        ("BootStrap: docker\nFrom: quay.io/a/b:1\n%post\n  x", "quay.io/a/b:1", None),
        ("FROM scratch", "", None),
        ("FROM a AS a", "a", None),
        ("RUN x", "", None),
        ("", "", None),
    ],
)
def test_what_a_file_builds_on(text: str, base: str, entrypoint: tuple[str, ...] | None) -> None:
    assert base_of(text) == base
    assert entrypoint_of(text) == entrypoint


# --- values stay values ----------------------------------------------------------------------------------------------

HOSTILE = (
    "a b",
    "$HOME",
    "${HOME:-x}",
    '"',
    "'",
    "\\",
    "\\\\",
    "\\n",
    '\\"',
    "\\$HOME",
    "`id`",
    "$(id)",
    "#x",
    "a\tb",
    "",
    " ",
    "é日本🎉",
    "<<EOF",
    "x=y=z",
    '["a"]',
    "a \\",
    "--flag=1",
)


def docker_config(text: str, folder: Path) -> dict[str, Any]:
    """The image's config that buildah makes of a container file, from nothing."""
    buildah = shutil.which("buildah")
    if buildah is None or os.geteuid() != 0:
        pytest.skip("needs buildah, and root")
    (folder / "context").mkdir()
    (folder / "Containerfile").write_text(text.replace("FROM nothing", "FROM scratch"))
    options = ["--root", f"{folder}/root", "--runroot", f"{folder}/run", "--storage-driver", "vfs"]
    bud = ["bud", "--isolation", "chroot", "--quiet", "--file", f"{folder}/Containerfile", "--tag", "made"]
    subprocess.run([buildah, *options, *bud, f"{folder}/context"], check=True, capture_output=True)
    inspect = [buildah, *options, "inspect", "--type", "image", "made"]
    done = subprocess.run(inspect, check=True, capture_output=True)
    found: dict[str, Any] = json.loads(done.stdout)["OCIv1"]["config"]
    return found


def test_values_arrive_in_the_image_as_they_are(tmp_path: Path) -> None:
    env = tuple(f"V{number}={value}" for number, value in enumerate(HOSTILE))
    config = ContainerConfig(env=env, entrypoint=HOSTILE, cmd=("a\nb", *HOSTILE), working_dir="/a $b 'c' \"d\"/`e`\\f")
    found = docker_config(frozen(container_file="FROM nothing\n", config=config, entrypoint=("$x", 'a "b"')), tmp_path)
    assert {'WAVE_ENTRY_CHAIN=$x a "b"', *env} <= set(found["Env"])
    assert tuple(found["Entrypoint"]) == HOSTILE
    assert tuple(found["Cmd"]) == ("a\nb", *HOSTILE)
    assert found["WorkingDir"] == config.working_dir


def test_another_escape_character_goes_with_plain_values(tmp_path: Path) -> None:
    head = "# escape=`\nFROM nothing\n"
    found = docker_config(frozen(container_file=head, config=ContainerConfig(env=("A=b c", "D=é/e"))), tmp_path)
    assert {"A=b c", "D=é/e"} <= set(found["Env"])
    with pytest.raises(RequestInvalid, match="its directive escape=` can't go with"):
        frozen(container_file=head, config=ContainerConfig(env=("A=$b",)))


def test_values_are_one_line_each() -> None:
    env = tuple(f"V{number}={value}" for number, value in enumerate(HOSTILE))
    config = ContainerConfig(env=env, entrypoint=("\nRUN id", *HOSTILE), cmd=("\r\nRUN id",), working_dir="/a b")
    found = lines(image="ubuntu", config=config, entrypoint=HOSTILE)
    assert [line.split()[0] for line in found] == ["#", "FROM", "ENV", "WORKDIR", "ENV", "ENTRYPOINT", "CMD"]


def test_singularity_values_are_shell_words() -> None:
    env = tuple(f"V{number}={value}" for number, value in enumerate(HOSTILE))
    found = lines(
        image="ubuntu", kind="sif", config=ContainerConfig(env=env, entrypoint=HOSTILE), entrypoint=("a", "b")
    )
    export = found[found.index("%environment") + 1]
    assert shlex.split(export) == ["export", "WAVE_ENTRY_CHAIN=a b", *env]
    assert shlex.split(found[found.index("%runscript") + 1]) == list(HOSTILE)


@pytest.mark.parametrize("kind", ["docker", "sif"])
@pytest.mark.parametrize(
    ("config", "field"),
    [
        (ContainerConfig(env=("A=1", "B=x\nRUN id")), "containerConfig.env[1]"),
        (ContainerConfig(env=("A=x\r",)), "containerConfig.env[0]"),
        (ContainerConfig(env=("A B=1",)), "containerConfig.env[0]"),
        (ContainerConfig(env=('A"=1',)), "containerConfig.env[0]"),
        (ContainerConfig(env=("A\nRUN id=1",)), "containerConfig.env[0]"),
        (ContainerConfig(env=("$A=1",)), "containerConfig.env[0]"),
        (ContainerConfig(env=("--from=1",)), "containerConfig.env[0]"),
    ],
)
def test_what_no_container_file_can_hold_is_refused(config: ContainerConfig, field: str, kind: Any) -> None:
    with pytest.raises(RequestInvalid) as caught:
        frozen(image="ubuntu", config=config, kind=kind)
    assert str(caught.value).startswith(f"{field}: ")


def test_a_working_directory_of_two_lines_is_refused() -> None:
    with pytest.raises(RequestInvalid, match=r"containerConfig\.workingDir: "):
        frozen(image="ubuntu", config=ContainerConfig(working_dir="/a\nRUN id"))


def test_an_entrypoint_of_two_lines_can_not_be_a_runscript() -> None:
    with pytest.raises(RequestInvalid, match=r"containerConfig\.entrypoint\[1\]: "):
        frozen(image="ubuntu", kind="sif", config=ContainerConfig(entrypoint=("a", "b\n%post\nid")))


def test_an_entrypoint_of_two_lines_is_not_handed_on() -> None:
    assert lines(image="ubuntu", entrypoint=("a\nRUN id",)) == [COMMENT, "FROM ubuntu"]
