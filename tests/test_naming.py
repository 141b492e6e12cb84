"""Ids, image names and cache repositories: the vectors of the wire facts, and names that try to break the grammar."""

from itertools import product
from typing import Any

import pytest
import yaml

from api.building.conda import Package, add_channels, read_packages, trim_quotes, write_environment
from api.building.naming import (
    NameStrategy,
    cache_repository,
    container_id,
    hash_attributes,
    hash_config,
    is_custom,
    join_names,
    normalise_name,
    normalise_tag,
    target_image,
)
from api.schema import ConfigSpec
from wave_proxy.errors import RequestInvalid
from wave_proxy.image.reference import is_repository, is_tag, parse_reference
from wave_proxy.image.request import Layer

CONTEXT = Layer("data:", "sha256:aa", 1, "")
INDENTED = f"{' ' * 16}dependencies:\n{' ' * 20}- samtools=1.0\n{' ' * 16}"


def config(**members: Any) -> ConfigSpec:
    return ConfigSpec.model_construct(set(members), **members)


# --- ids -------------------------------------------------------------------------------------------------------------


def test_names_and_values_are_hashed_in_order() -> None:
    assert hash_attributes([("foo", "one"), ("bar", "two")]) == "28e758ec870964c8"  # V1
    assert hash_attributes([("bar", "two"), ("foo", "one")]) != "28e758ec870964c8"


@pytest.mark.parametrize(
    ("container_file", "conda_file", "platform", "repository", "more", "wanted"),
    [
        ("FROM foo", None, "linux/amd64", "wave/build", {}, "7efaa2ed59c58a16"),
        ("FROM foo", None, "linux/arm64", "wave/build", {}, "be9ee6ac1eeff4b5"),
        ("FROM foo", "some::conda-recipe", "linux/arm64", "wave/build", {}, "c6dac2e544419f71"),
        ("FROM foo:latest", None, "linux/amd64", "foo.com/repo", {}, "af15cb0a413a2d48"),
        ("FROM foo", None, "linux/amd64", "docker.io/wave", {"context": CONTEXT}, "181ec22b26ae6d04"),
        ("FROM foo", INDENTED, "linux/amd64", "docker.io/wave", {"context": CONTEXT}, "8026e3a63b5c863f"),
        ("From: foo", None, "linux/amd64", "docker.io/wave", {"context": CONTEXT}, "d78ba9cb01188668"),
        (
            "FROM foo",
            None,
            "linux/amd64",
            "wave/build",
            {"context": Layer("data:", "sha256:aa", 1, "sha256:1234")},
            "ecf1947cff80c11c",
        ),
        (
            "FROM foo",
            None,
            "linux/amd64",
            "docker.io/acme/frozen",
            {"config": config(env=["FOO=one"], layers=[])},
            "09581ef8cf4100fb",
        ),
        (
            "FROM foo",
            None,
            "linux/amd64",
            "docker.io/acme/frozen",
            {"config": config(env=["FOO=two"])},
            "cf513e65e66d8f5b",
        ),
        ("FROM ubuntu:latest", None, "linux/amd64", "docker.io/wave", {}, "33d3626c806a9022"),
        ("FROM ubuntu:latest", None, "linux/amd64,linux/arm64", "docker.io/wave", {}, "19bc00e2e889a343"),
    ],
)
def test_container_ids_are_those_of_the_service(
    container_file: str, conda_file: str | None, platform: str, repository: str, more: dict[str, Any], wanted: str
) -> None:  # V2
    found = container_id(
        container_file=container_file, conda_file=conda_file, platform=platform, repository=repository, **more
    )
    assert found == wanted


def test_a_config_that_changes_nothing_is_not_in_the_id() -> None:
    plain = container_id(container_file="FROM foo", platform="linux/amd64", repository="wave/build")
    asked: dict[str, Any] = {"container_file": "FROM foo", "platform": "linux/amd64", "repository": "wave/build"}
    assert container_id(**asked, config=config(env=[], layers=None)) == plain
    assert container_id(**asked, included=(CONTEXT,)) != plain
    assert container_id(**asked, cache="") == plain
    assert len({plain, *(container_id(**asked, cache=cache) for cache in ("quay.io/a/cache", "quay.io/b/cache"))}) == 3


FUSION = {
    "location": "https://fusionfs.seqera.io/releases/pkg/2/4/fusion-amd64.tar.gz",
    "gzip_digest": "sha256:aa",
    "gzip_size": 100,
    "tar_digest": "sha256:bb",
}
ALL = {
    "entrypoint": ["/my", "--entry"],
    "cmd": ["/this", "--that"],
    "env": ["FOO=one", "BAR=two"],
    "working_dir": "/some/work/dir",
}


