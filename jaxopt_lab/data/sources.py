"""Where documents come from: Python source, text files, mixtures; `prepared` has the others."""

import fnmatch
import glob
import gzip
import json
import os
import re
import site
import sysconfig
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from jaxopt_lab.data import groups
from jaxopt_lab.data.decoding import decode, printable
from jaxopt_lab.data.documents import Document, encodable
from jaxopt_lab.data.prepared import PreparedTfds, PreparedTokens
from jaxopt_lab.report.storage import origin, staged

_TEXT_SUFFIXES = (".txt", ".md", ".rst", ".jsonl")
# The standard library's own tests are generated tables for a good part; installed packages may
# lie inside the library's directory and are a root of their own.
_NOT_STDLIB = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclass(frozen=True)
class PythonSource:
    """Python source files, one document per `*.py` file.

    Needs no download: every machine that runs this has the standard library.
    """

    roots: tuple[str, ...] = ("stdlib",)
    """`stdlib` (the interpreter's library without its tests), `site-packages` (the standard
    library and every installed package), or directories."""

    @property
    def name(self) -> str:
        """Short name for tables and manifests."""
        return "python:" + "+".join(_short(root) for root in self.roots)

    def files(self) -> Iterator[Path]:
        """Yields the files that decide the documents and their groups."""
        for root in self.roots:
            for label, directory, skip in _python_trees(root):
                yield from _python_paths(directory, skip)
                if label == "site-packages":
                    yield from sorted(directory.glob("*.dist-info/RECORD"))

    def documents(self) -> Iterator[Document]:
        """Yields the documents, sorted by path within each root.

        Raises:
            ValueError: a root is not a directory or holds no `*.py` file.
        """
        if not self.roots:
            raise ValueError("PythonSource.roots is empty; give 'stdlib' or a directory")
        for root in self.roots:
            for label, directory, skip in _python_trees(root):
                yield from _python_files(label, directory, skip)


def _python_trees(root: str) -> Iterator[tuple[str, Path, frozenset[str]]]:
    """The (label, directory, directory names to skip) that a root stands for."""
    everything = frozenset({"__pycache__"})
    if root in ("stdlib", "site-packages"):
        yield "stdlib", Path(sysconfig.get_paths()["stdlib"]), _NOT_STDLIB
        installed = site.getsitepackages() if root == "site-packages" else []
        for directory in map(Path, installed):
            # Some of the interpreter's site directories may be absent or empty.
            if next(directory.glob("**/*.py"), None) is not None:
                yield "site-packages", directory, everything
        return
    directory = Path(staged(root)).expanduser()
    if not directory.is_dir():
        raise ValueError(
            f"PythonSource.roots: {root!r} is not a directory; give 'stdlib', 'site-packages' or "
            "an existing directory"
        )
    yield directory.name, directory, everything


def _python_files(label: str, directory: Path, skip: frozenset[str]) -> Iterator[Document]:
    paths = list(_python_paths(directory, skip))
    if not paths:
        raise ValueError(f"PythonSource.roots: no *.py file below {directory}")
    installed = label == "site-packages"
    of = groups.of_installed(directory, paths) if installed else groups.of_files(paths)
    for path, group in zip(paths, of, strict=True):
        name = f"{label}/{path.relative_to(directory).as_posix()}"
        yield Document(printable(name), *decode(path.read_bytes()), group)


def _python_paths(directory: Path, skip: frozenset[str]) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(directory):
        subfolders[:] = sorted(d for d in subfolders if d not in skip and not d.startswith("."))
        for file in sorted(files):
            path = Path(folder, file)
            if path.suffix == ".py" and path.is_file():
                yield path


