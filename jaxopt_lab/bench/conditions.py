"""What a result depends on: the device and the versions."""

import importlib.metadata

import jax


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