@pytest.mark.parametrize(
    ("members", "wanted"),
    [
        ({"env": ["FOO=one"], "layers": []}, 1549538286),
        ({"env": ["FOO=one"]}, 1549538286),
        ({"layers": None}, 28629151),
        ({"layers": []}, 28629152),
        ({}, 28629152),
        (ALL, -1794521482),
    ],
)
def test_configs_hash_as_in_the_service(members: dict[str, Any], wanted: int) -> None:  # V3
    assert hash_config(config(**members)) == wanted


def test_layers_hash_as_in_the_service() -> None:  # V3: the layer alone, in the hash of a config of nothing else
    layer = Layer(**FUSION)  # type: ignore[arg-type]
    wanted = 31**5 + (31 + 704265222)
    assert hash_config(config(), (layer,)) == (wanted + 2**31) % 2**32 - 2**31


def test_a_wire_object_keeps_whether_layers_were_null_or_missing() -> None:
    wires: list[dict[str, Any]] = [{}, {"layers": []}, {"layers": None}]
    found = [hash_config(ConfigSpec.model_validate(wire)) for wire in wires]
    assert found == [28629152, 28629152, 28629151]


@pytest.mark.parametrize("length", [0, 1, 4095, 4096, 4097, 20_000])
def test_long_texts_hash_in_blocks(length: int) -> None:
    text, plain = "é🎉x"[:length] + "a" * max(0, length - 4), 0
    for unit in memoryview(text.encode("utf-16-le")).cast("H"):
        plain = (31 * plain + unit) % 2**32
    wanted = 31 * (31 * 31**3 + plain) + 1  # the working directory is the fourth of five
    assert hash_config(config(working_dir=text)) == (wanted + 2**31) % 2**32 - 2**31


# --- names -----------------------------------------------------------------------------------------------------------

ZIP = "https://github.com/acme/x.zip"
V9: list[tuple[list[Any], str, str]] = [
    ([], "foo.com/build:123", "foo.com/build:123"),
    (["samtools=1.0"], "foo.com/build:samtools-1.0--123", "foo.com/build/samtools:1.0--123"),
    (
        ["samtools=1.0", "bamtools=2.0", "multiqc=1.15"],
        "foo.com/build:samtools-1.0_bamtools-2.0_multiqc-1.15--123",
        "foo.com/build/samtools_bamtools_multiqc:123",
    ),
    (
        ["samtools=1.0", "bamtools=2.0", "multiqc=1.15", "bwa=1.2.3", "xx", "yy", "zz"],
        "foo.com/build:samtools-1.0_bamtools-2.0_multiqc-1.15_bwa-1.2.3_pruned--123",
        "foo.com/build/samtools_bamtools_multiqc_bwa_pruned:123",
    ),
    (["pip", {"pip": ["pandas==2.2.2"]}], "foo.com/build:pip_pandas-2.2.2--123", "foo.com/build/pip_pandas:123"),
    (
        ["pip", {"pip": ["pandas==2.2.2", "numpy=1.0"]}],
        "foo.com/build:pip_pandas-2.2.2_numpy-1.0--123",
        "foo.com/build/pip_pandas_numpy:123",
    ),
    (["pip", {"pip": [ZIP]}], "foo.com/build:pip--123", "foo.com/build/pip:123"),
    (["bwa", "pip", {"pip": [ZIP, ZIP, ZIP]}], "foo.com/build:bwa_pip--123", "foo.com/build/bwa_pip:123"),
]


def environment(dependencies: list[Any]) -> str:
    lines = ["dependencies:"] if dependencies else []
    for item in dependencies:
        lines += [f"- {item}"] if isinstance(item, str) else ["- pip:", *(f"  - {name}" for name in item["pip"])]
    return "\n".join(lines)


@pytest.mark.parametrize(("dependencies", "prefixed", "suffixed"), V9)
def test_images_are_named_by_strategy(dependencies: list[Any], prefixed: str, suffixed: str) -> None:  # V9
    text = environment(dependencies)
    assert target_image("foo.com/build", "123", text, None) == prefixed
    assert target_image("foo.com/build", "123", text, "tagPrefix") == prefixed
    assert target_image("foo.com/build", "123", text, "imageSuffix") == suffixed
    assert target_image("foo.com/build", "123", text, "none") == "foo.com/build:123"
    assert target_image("foo.com/build", "123", text, "tagPrefix", singularity=True) == f"oras://{prefixed}"
    assert target_image("foo.com/build", "123", text, "imageSuffix", singularity=True) == f"oras://{suffixed}"


def test_recipe_names() -> None:  # V10
    names = ["salmon>=1.6.0", "fastqc<=0.11.9", "bioconda::multiqc=1.11", "samtools", "bwa>0.1", "bowtie2<0.2"]
    packages = read_packages(environment([*names, "mem==0.3"]))
    assert [str(package) for package in packages] == [
        "salmon-1.6.0",
        "fastqc-0.11.9",
        "multiqc-1.11",
        "samtools",
        "bwa-0.1",
        "bowtie2-0.2",
        "mem-0.3",
    ]
    assert read_packages("name: rnaseq-nf\n" + environment(names)) == (Package("rnaseq-nf"),)


