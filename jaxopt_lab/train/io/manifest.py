"""The manifest of a run: what each of its starts worked with, besides the configuration."""

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import jaxopt_lab
from jaxopt_lab.report.files import read_json, write_json
from jaxopt_lab.report.storage import path_of

MANIFEST_FILE = "manifest.json"
_PACKAGES = ("jax", "jaxlib", "optax", "flax", "orbax-checkpoint", "grain", "numpy", "tokenizers")


def add_session(
    directory: Path, session: Mapping[str, Any], before: Mapping[str, Any] | None = None
) -> None:
    """Appends one start of the run to the manifest.

    Args:
      directory: The run.
      session: The start.
      before: Configuration of earlier starts that kept none; the run has had one until now.
    """
    manifest = read_manifest(directory)
    for earlier in manifest["sessions"]:
        if before is not None:
            earlier.setdefault("config", dict(before))
    manifest["sessions"].append(dict(session))
    write_json(directory / MANIFEST_FILE, manifest)


def samples_before(directory: str | os.PathLike[str], step: int, batch_size: int) -> int:
    """Windows that a run consumed in its first steps: those of each start, with its batch size.

    Args:
      directory: The run.
      step: Number of steps.
      batch_size: Of starts whose configuration was not kept.
    """
    samples, end = 0, step
    for session in reversed(read_manifest(directory)["sessions"]):
        # A start from the end of these steps or later has taken none of them.
        if (start := session["start_step"]) < end:
            samples += (end - start) * session.get("config", {}).get("batch_size", batch_size)
            end = start
    return samples + end * batch_size


def read_manifest(directory: str | os.PathLike[str]) -> dict[str, Any]:
    """The manifest, with all starts so far; an empty one if there is none yet.

    Raises:
      ValueError: If it is damaged; names the file.
    """
    path = path_of(directory) / MANIFEST_FILE
    manifest = read_json(path) if path.is_file() else {"sessions": []}
    sessions = manifest.get("sessions") if isinstance(manifest, dict) else None
    if not isinstance(sessions, list) or not all(_is_session(each) for each in sessions):
        raise ValueError(f"{path}: expected an object with a list of sessions")
    return manifest


def _is_session(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and isinstance(value.get("start_step"), int)
        and isinstance(value.get("config", {}), dict)
    )


def describe_session(
    mesh: Mesh, start_step: int, corpus: Mapping[str, Any], compiler_options: Mapping[str, Any]
) -> dict[str, Any]:
    """What a result depends on besides the configuration, as JSON."""
    devices = mesh.devices.flatten()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "start_step": start_step,
        "versions": _versions(),
        "git_commit": _git_commit(),
        "devices": {
            "platform": devices[0].platform,
            "kind": devices[0].device_kind,
            "count": len(devices),
            "processes": jax.process_count(),
        },
        "mesh": dict(mesh.shape),
        "corpus": dict(corpus),
        "determinism": {
            "compiler_options": {name: str(value) for name, value in compiler_options.items()},
            "xla_flags": os.environ.get("XLA_FLAGS", ""),
        },
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "jaxopt-lab": _version("jaxopt-lab")}
    return versions | {name: _version(name) for name in _PACKAGES}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _git_commit() -> str | None:
    """The commit of the library's own sources, if they are a checkout."""
    source = Path(jaxopt_lab.__file__).parent
    command = ["git", "-C", str(source), "rev-parse", "HEAD"]
    if not (source.parent / ".git").exists():
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
