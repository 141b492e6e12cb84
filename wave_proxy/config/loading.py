"""The settings read, once, from a TOML file and the environment, which wins."""

import os
from collections.abc import Mapping
from pathlib import Path
from tomllib import TOMLDecodeError
from typing import Any

from pydantic import ValidationError

from wave_proxy.config.handed import ConfigInvalid
from wave_proxy.config.model import Settings


def load(config_file: Path | None, overrides: Mapping[str, Any]) -> Settings:
    """The effective settings: ``overrides`` (from the command line), else environment, else file, else defaults.

    Raises ConfigInvalid.
    """
    from wave_proxy.config.mistakes import explain, explain_file, explain_variable

    if config_file is not None and not config_file.is_file():
        why = "is no file" if config_file.exists() else "does not exist"
        raise ConfigInvalid(f"configuration file {config_file} {why}")

    try:
        found = _sources(config_file)(**overrides)
        return Settings.model_construct(**dict(found))
    except ValidationError as err:
        variables = {name: text for name, text in os.environ.items() if name[5:].lower() not in overrides}
        raise ConfigInvalid("; ".join(explain(error, variables) for error in err.errors())) from None
    except (TOMLDecodeError, UnicodeDecodeError, OSError) as err:
        raise ConfigInvalid(explain_file(config_file or Path(), err)) from None
    except ValueError as err:  # JSON in an environment variable
        raise ConfigInvalid(explain_variable(err, os.environ)) from None


def _sources(config_file: Path | None) -> type[Settings]:
    # Here and not above: it takes 9 MB and 80 ms, and who gets the settings handed down does without.
    from pydantic_settings import (
        BaseSettings,
        PydanticBaseSettingsSource,
        SettingsConfigDict,
        TomlConfigSettingsSource,
    )

    class Sources(Settings, BaseSettings):
        model_config = SettingsConfigDict(
            env_prefix="WAVE_",
            env_nested_delimiter="__",
            frozen=True,
            extra="forbid",
            nested_model_default_partial_update=True,
        )

        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            return init_settings, env_settings, TomlConfigSettingsSource(settings_cls, toml_file=config_file)

    return Sources