@pytest.mark.parametrize(
    ("text", "tag", "name"),
    [
        ("", "", ""),
        ("foo", "foo", "foo"),
        ("FOO123", "FOO123", "foo123"),
        ("aa-bb_cc.dd", "aa-bb_cc.dd", "aa-bb_cc.dd"),
        ("foo/bar", "foobar", "foo/bar"),
        ("one(two)three", "onetwothree", "onetwothree"),
        ("12345_67890_12345", "12345_67890", "12345_67890"),
        ("123456789012345_1", "123456789012", "123456789012"),
        ("aa__", "aa", "aa"),
        ("aa..--__", "aa", "aa"),
        ("..--__bb", "bb", "bb"),
        ("._-xyz._-", "xyz", "xyz"),
    ],
)
def test_names_are_normalised(text: str, tag: str, name: str) -> None:  # V11
    assert normalise_tag(text, 12) == tag
    assert normalise_name(text, 12) == name


@pytest.mark.parametrize(
    ("packages", "joined"),
    [
        ([("alpha", "1.0"), ("delta", ""), ("gamma", "3.0")], "alpha-1.0_delta_gamma-3.0"),
        ([("alpha", "1.0"), ("delta", ""), ("gamma", "")], "alpha-1.0_delta_gamma"),
        ([(name, str(n)) for n, name in enumerate("abcde", 1)], "a-1_b-2_c-3_d-4_e-5"),
        ([(name, str(n)) for n, name in enumerate("abcdef", 1)], "a-1_b-2_c-3_d-4_pruned"),
        ([(name, "") for name in "abcdef"], "a_b_c_d_pruned"),
    ],
)
def test_names_are_joined(packages: list[tuple[str, str]], joined: str) -> None:  # V12
    assert join_names(str(Package(*package)) for package in packages) == joined


HOSTILE = [
    "((()))",
    "'___'",
    "'..//..'",
    "'a//b/-c_/..d___e'",
    "'_libgcc_mutex'",
    "'x___y'",
    "'git+https://github.com/Acme/Tool.git@v1'",
    "'" + "n" * 600 + "=" + "1" * 600 + "'",
    "'日本語=1'",
    "'a b c'",
    "'=='",
    "'foo::'",
    "'numpy[version=\">=1\"]'",
    "null",
    "[[x]]",
    "'-rf=$(id)'",
]


@pytest.mark.parametrize("entry", HOSTILE)
def test_hostile_names_still_give_an_image_name(entry: str) -> None:
    strategies: tuple[NameStrategy | None, ...] = ("tagPrefix", "imageSuffix", None)
    for strategy, number in product(strategies, (1, 3, 9)):
        text = "dependencies:\n" + f"- {entry}\n" * number
        for repository in ("localhost:9090/local/build", f"foo.com/{'r' * 230}", f"foo.com/{'r' * 255}"):
            image = target_image(repository, "0123456789abcdef", text, strategy)
            reference = parse_reference(image)
            assert is_repository(reference.repository)
            assert is_tag(reference.reference)
            assert reference.reference.endswith("0123456789abcdef")
            assert "null" not in image
            assert str(reference).startswith(repository)


@pytest.mark.parametrize("entry", ["'((('", "'=='", "'日本語'"])
def test_names_that_nothing_is_left_of_give_the_id_alone(entry: str) -> None:
    text = f"dependencies:\n- {entry}\n"
    assert target_image("foo.com/build", "123", text, "tagPrefix") == "foo.com/build:123"
    assert target_image("foo.com/build", "123", text, "imageSuffix") == "foo.com/build:123"


BOMB = "a: &a [x]\n" + "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}' if n else '*a'] * 9)}]\n" for n in range(40))
MERGES = "a: &a {x: y}\n" + "".join(
    f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}' if n else '*a'] * 9)}]}}\n" for n in range(40)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB + "dependencies: *b39\n",
        BOMB + "name: *b39\n",
        MERGES,
        "[" * 37_000,
        "{a: " * 9_000,
        "? " * 18_000,
        "- " * 18_000,
        "&a [*a]",
        "a: &a\n  b: *a",
        "!!python/object/apply:os.system [id]",
        "{[a]: b}",
        "? {a: b}\n: c",
        "dependencies: 7",
        "dependencies:\n- [a, b]\n- {conda: [c]}\n- {pip: d}\n- {pip: [[e]]}",
        "a: b: c",
        "\x07",
        "%YAML 9.9\n---\nname: [",
        "a\n---\nb",
        "",
        "just text",
        "name:",
        "name: null\ndependencies: [null, ~]",
    ],
    ids=repr,
)
def test_files_that_can_not_be_read_name_nothing(text: str) -> None:
    assert read_packages(text) == ()


