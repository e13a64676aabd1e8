"""Labelled texts: classes, and a training, a validation and a test part that never change."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxopt_lab.data import cache, packages
from jaxopt_lab.data.decoding import decode
from jaxopt_lab.report.storage import staged

_FORMAT = 1  # part of the cache key: raise it when the stored layout changes
SPLITS = "train", "validation", "test"


class LabelledText(NamedTuple):
    """One text, the number of its class, and an identifier that orders the rows of a split."""

    id: str
    text: str
    label: int


class LabelledSplit(NamedTuple):
    """The rows of one part."""

    ids: tuple[str, ...]  # ascending
    texts: tuple[str, ...]
    labels: np.ndarray  # int32 (rows,)


@dataclass(frozen=True)
class LabelledCorpus:
    """Labelled texts, split for good: the test part is for the end of a study."""

    name: str
    hash: str
    """Of classes, texts, labels and split."""
    classes: tuple[str, ...]
    """Names, in the order of their numbers."""
    train: LabelledSplit
    validation: LabelledSplit
    test: LabelledSplit
    repeated: Mapping[str, int]
    """Rows of the other parts whose text is a training text as well."""


class Labelled(NamedTuple):
    """What a source says: names of classes, and rows by the names of the parts."""

    classes: tuple[str, ...]
    rows: Mapping[str, Sequence[LabelledText]]


@dataclass(frozen=True)
class MovieSentences:
    """Sentences of film reviews, negative or positive, by the mean rating of 20 people.

    Sentences rated between -0.5 and 0.5 on the scale from -4 to 4 are left out. With `fold` f, the
    test part are those whose id ends in digit f, the validation part those in f + 1; over ten folds
    every sentence is tested once. These are not the sentences, labels and splits of SST-2, and
    accuracies cannot be compared with its.

    Source: Hutto, Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis of Social
    Media Text", ICWSM 2014; package movie-sentences of `jaxopt-lab data fetch`.
    """

    fold: int = 0
    """The last digit of the ids in the test part."""

    name = "movie-sentences"

    def __post_init__(self) -> None:
        """Checks the fold before anything is read."""
        if self.fold not in range(10):
            raise ValueError(f"MovieSentences.fold: got {self.fold!r}, wanted one of 0 to 9")

    def read(self, cache_dir: str | os.PathLike[str] | None = None) -> Labelled:
        """Reads the fetched package."""
        directory = packages.find("movie-sentences", cache_dir=cache_dir)
        path = directory / "movieReviewSnippets_GroundTruth.txt"
        parts = {self.fold: "test", (self.fold + 1) % 10: "validation"}
        rows: dict[str, list[LabelledText]] = {split: [] for split in SPLITS}
        for number, line in _lines(path):
            fields = line.split("\t", 2)
            if len(fields) != 3:
                raise ValueError(f"{path}, line {number}: wanted id, score and text, got {line!r}")
            score = float(fields[1])
            if abs(score) >= 0.5:
                row = LabelledText(f"{int(fields[0]):05d}", fields[2].strip(), int(score > 0))
                rows[parts.get(int(fields[0]) % 10, "train")].append(row)
        return Labelled(("negative", "positive"), rows)


@dataclass(frozen=True)
class Topics:
    """Posts of 20 newsgroups, lower case and without punctuation, and which group each is from.

    Test part as given; a tenth of the training posts, by a hash of the text, is for validation.
    Package topics of `jaxopt-lab data fetch`.
    """

    name = "topics"

    def read(self, cache_dir: str | os.PathLike[str] | None = None) -> Labelled:
        """Reads the fetched package."""
        directory = packages.find("topics", cache_dir=cache_dir)
        given = {
            split: list(_newsgroup_rows(directory / f"20newsgroups-{split}.tab"))
            for split in ("train", "test")
        }
        train: dict[str, list[_Named]] = {"train": [], "validation": []}
        for row in given["train"]:
            train[_hashed_split(row.text, 0.1, 0.0)].append(row)
        return _numbered({**train, "test": given["test"]}, _labels(given["train"]))


def _newsgroup_rows(path: Path) -> Iterator["_Named"]:
    for number, line in _lines(path):
        label, tab, text = line.partition("\t")
        if number > 3 and tab and label:  # three lines of header; some posts have no group
            yield _Named(f"{number:06d}", text.strip(), label, f"{path}, line {number}")


@dataclass(frozen=True)
class LabelledFiles:
    """Texts and labels of one's own, in csv or jsonl files.

    Where no validation or test file is given, rows of the training file are held out by a hash of
    their text, so that equal texts stay together and adding rows never moves another one.
    """

    train: str = ""
    """A csv file with a header, or a jsonl file."""
    validation: str | None = None
    test: str | None = None
    text_field: str = "text"
    """The column or field that holds the text."""
    label_field: str = "label"
    """The column or field that holds the label."""
    classes: tuple[str, ...] = ()
    """Names of the classes in the order of their numbers; by default the labels of the training
    file, sorted."""
    validation_fraction: float = 0.1
    """Share of the rows held out, where there is no file."""
    test_fraction: float = 0.1

    def __post_init__(self) -> None:
        """Checks the shares before anything is read."""
        for field in ("validation", "test"):
            share = getattr(self, f"{field}_fraction")
            if getattr(self, field) is None and not 0 < share < 0.5:
                raise ValueError(
                    f"LabelledFiles.{field}_fraction: got {share}, wanted a share in (0, 0.5)"
                )
        if len(set(self.classes)) != len(self.classes):
            raise ValueError(f"LabelledFiles.classes: got {self.classes}, wanted distinct names")

    @property
    def name(self) -> str:
        """Short name for tables and manifests."""
        return f"labelled-files:{Path(self.train).name}"

    def read(self, cache_dir: str | os.PathLike[str] | None = None) -> Labelled:
        """Reads the files."""
        del cache_dir
        given = {
            split: list(self._rows(Path(staged(path)).expanduser()))
            for split in SPLITS
            if (path := getattr(self, split)) is not None
        }
        shares = [
            0.0 if split in given else getattr(self, f"{split}_fraction")
            for split in ("validation", "test")
        ]
        rows: dict[str, list[_Named]] = {split: [] for split in SPLITS} | given | {"train": []}
        for row in given["train"]:
            rows[_hashed_split(row.text, *shares)].append(row)
        return _numbered(rows, self.classes or _labels(given["train"]))

    def _rows(self, path: Path) -> Iterator["_Named"]:
        readers = {".csv": _csv_rows, ".jsonl": _jsonl_rows}
        if path.suffix not in readers:
            raise ValueError(f"LabelledFiles: got {str(path)!r}, wanted a csv or jsonl file")
        wanted = self.text_field, self.label_field
        for number, fields in readers[path.suffix](path, wanted):
            place = f"{path}, line {number}"
            text, label = (fields.get(name) for name in wanted)
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"{place}: got the {self.text_field} {text!r}, wanted a text")
            if isinstance(label, bool) or not isinstance(label, str | int) or label == "":
                raise ValueError(f"{place}: got the {self.label_field} {label!r}, wanted a label")
            # JSON can spell lone surrogates, UTF-8 cannot.
            text, label = (x.encode("utf-8", "replace").decode() for x in (text, str(label)))
            yield _Named(f"{number:09d}", text, label.strip(), place)


class _Named(NamedTuple):
    """A row whose label is still a name."""

    id: str
    text: str
    label: str
    place: str  # for errors


LabelledSource = MovieSentences | Topics | LabelledFiles


def prepare_labelled(
    source: LabelledSource,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> LabelledCorpus:
    r"""Reads and checks labelled texts, or opens the cached result.

    The source is read on every call; the cache holds a TFDS dataset keyed by its content.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as home:
    ...     path = Path(home, "notes.jsonl")
    ...     rows = ({"text": f"note {n}", "label": "ab"[n % 2]} for n in range(60))
    ...     _ = path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ...     corpus = prepare_labelled(LabelledFiles(str(path)), cache_dir=home)
    >>> corpus.classes, len(corpus.train.texts) + len(corpus.validation.texts) < 60
    (('a', 'b'), True)

    Args:
        source: where they come from.
        cache_dir: as for `prepare`.
        on_progress: called with a line of text now and then.

    Raises:
        ValueError: a package is absent, a file has other columns or a label that is none of the
            classes (naming file and line), a part is empty, or there is only one class.
        OSError: a file cannot be read.
    """
    # TFDS is slow to import.
    from jaxopt_lab.data.builder import read_labelled, write_labelled

    report = on_progress or (lambda message: None)
    report(f"reading {source.name}")
    classes, rows = source.read(cache_dir)
    _check(source.name, classes, rows)
    content = json.dumps([_FORMAT, classes, [rows[split] for split in SPLITS]])
    key = hashlib.sha256(content.encode()).hexdigest()

    def write(directory: Path) -> dict[str, Any]:
        write_labelled(directory, rows, classes)
        return {"name": source.name, "hash": key}

    entry = cache.cache_root(cache_dir) / "labelled" / key[:24]
    cache.open_or_build(entry, write, report)
    splits = {split: _as_split(rows) for split, rows in read_labelled(entry).items()}
    trained = frozenset(splits["train"].texts)
    repeated = {
        split: sum(text in trained for text in splits[split].texts)
        for split in ("validation", "test")
    }
    for split, count in repeated.items():
        if count:
            report(f"{count} of {len(splits[split].texts):,} {split} texts are training texts too")
    return LabelledCorpus(source.name, key, classes, **splits, repeated=repeated)


def _check(name: str, classes: Sequence[str], rows: Mapping[str, Sequence[LabelledText]]) -> None:
    if len(classes) < 2:
        raise ValueError(f"{name}: got the classes {list(classes)}, wanted at least two")
    for split in SPLITS:
        if not rows[split]:
            raise ValueError(
                f"{name}: the {split} part is empty, of {sum(map(len, rows.values()))} rows; give "
                "more rows or another split"
            )


def _as_split(rows: Sequence[LabelledText]) -> LabelledSplit:
    ids, texts, labels = zip(*rows, strict=True)
    return LabelledSplit(ids, texts, np.asarray(labels, np.int32))


def _labels(rows: Sequence[_Named]) -> tuple[str, ...]:
    """Those that occur, sorted."""
    return tuple(sorted({row.label for row in rows}, key=_natural))


def _numbered(rows: Mapping[str, Sequence[_Named]], classes: tuple[str, ...]) -> Labelled:
    numbers = {name: number for number, name in enumerate(classes)}

    def number_of(row: _Named) -> int:
        if row.label not in numbers:
            raise ValueError(
                f"{row.place}: got the label {row.label!r}, wanted one of {', '.join(classes)}"
            )
        return numbers[row.label]

    numbered = {
        split: [LabelledText(row.id, row.text, number_of(row)) for row in part]
        for split, part in rows.items()
    }
    return Labelled(classes, numbered)


def _natural(label: str) -> tuple[bool, int, str]:
    """Sorts whole numbers by their size, before other labels."""
    return (False, int(label), label) if label.isdecimal() else (True, 0, label)


def _hashed_split(text: str, validation_fraction: float, test_fraction: float) -> str:
    place = int(hashlib.sha256(text.encode()).hexdigest()[:16], 16) / 2**64
    if place < test_fraction:
        return "test"
    return "validation" if place < test_fraction + validation_fraction else "train"


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, numbered from 1."""
    for number, line in enumerate(decode(path.read_bytes()).text.split("\n"), start=1):
        if line.strip():
            yield number, line.rstrip("\r")


def _csv_rows(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    with io.StringIO(decode(path.read_bytes()).text, newline="") as file:
        reader = csv.DictReader(file)
        columns = reader.fieldnames or []
        if missing := [name for name in wanted if name not in columns]:
            raise ValueError(
                f"{path}: got the columns {list(columns)}, wanted {' and '.join(missing)} too"
            )
        try:
            for fields in reader:
                yield reader.line_num, fields
        except csv.Error as error:
            raise ValueError(f"{path}, line {reader.line_num}: not csv: {error}") from error


def _jsonl_rows(path: Path, wanted: Sequence[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from None
        if not isinstance(fields, dict) or (set(wanted) - set(fields)):
            got = sorted(fields) if isinstance(fields, dict) else type(fields).__name__
            raise ValueError(f"{path}, line {number}: got {got}, wanted {' and '.join(wanted)}")
        yield number, fields
