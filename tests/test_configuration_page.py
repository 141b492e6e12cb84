"""docs/configuration.md says what the code does."""

import os
import re
import subprocess
import sys
from pathlib import Path

from wave_proxy.config.loading import load
from wave_proxy.config.model import Settings

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "configuration.md"


def test_the_page_is_what_the_code_gives() -> None:
    script = ROOT / "scripts" / "document-configuration.py"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    written = subprocess.run([sys.executable, script], env=environment, check=True, capture_output=True, text=True)
    assert PAGE.read_text() == written.stdout, "docs/configuration.md is out of date: run `make docs`"


def test_the_page_has_every_key() -> None:
    page = PAGE.read_text()
    for key in Settings.model_fields:
        assert f"| `{key}` |" in page or f"## `[{key}]`" in page


def test_the_defaults_on_the_page_are_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "wave.toml"
    file.write_text(_as_toml(PAGE.read_text()))
    assert load(file, {}).model_dump() == load(None, {}).model_dump()


def _as_toml(page: str) -> str:
    """A configuration file made of the page's headings and the default column, up to the registries."""
    lines: list[str] = []
    for line in page.partition('## `[registries."')[0].splitlines():
        if heading := re.fullmatch(r"## `(\[\w+\])`", line):
            lines.append(heading[1])
        elif row := re.match(r"\| `(\w+)` \| `\w+` \| [^|]* \| `([^|]*)` \|", line):
            lines.append(f"{row[1]} = {row[2]}")
    assert len(lines) > len(Settings.model_fields)
    return "\n".join(lines)