@dataclass(frozen=True)
class TextFiles:
    """Text files: one document per txt, md or rst file, one per row of a jsonl file."""

    paths: tuple[str, ...] = ()
    """Files, directories (searched recursively) or globs (`**` recurses) of txt, md, rst and
    jsonl, each also as .gz."""
    text_field: str = "text"
    """The field of a jsonl row that holds the document."""

    @property
    def name(self) -> str:
        """Short name for tables and manifests."""
        return "text:" + "+".join(_short(path) for path in self.paths)

    def files(self) -> Iterator[Path]:
        """Yields the files that decide the documents."""
        yield from self._files()

    def documents(self) -> Iterator[Document]:
        """Yields the documents, sorted by path, rows of a jsonl file in order.

        Raises:
            ValueError: no file matches, a file is of another type or damaged, or a jsonl row has
                no text field (the message names file and line).
        """
        files = self._files()
        for path, group in zip(files, groups.of_files(map(origin, files)), strict=True):
            opener: Any = gzip.open if path.suffix == ".gz" else open
            try:
                with opener(path, "rb") as stream:
                    if _text_suffix(path) == ".jsonl":
                        yield from self._rows(path, stream)
                    else:
                        yield Document(printable(path), *decode(stream.read()), group)
            except (gzip.BadGzipFile, EOFError, zlib.error) as error:
                raise ValueError(
                    f"TextFiles: {printable(path)} is not a complete gzip file: {error}"
                ) from None

    def _files(self) -> list[Path]:
        files: dict[str, Path] = {}
        for pattern in self.paths:
            matches = list(_matches(os.path.expanduser(staged(pattern))))
            readable = [path for path in matches if _text_suffix(path) in _TEXT_SUFFIXES]
            if not readable:
                count = f"{len(matches)} files, none of them" if matches else "no file"
                raise ValueError(
                    f"TextFiles.paths: {printable(pattern)!r} matches {count} with one of the "
                    f"suffixes {' '.join(_TEXT_SUFFIXES)} (or these with .gz)"
                )
            for path in sorted(readable):
                # Links give a file several paths; it is read once.
                files.setdefault(os.path.realpath(path), path)
        if not files:
            raise ValueError("TextFiles.paths is empty; give files, directories or globs")
        return sorted(files.values())

    def _rows(self, path: Path, stream: IO[bytes]) -> Iterator[Document]:
        for line, row in enumerate(stream, start=1):
            if not row.strip():
                continue
            where = f"{printable(path)}, line {line}"
            decoded = decode(row)
            try:
                fields = json.loads(decoded.text)
            except (ValueError, RecursionError) as error:
                reason = str(error).splitlines()[0]
                raise ValueError(f"TextFiles: {where}: not JSON: {reason}") from None
            text = fields.get(self.text_field) if isinstance(fields, dict) else None
            if not isinstance(text, str):
                raise ValueError(
                    f"TextFiles: {where}: wanted an object with a string in the field "
                    f"{self.text_field!r}, got {_describe_row(fields)}"
                )
            yield Document(f"{printable(path)}:{line}", encodable(text), decoded.replaced)


def _matches(pattern: str) -> Iterator[Path]:
    """Files at a path, below a directory or of a glob; a path that exists is no glob."""
    if os.path.isfile(pattern):
        yield Path(pattern)
        return
    parts = Path(glob.escape(pattern) if os.path.isdir(pattern) else pattern).parts
    # The library's `**` does not end where links form rings.
    first = parts.index("**") if "**" in parts else len(parts)
    rest = parts[first:] or (("**",) if os.path.isdir(pattern) else ())
    for base in glob.glob(str(Path(*parts[:first]))):
        if os.path.isfile(base) and not rest:
            yield Path(base)
        elif os.path.isdir(base) and rest:
            below = _below(base, set())
            yield from (path for path in below if _fits(path.relative_to(base).parts, rest))


def _fits(parts: Sequence[str], patterns: Sequence[str]) -> bool:
    """Whether the components of a path are those of a glob; `**` stands for any number of them."""
    if not patterns or (not parts and patterns[0] != "**"):
        return not patterns and not parts
    if patterns[0] == "**":
        return any(_fits(parts[i:], patterns[1:]) for i in range(len(parts) + 1))
    return fnmatch.fnmatch(parts[0], patterns[0]) and _fits(parts[1:], patterns[1:])


