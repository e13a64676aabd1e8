"""What all reports have: the device and the versions, and their form as JSON."""

import dataclasses
import importlib.metadata
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of a benchmark; its text is a table with the conditions above it."""

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return dataclasses.asdict(self)


def device_name() -> str:
    """Number and kind of the devices."""
    devices = jax.devices()
    return f"{len(devices)} x {devices[0].device_kind}"


def versions(*packages: str) -> dict[str, str]:
    """Installed versions of packages."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"  # run from a checkout
    return found
