"""The operator's commands on a running service: what they print, what they do there, and what they can't do."""

import fcntl
import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tests.patience import PATIENCE_S
from tests.servers import ROOT, WaveProxy, redis_server
from tests.test_cli import one_line, run
from wave_proxy.admin import parse_expiry, token_table
from wave_proxy.errors import RequestInvalid
from wave_proxy.state.accounts import parse_hash
from wave_proxy.state.identities import AccessToken

NOW = datetime(2026, 11, 29, 8, 30, tzinfo=UTC)
TOKEN = re.compile(r"wpt-([a-z2-7]{8})-[a-z2-7]{32}\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The data folder of a program that runs."""
    folder = tmp_path_factory.mktemp("admin") / "data"
    with WaveProxy(folder):
        yield folder


def token(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return run("token", *arguments)


def create(data: Path, *arguments: str) -> str:
    """The id of a new token."""
    result = token("create", "--data", data, *arguments)
    match = TOKEN.fullmatch(result.stdout)
    assert match, result
    return match[1]


def listed(data: Path, *arguments: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(token("list", "--json", "--data", data, *arguments).stdout)
    return found


def test_a_token_is_printed_for_programs_and_explained_to_people(data: Path) -> None:
    result = token("create", "--data", data, "--user", "Ada@Example.org", "--expires", "2199-12-31", "--note", "laptop")
    assert result.returncode == 0
    match = TOKEN.fullmatch(result.stdout)
    assert match
    assert result.stderr == (
        f"Access token {match[1]} of ada@example.org, valid until 2199-12-31 23:59 UTC. It is not shown again.\n"
    )
    (found,) = listed(data, "--user", "ada@example.org")
    assert datetime.fromisoformat(str(found.pop("created"))).tzinfo == UTC
    assert found == {
        "id": match[1],
        "user": "ada@example.org",
        "userId": 105243131043720,
        "note": "laptop",
        "expires": "2199-12-31T23:59:59Z",
        "lastUsed": None,
        "revoked": None,
        "state": "valid",
    }


def test_the_table_has_a_line_a_token(data: Path) -> None:
    first = create(data, "--user", "tab@a.org", "--expires", "never", "--note", "a long note of the first")
    second = create(data, "--user", "tab@a.org")
    token("revoke", first, "--data", data)
    lines = token("list", "--data", data, "--user", "TAB@a.org").stdout.splitlines()
    rows = [re.split(r"  +", line) for line in lines]
    assert rows[0] == ["ID", "USER", "NOTE", "CREATED", "EXPIRES", "LAST USED", "STATE"]
    assert [(row[0], row[2], row[5], row[6]) for row in rows[1:]] == [
        (first, "a long note of the first", "never", "revoked"),
        (second, "-", "never", "valid"),
    ]
    assert rows[1][4] == "never"
    assert len({line.index(row[3]) for line, row in zip(lines, rows, strict=True)}) == 1


def test_tokens_are_revoked_by_id_by_themselves_and_by_user(data: Path) -> None:
    text = token("create", "--data", data, "--user", "rev@a.org").stdout.strip()
    others = [create(data, "--user", "rev@a.org") for _ in range(3)]
    assert token("revoke", text, "--data", data).stdout == f"Access token {text[4:12]} of rev@a.org is revoked.\n"
    assert "is already revoked" in token("revoke", text[4:12], "--data", data).stdout
    assert token("revoke", others[0], f"wpt-{others[1]}", "--data", data).returncode == 0
    assert [item["state"] for item in listed(data, "--user", "rev@a.org")] == ["revoked"] * 3 + ["valid"]
    assert token("revoke", "--user", "REV@a.org", "--data", data).stdout.count("\n") == 1
    assert {item["state"] for item in listed(data, "--user", "rev@a.org")} == {"revoked"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        pytest.param(["create", "--user", "ada"], "user: 'ada' is no e-mail address", id="user"),
        pytest.param(["create", "--user", "a@b", "--expires", "soon"], "expires: expected 12h, 30d", id="expires"),
        pytest.param(["create", "--user", "a@b", "--expires", "2020-01-01"], "expires: 2020-01-01T", id="over"),
        pytest.param(["create", "--user", "a@b", "--note", "x" * 300], "note: expected one line", id="note"),
        pytest.param(["revoke", "aaaaaaaa"], "there is no access token 'aaaaaaaa'", id="unknown id"),
        pytest.param(["revoke", "--user", "no@body"], "'no@body' has no access token", id="unknown user"),
        pytest.param(["revoke"], "name tokens by their ids, or a user", id="nothing to revoke"),
        pytest.param(["revoke", "aaaaaaaa", "--user", "a@b"], "name tokens by their ids, or a user", id="both"),
    ],
)
def test_what_can_not_be_done_is_said_in_one_line(data: Path, arguments: list[str], words: str) -> None:
    result = token(*arguments, "--data", data)
    assert result.returncode == 1
    assert result.stdout == ""
    assert words in one_line(result)


def test_nothing_is_revoked_when_one_id_is_wrong(data: Path) -> None:
    good = create(data, "--user", "all@a.org")
    assert token("revoke", good, "aaaaaaaa", "--data", data).returncode == 1
    assert [item["state"] for item in listed(data, "--user", "all@a.org")] == ["valid"]


def test_without_tokens_it_says_how_to_get_one(data: Path) -> None:
    result = token("list", "--data", data, "--user", "no@body")
    assert (result.returncode, result.stdout) == (0, "")
    assert "wave-proxy token create" in result.stderr


def test_a_redis_of_ones_own(tmp_path: Path) -> None:
    with redis_server(tmp_path) as url:
        assert token("create", "--redis", url, "--user", "ada@example.org").returncode == 0
        assert "ada@example.org" in token("list", "--redis", url).stdout


def test_where_nothing_runs(tmp_path: Path) -> None:
    said = one_line(token("list", "--data", tmp_path / "none"))
    assert f"no wave-proxy is running with the data folder {tmp_path}/none" in said
    assert "wave-proxy serve" in said
    assert not (tmp_path / "none").exists()
    result = token("list", "--redis", f"redis://:s3cret@127.0.0.1:1/{0}")
    assert result.stdout == ""
    said = one_line(result)
    assert "the Redis at 127.0.0.1:1 does not answer" in said
    assert "s3cret" not in said


def test_a_terminal_obeys_nothing_that_stands_in_redis() -> None:
    token = AccessToken("aaaaaaaa", "ada@example.org\x1b[2J", "\x1b]0;pwn\x07", 1.0, 0.0, 0.0, 0.0, "")
    assert token_table([token], 2.0).splitlines()[1].split()[:3] == [
        "aaaaaaaa",
        "ada@example.org\ufffd[2J",
        "\ufffd]0;pwn\ufffd",
    ]


def test_where_one_was_killed(tmp_path: Path) -> None:
    with WaveProxy(tmp_path / "data") as wave:
        wave.kill()
        assert "redis.sock does not answer" in one_line(token("list", "--data", tmp_path / "data"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("never", 0.0),
        ("12h", NOW.timestamp() + 12 * 3600),
        ("30d", NOW.timestamp() + 30 * 86400),
        ("8w", NOW.timestamp() + 56 * 86400),
        ("2026-12-31", datetime(2026, 12, 31, 23, 59, 59, tzinfo=UTC).timestamp()),
    ],
)
def test_when_a_token_ends(text: str, expected: float) -> None:
    assert parse_expiry(text, NOW) == expected


@pytest.mark.parametrize("text", ["", "30", "30 d", "-1d", "1y", "2026-13-01", "2026-1-1x", "99999w0", "never "])
def test_what_is_no_end(text: str) -> None:
    with pytest.raises(RequestInvalid, match="expires: expected"):
        parse_expiry(text, NOW)


# --- accounts --------------------------------------------------------------------------------------------------------


def hashed(text: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "wave_proxy", "account", "hash"]
    return subprocess.run(
        command, input=text, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S, check=False
    )


@pytest.mark.parametrize("text", ["correct horse", "correct horse\n", "correct horse\r\nnext line\n"])
def test_a_password_from_a_pipe(text: str) -> None:
    result = hashed(text)
    assert (result.returncode, result.stderr) == (0, "")
    assert parse_hash(result.stdout.strip()).matches("correct horse")


def test_no_password() -> None:
    result = hashed("\n")
    assert result.returncode == 1
    assert "the password is empty" in one_line(result)


def test_a_password_is_asked_for_without_an_echo() -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "wave_proxy", "account", "hash"]
    with subprocess.Popen(
        command,
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=theirs,
        cwd=ROOT,
        text=True,
        start_new_session=True,
        preexec_fn=_own_terminal,
    ) as process:
        os.close(theirs)
        shown = ""
        for question in ("Password: ", "Repeat for confirmation: "):
            while question not in shown:
                shown += os.read(ours, 1000).decode()
            os.write(ours, b"correct horse\n")
        assert process.stdout is not None
        text = process.stdout.read()
        assert process.wait(PATIENCE_S) == 0
    os.close(ours)
    assert "horse" not in shown
    assert parse_hash(text.strip()).matches("correct horse")


def _own_terminal() -> None:
    """Make the pseudo-terminal on standard input the one that passwords are asked for at."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_wrong_hash_is_found_at_once(tmp_path: Path) -> None:
    (tmp_path / "wave.toml").write_text('[accounts]\nadmin = "my-password"\n')
    for command in ("config", "serve"):
        result = run(command, "--config", tmp_path / "wave.toml", cwd=tmp_path)
        assert result.returncode == 2
        assert "accounts.admin: expected what `wave-proxy account hash` prints" in one_line(result)
        assert "my-password" not in result.stderr