def _below(directory: str, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Files below a directory, hidden ones excepted; links are followed, but nowhere twice."""
    found = os.stat(directory)
    if (found.st_dev, found.st_ino) in seen:
        return
    seen.add((found.st_dev, found.st_ino))
    for entry in sorted(os.scandir(directory), key=lambda entry: entry.name):
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _below(entry.path, seen)
        elif entry.is_file():
            yield Path(entry.path)


def _describe_row(fields: object) -> str:
    if isinstance(fields, dict):
        return f"the fields {sorted(fields)}"
    return f"a JSON {type(fields).__name__}"


def _text_suffix(path: Path) -> str:
    return path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix


@dataclass(frozen=True)
class Mixture:
    """Several sources with sampling weights.

    The weights are the proportions of training *windows* drawn from each part. They change neither
    the tokenizer, which is trained on all training documents of all parts, nor the validation
    text, which holds the parts in their natural sizes.
    """

    parts: tuple[PythonSource | TextFiles | PreparedTfds | PreparedTokens, ...] = ()
    weights: tuple[float, ...] = ()
    """One positive number per part; normalised to sum to one. None at all means equal ones."""

    def __post_init__(self) -> None:
        """Checks the weights before anything is read."""
        if not self.parts:
            raise ValueError("Mixture.parts is empty; give at least one source")
        if not self.weights:
            object.__setattr__(self, "weights", (1.0,) * len(self.parts))
        if len(self.weights) != len(self.parts):
            raise ValueError(
                f"Mixture.weights has {len(self.weights)} entries for {len(self.parts)} parts; "
                "give one weight per part"
            )
        for weight in self.weights:
            if not 0 < weight < float("inf"):
                raise ValueError(
                    f"Mixture.weights = {self.weights}: {weight} is not a positive finite number; "
                    "drop the part instead of giving it no weight"
                )

    @property
    def name(self) -> str:
        """Short name for tables and manifests."""
        return "mixture(" + ", ".join(part.name for part in self.parts) + ")"


SinglePart = PythonSource | TextFiles | PreparedTfds | PreparedTokens
Source = SinglePart | Mixture

PARTS: dict[str, type[SinglePart]] = {
    "python-source": PythonSource,
    "text-files": TextFiles,
    "prepared-tfds": PreparedTfds,
    "prepared-tokens": PreparedTokens,
}
VALIDATION = "validation"
"""Name of the set that every run evaluates: the held-out documents of its corpus."""
CORPORA: dict[str, type[Source]] = {**PARTS, "mixture": Mixture}
"""The sources by name, and those that a mixture may have as parts."""


def part_from_text(text: str) -> SinglePart:
    """A source in short: its name, and after a colon what it reads.

    >>> part_from_text("text-files:a/*.txt,b.md").paths
    ('a/*.txt', 'b.md')

    Raises:
        ValueError: there is no such source.
    """
    name, _, argument = text.partition(":")
    if name not in PARTS:
        raise ValueError(
            f"parts: got {text!r}, expected python-source:ROOT[,...], text-files:GLOB[,...], "
            "prepared-tfds:DIRECTORY or prepared-tokens:DIRECTORY"
        )
    kind = PARTS[name]
    if not argument:
        return kind()
    if issubclass(kind, PreparedTfds | PreparedTokens):
        return kind(argument)
    return kind(tuple(argument.split(",")))


def sets_from_text(texts: Sequence[str]) -> dict[str, SinglePart | None]:
    """Sets to evaluate in short: a name and a source, or `train` for the training text.

    >>> sets_from_text(["notes=text-files:notes/*.md", "seen=train"])
    {'notes': TextFiles(paths=('notes/*.md',), text_field='text'), 'seen': None}

    Raises:
        ValueError: a name is missing, given twice, reserved or none, or there is no such source.
    """
    sets: dict[str, SinglePart | None] = {}
    for text in texts:
        name, equals, source = text.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name, re.ASCII):
            raise ValueError(f"got {text!r}, expected NAME=SOURCE, as notes=text-files:notes/*.md")
        if name == VALIDATION or name in sets:
            raise ValueError(f"got {text!r}, but there is a set {name} already")
        try:
            sets[name] = None if source == "train" else part_from_text(source)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return sets


def _short(path: str) -> str:
    """The telling end of a path or glob."""
    return "/".join(Path(path).parts[-2:])
