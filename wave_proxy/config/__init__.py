"""The settings: one frozen object, read once from a TOML file and the environment, which wins, and handed down.

Only ``__main__`` modules read it; everything else is handed the values that it needs.
"""

from wave_proxy.config.loading import ConfigInvalid, hand_down, load, receive
from wave_proxy.config.model import (
    BuildSettings,
    PlatformSettings,
    QuotaSettings,
    ScanSettings,
    SecurityHeaderSettings,
    Settings,
)

__all__ = [
    "BuildSettings",
    "ConfigInvalid",
    "PlatformSettings",
    "QuotaSettings",
    "ScanSettings",
    "SecurityHeaderSettings",
    "Settings",
    "hand_down",
    "load",
    "receive",
]
