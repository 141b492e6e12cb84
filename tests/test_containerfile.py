"""What images a container file needs; and that nothing in it is more than text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wave_proxy.errors import RequestInvalid
from wave_proxy.image.containerfile import Instruction, base_images, final_base, instructions, substitute


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FROM ubuntu", ["docker.io/library/ubuntu:latest"]),
        ("from --platform=linux/arm64 quay.io/a/b:1 as x\nRUN y", ["quay.io/a/b:1"]),
        (
            "FROM --platform=$BUILDPLATFORM alpine:3 AS build\nFROM scratch\nCOPY --from=build /a /",
            ["docker.io/library/alpine:3"],
        ),
        ("FROM a AS Build\nFROM build\nFROM BUILD", ["docker.io/library/a:latest"]),
        (
            "FROM a\nCOPY --from=0 /x /y\nCOPY --chown=1:1 --from=ghcr.io/c/d@sha256:" + "a" * 64 + " /x /",
            ["docker.io/library/a:latest", "ghcr.io/c/d@sha256:" + "a" * 64],
        ),
        ("ARG V=3.18\nARG I=alpine:${V}\nFROM ${I}", ["docker.io/library/alpine:3.18"]),
        ('ARG V="3.18" W\nFROM alpine:${V}', ["docker.io/library/alpine:3.18"]),
        ("ARG V\nFROM alpine:${V:-edge}", ["docker.io/library/alpine:edge"]),
        ("ARG V=1\nFROM alpine${V:+:$V}", ["docker.io/library/alpine:1"]),
        ("FROM alpine:3-$TARGETARCH", ["docker.io/library/alpine:3-amd64"]),
        (
            "ARG TOOL=tool:1\nFROM a\nARG TOOL\nCOPY --from=$TOOL /x /",
            ["docker.io/library/a:latest", "docker.io/library/tool:1"],
        ),
        (
            "FROM a\nRUN --mount=type=bind,from=quay.io/x/y:2,target=/m --network=none ls /m",
            ["docker.io/library/a:latest", "quay.io/x/y:2"],
        ),
        ("FROM a\nRUN --mount=type=cache,target=/c ls", ["docker.io/library/a:latest"]),
        ("# FROM no\nFROM \\\n  # a comment\n\n  a:1 \\ \n AS x\nFROM x", ["docker.io/library/a:1"]),
        ("#escape=`\nFROM a `\n AS x\nFROM x", ["docker.io/library/a:latest"]),
        ("# syntax=x/y\n# escape=`\nFROM `\na", ["docker.io/library/a:latest"]),
        ("FROM a\nRUN <<EOF\nFROM not/this\nEOF\nFROM b", ["docker.io/library/a:latest", "docker.io/library/b:latest"]),
        (
            "FROM a\nCOPY <<-'one' <<two /d\nFROM x\n\tone\nFROM y\ntwo\nFROM b",
            ["docker.io/library/a:latest", "docker.io/library/b:latest"],
        ),
        ("FROM a\nRUN echo <<NEVER\nFROM b", ["docker.io/library/a:latest", "docker.io/library/b:latest"]),
        ("FROM a\nRUN echo $((1<<2))\nFROM b", ["docker.io/library/a:latest", "docker.io/library/b:latest"]),
        ("FROM a\r\nRUN x \\\r\n  y\r\nFROM b\r\n", ["docker.io/library/a:latest", "docker.io/library/b:latest"]),
        ("FROM\ta\tAS\tx\nCOPY\t--from=c\t/x /", ["docker.io/library/a:latest", "docker.io/library/c:latest"]),
        ("\ufeffFROM localhost:5000/x\nFROM scratch", ["localhost:5000/x:latest"]),
        ("FROM a\nRUN echo hello \\", ["docker.io/library/a:latest"]),
        ("FROM a\nLABEL x=--from=b\nRUN cp --from=b", ["docker.io/library/a:latest"]),
    ],
)
def test_images_are_found(text: str, expected: list[str]) -> None:
    assert [str(image) for image in base_images(text)] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FROM a:1", "docker.io/library/a:1 for linux/arm64"),
        ("FROM scratch", ""),
        ("FROM a:1 AS x\nFROM b:2", "docker.io/library/b:2 for linux/arm64"),
        ("FROM a:1 AS x\nFROM b:2\nFROM X AS y\nFROM y", "docker.io/library/a:1 for linux/arm64"),
        ("FROM scratch AS x\nFROM x", ""),
        ("FROM --platform=linux/amd64 a:1", "docker.io/library/a:1 for linux/amd64"),
        ("FROM --platform=$TARGETPLATFORM a:1", "docker.io/library/a:1 for linux/arm64"),
        ("ARG P=linux/arm/v7\nFROM --platform=${P} a:1", "docker.io/library/a:1 for linux/arm/v7"),
        (
            "FROM --platform=$BUILDPLATFORM a:1 AS x\nFROM b:2\nCOPY --from=x /a /b",
            "docker.io/library/b:2 for linux/arm64",
        ),
        ("FROM --platform=$BUILDPLATFORM a:1 AS x\nFROM x", ""),
        ("FROM --platform=$NOSUCH a:1", ""),
    ],
)
def test_what_the_last_stage_comes_from(text: str, expected: str) -> None:
    found = final_base(text, "linux/arm64")
    assert (f"{found[0]} for {found[1]}" if found else "") == expected


def test_platform_decides_what_target_arguments_are() -> None:
    (image,) = base_images("FROM a:${TARGETOS}-$TARGETARCH$TARGETVARIANT", "linux/arm/v7")
    assert image.reference == "linux-armv7"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("RUN x", "no FROM"),
        ("", "no FROM"),
        ("FROM", "names no image"),
        ("ARG X\nFROM $X", "names no image"),
        ("FROM A/B:c:d", "Invalid container image name"),
        ("FROM ../../etc", "Invalid container image name"),
    ],
)
def test_what_is_no_image_is_refused(text: str, message: str) -> None:
    with pytest.raises(RequestInvalid, match=message):
        base_images(text)


def test_instruction_has_its_flags_and_its_joined_lines() -> None:
    (only,) = instructions("copy --chown=1:1 \\\n --link a \\\n b")
    assert only == Instruction("COPY", (("chown", "1:1"), ("link", "")), "a  b")


def test_variables_that_name_each_other_end() -> None:
    values = {"A": "${A:-$A}"}
    assert len(substitute("${B:-" * 50 + "x" + "}" * 50, values)) < 5000
    assert base_images("ARG A=$A$A\n" * 40 + "FROM x$A")[0].repository == "library/x"
    doubling = "ARG A=aaaaaaaaaa\n" + "ARG A=$A$A\n" * 40
    with pytest.raises(RequestInvalid):
        base_images(doubling + "FROM $A")


@given(st.text(alphabet="FROMCPYRUN \\\n\t#`<-'\"=${}:abf/EOF", max_size=200))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        found = base_images(text)
    except RequestInvalid:
        return
    assert len(found) == len(set(found))
