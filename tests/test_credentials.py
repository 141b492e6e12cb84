"""Configured logins: which applies to whom, and what the configuration says of tables that can't be."""

from pathlib import Path

import pytest

from wave_proxy.config.handed import ConfigInvalid
from wave_proxy.config.loading import load
from wave_proxy.config.model import Settings
from wave_proxy.config.writing import to_toml
from wave_proxy.upstream.credentials import Credentials, Login
from wave_proxy.upstream.tables import read_credentials, read_endpoints, read_limits

HOST, TEAM, CORE = Login("host", "1"), Login("team", "2"), Login("core", "3")
LOGINS = Credentials(
    {"quay.io": HOST, "quay.io/acme": TEAM, "quay.io/acme/core": CORE, "ghcr.io": TEAM},
    {"quay.io/acme": ["*@acme.org"], "quay.io/acme/core": ["Alice@acme.org", "bob@else.org"], "ghcr.io": ["*"]},
)

TABLES = Credentials(
    {place: Login("user", "secret", f'[registries."{place}"]') for place in LOGINS._logins}, LOGINS._users
)


@pytest.mark.parametrize(
    ("registry", "repository", "email", "login"),
    [
        ("quay.io", "other/tool", "", HOST),
        ("quay.io", "", "", HOST),
        ("quay.io", "acme", "carl@acme.org", TEAM),
        ("quay.io", "acme/tool", "carl@acme.org", TEAM),
        ("quay.io", "acme/tool", "CARL@ACME.org", TEAM),
        ("quay.io", "acmecorp/tool", "carl@acme.org", HOST),  # a border lies between path segments only
        ("quay.io", "acme/tool", "", HOST),
        ("quay.io", "acme/tool", "carl@evil-acme.org", HOST),
        ("quay.io", "acme/tool", "carl@acme.org@else.org", HOST),
        ("quay.io", "acme/core", "alice@acme.org", CORE),
        ("quay.io", "acme/core/x/y", "alice@acme.org", CORE),
        ("quay.io", "acme/core/x", "carl@acme.org", TEAM),
        ("quay.io", "acme/core/x", "bob@else.org", CORE),
        ("quay.io", "acme/tool", "bob@else.org", HOST),
        ("ghcr.io", "acme/tool", "carl@acme.org", TEAM),
        ("ghcr.io", "acme/tool", "", None),
        ("docker.io", "quay.io/acme", "carl@acme.org", None),
        ("evil.io", "acme/tool", "alice@acme.org", None),
    ],
)
def test_which_login(registry: str, repository: str, email: str, login: Login | None) -> None:
    assert LOGINS.find(registry, repository, email) == login
    assert LOGINS.of(email).find(registry, repository) == login


def test_ones_own_logins_come_first() -> None:
    mine = LOGINS.of("carl@acme.org", [("quay.io", "me", "secret")])
    assert mine.find("quay.io", "acme/tool") == Login("me", "secret")
    assert mine.find("ghcr.io", "acme/tool") == TEAM
    assert LOGINS.find("quay.io", "acme/tool") == HOST


CHECK, SET = "check username and password in", "if it exists and is private, set username and password in"
OTHERS = 'the login in [registries."{}"] is for other users'


@pytest.mark.parametrize(
    ("registry", "repository", "email", "advice"),
    [
        ("ghcr.io", "x/tool", "", OTHERS.format("ghcr.io")),
        ("ghcr.io", "x/tool", "ada@else.org", f'{CHECK} [registries."ghcr.io"]'),
        ("docker.io", "x/tool", "ada@else.org", f'{SET} [registries."docker.io"]'),
        ("quay.io", "other/tool", "", f'{CHECK} [registries."quay.io"]'),
        ("quay.io", "acme/tool", "", f'{CHECK} [registries."quay.io"]; {OTHERS.format("quay.io/acme")}'),
        ("quay.io", "acme/tool", "carl@acme.org", f'{CHECK} [registries."quay.io/acme"]'),
        (
            "quay.io",
            "acme/core/x",
            "carl@acme.org",
            f'{CHECK} [registries."quay.io/acme"]; {OTHERS.format("quay.io/acme/core")}',
        ),
        ("quay.io", "acme/core/x", "bob@else.org", f'{CHECK} [registries."quay.io/acme/core"]'),
    ],
)
def test_what_is_said_to_who_is_refused(registry: str, repository: str, email: str, advice: str) -> None:
    found = TABLES.find(registry, repository, email)
    assert TABLES.of(email).advise(registry, repository) == advice
    narrowed = TABLES.only(registry, found)
    assert narrowed.advise(registry, repository) == advice
    assert (narrowed.find(registry, repository), narrowed.find("else.io", repository)) == (found, None)
    assert "acme.org" not in advice