def test_a_file_of_aliases_is_written_again_no_larger() -> None:
    written = add_channels(BOMB, ["bioconda"])
    assert len(written) < 4 * len(BOMB)
    assert written.endswith("channels:\n- bioconda\n")


# --- environment files -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entries", "channels", "wanted"),
    [
        ("foo=1.0 'bar>=2.0'", [], "dependencies:\n- foo=1.0\n- bar>=2.0\n"),
        (
            "foo=1.0 bar=2.0 pip:numpy pip:pandas",
            ["channel_a", "channel_b"],
            "channels:\n- channel_a\n- channel_b\ndependencies:\n- foo=1.0\n- bar=2.0\n- pip\n- pip:\n"
            "  - numpy\n  - pandas\n",
        ),
        (
            "pip:numpy pip:panda pip:matplotlib",
            ["defaults"],
            "channels:\n- defaults\ndependencies:\n- pip\n- pip:\n  - numpy\n  - panda\n  - matplotlib\n",
        ),
        ("pip pip:numpy", [], "dependencies:\n- pip\n- pip:\n  - numpy\n"),
        ("", [], ""),
        ("  '' \"\" ", ["conda-forge"], ""),
    ],
)
def test_entries_become_an_environment_file(entries: str, channels: list[str], wanted: str) -> None:  # V13
    assert write_environment([entries], channels) == wanted
    assert write_environment(entries.split(), channels) == wanted


def test_a_wrong_pip_prefix_is_explained() -> None:  # V13
    with pytest.raises(RequestInvalid, match=r"^Invalid pip prefix - Likely you want to use 'pip:numpy' instead of"):
        write_environment(["pip::numpy"], [])


@pytest.mark.parametrize(
    "word", ["yes", "null", "1.10", "~", "- x", "{a", "a: b", "#", "*x", "&x", "!x", "%x", "@x", "`"]
)
def test_words_stay_words_in_the_environment_file(word: str) -> None:
    written = write_environment([word.replace(" ", "")], [word])
    assert yaml.safe_load(written) == {"channels": [word], "dependencies": [word.replace(" ", "")]}
    assert add_channels(written, [word]) == written


@pytest.mark.parametrize(
    ("before", "channels", "after"),
    [
        (
            "dependencies:\n- salmon=1.2.3\n",
            ["ch1", "ch2"],
            "dependencies:\n- salmon=1.2.3\nchannels:\n- ch1\n- ch2\n",
        ),
        (
            "channels: [hola, ciao]\ndependencies: [salmon]",
            ["bioconda", "ciao", "bioconda"],
            "channels:\n- hola\n- ciao\n- bioconda\ndependencies:\n- salmon\n",
        ),
        ("dependencies: [ x=1.10 ] # as it is", [], "dependencies: [ x=1.10 ] # as it is"),
        ("channels:\nversion: 1.10\n", ["a"], "channels:\n- a\nversion: '1.10'\n"),
    ],
)
def test_channels_are_added_to_an_environment(before: str, channels: list[str], after: str) -> None:  # V13
    assert add_channels(before, channels) == after


@pytest.mark.parametrize("text", ["a: b: c", "- a", "text", "[" * 5000])
def test_channels_need_a_file_that_can_be_read(text: str) -> None:
    with pytest.raises(RequestInvalid, match=r"packages\.environment: not a Conda environment file"):
        add_channels(text, ["bioconda"])


@pytest.mark.parametrize(
    ("text", "trimmed"),
    [("''foo''", "foo"), ("\" ' foo ' \"", " foo "), ('"foo', '"foo'), ("foo", "foo"), ("'", "'"), ("''", "")],
)
def test_quotes_are_trimmed(text: str, trimmed: str) -> None:  # V13
    assert trim_quotes(text) == trimmed


# --- where it goes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("build", "cache", "wanted"),
    [
        ("", "", "default/cache"),
        ("default/build", "", "default/cache"),
        ("default/build", "default/cache", "default/cache"),
        ("default/build/deeper", "", "default/cache"),
        ("default/builder", "", ""),
        ("custom/repo", "", ""),
        ("custom/repo", "custom/cache", "custom/cache"),
        ("", "custom/cache", "custom/cache"),
    ],
)
def test_only_builds_to_the_default_repository_share_its_cache(build: str, cache: str, wanted: str) -> None:  # V21
    assert cache_repository(build, cache, default_build="default/build", default_cache="default/cache") == wanted


def test_without_defaults_every_repository_is_custom() -> None:
    assert is_custom("foo/bar", "", "")
    assert not is_custom("", "foo/bar")