def test_what_is_said_to_a_user_of_a_platform() -> None:
    assert TABLES.only(advice="look there").advise("ghcr.io", "x/tool") == "look there"
    assert TABLES.only("ghcr.io", HOST, "look there").advise("ghcr.io", "x/tool").startswith(CHECK)


@pytest.mark.parametrize(
    ("registry", "repository", "restricted"),
    [("quay.io", "other", False), ("quay.io", "acme/x", True), ("ghcr.io", "x", True), ("docker.io", "x", False)],
)
def test_where_a_login_is_for_some_only(registry: str, repository: str, *, restricted: bool) -> None:
    assert LOGINS.is_restricted(registry, repository) is restricted


def test_a_key_says_nothing_and_changes_with_the_login() -> None:
    login = Login("me", "secret", "here")
    assert "secret" not in repr(login)
    assert login.key not in repr(login)
    assert login == Login("me", "secret", "there")
    assert login.key == Login("me", "secret", "there").key
    assert len({login.key, Login("me", "other").key, Login("m", "esecret").key, Login("you", "secret").key}) == 4


# --- the configuration -----------------------------------------------------------------------------------------------


def loaded(tmp_path: Path, text: str) -> Settings:
    file = tmp_path / "wave.toml"
    file.write_text(text)
    return load(file, {})


GOOD = """
[registries."quay.io"]
endpoint = "https://mirror.example"
[registries."quay.io/acme"]
username = "me"
password = "secret"
users = ["alice@acme.org", "*@acme.org", "*"]
"""


def test_tables_of_repositories(tmp_path: Path) -> None:
    settings = loaded(tmp_path, GOOD)
    assert set(read_endpoints(settings.registries)) == {"quay.io"}
    read_limits(settings.registries, 4, 2)
    found = read_credentials(settings.registries).find("quay.io", "acme/x", "alice@acme.org")
    assert found == Login("me", "secret")
    assert found.source == '[registries."quay.io/acme"]'
    again = loaded(tmp_path, to_toml(settings))
    assert again.registries["quay.io/acme"].users == settings.registries["quay.io/acme"].users


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[registries."quay.io/acme"]\nendpoint = "http://x"\n', "may only hold a login"),
        ('[registries."quay.io/acme"]\nusername = "a"\npassword = "b"\ninsecure = true\n', "not insecure"),
        ('[registries."quay.io/acme"]\nusers = ["a@b.c"]\n', "username and password are missing"),
        ('[registries."quay.io/acme"]\n', "username and password are missing"),
        ('[registries."quay.io/Acme"]\nusername = "a"\npassword = "b"\n', "neither a registry host"),
        ('[registries."quay.io/acme/"]\nusername = "a"\npassword = "b"\n', "neither a registry host"),
        ('[registries."quay.io/"]\nusername = "a"\npassword = "b"\n', "neither a registry host"),
        ('[registries."quay.io/a/../b"]\nusername = "a"\npassword = "b"\n', "neither a registry host"),
        ('[registries."quay.io"]\nusers = ["a@b.c"]\n', "users says whom a login is for"),
        (
            '[registries."quay.io"]\nusername = "a"\npassword = "b"\nusers = ["acme.org"]\n',
            "expected an e-mail",
        ),
        ('[registries."quay.io"]\nusername = "a"\npassword = "b"\nusers = ["*@*"]\n', "expected an e-mail"),
        ('[registries."quay.io"]\nusername = "a"\npassword = "b"\nusers = ["a*@b.c"]\n', "expected an e-mail"),
    ],
)
def test_tables_that_can_not_be(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigInvalid) as caught:
        loaded(tmp_path, text)
    assert said in str(caught.value)
    assert "secret" not in str(caught.value)
