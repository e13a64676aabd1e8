"""Sources that TensorFlow Datasets has prepared: rows of text, or of tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from jaxopt_lab.data.documents import Document, encodable
from jaxopt_lab.report.storage import staged

_ROWS_PER_READ = 256


@dataclass(frozen=True)
class PreparedTfds:
    """A dataset that TensorFlow Datasets has already prepared, in array_record format."""

    directory: str = ""
    """The prepared version: `<data_dir>/<name>/[<config>/]<version>`."""
    text_field: str = "text"
    """The feature that holds the document."""
    split: str = "train"
    """Which rows to take, in TFDS notation (`train`, `train[:10%]`, `train+test`). Training and
    validation documents are told apart by content, as for every other source."""

    @property
    def name(self) -> str:
        """Short name for tables and manifests."""
        return _name("tfds", self.directory)

    def files(self) -> Iterator[Path]:
        """Yields the files that decide the documents."""
        yield from _files("PreparedTfds", self.directory)

    def documents(self) -> Iterator[Document]:
        """Yields the rows in the order of the prepared files.

        Raises:
            ValueError: the directory is no prepared array_record dataset, or has no such split
                or feature, or a row has no text there (the message names it).
        """
        rows = _rows("PreparedTfds", self.directory, self.split, "text_field", self.text_field)
        for name, text in _values(rows, f"{self.name}/{self.split}", self.text_field):
            # Stored text comes back as bytes, TFDS's mocked data as str.
            if not isinstance(text, bytes | str):
                raise ValueError(
                    f"PreparedTfds.text_field: {self.text_field!r} of {name} is "
                    f"{_described(text)}, wanted text; tokens are --corpus prepared-tokens"
                )
            text = text.decode("utf-8", "replace") if isinstance(text, bytes) else encodable(text)
            yield Document(name, text)


@dataclass(frozen=True)
class PreparedTokens:
    """Documents that come as tokens: a prepared TFDS dataset in array_record format.

    Its tokenizer has to be given, a trained one cannot be (`--tokenizer.kind`). An end-of-text at
    the end of a row is left out, as every document gets one.
    """

    directory: str = ""
    """The prepared version: `<data_dir>/<name>/[<config>/]<version>`."""
    tokens_field: str = "tokens"
    """The feature that holds the tokens: whole numbers along one axis."""
    split: str = "train"
    """Which rows to take, in TFDS notation, as for prepared text."""

    @property
    def name(self) -> str:
        """Short name for tables and manifests."""
        return _name("tokens", self.directory)

    def files(self) -> Iterator[Path]:
        """Yields the files that decide the documents."""
        yield from _files("PreparedTokens", self.directory)

    def documents(self) -> Iterator[Document]:
        """Yields the rows in the order of the prepared files.

        Raises:
            ValueError: the directory is no prepared array_record dataset, or has no such split
                or feature, or a row has no tokens there (the message names it).
        """
        field = "tokens_field", self.tokens_field
        rows = _rows("PreparedTokens", self.directory, self.split, *field)
        for name, value in _values(rows, f"{self.name}/{self.split}", self.tokens_field):
            tokens = np.asarray(value)
            if tokens.ndim != 1 or (tokens.size and tokens.dtype.kind not in "iu"):
                raise ValueError(
                    f"PreparedTokens.tokens_field: {self.tokens_field!r} of {name} is "
                    f"{_described(value)}, wanted whole numbers along one axis"
                )
            if tokens.size and not 0 <= tokens.min() <= tokens.max() < 2**31:
                raise ValueError(
                    f"PreparedTokens: {name} has the tokens {tokens.min()} to {tokens.max()}, "
                    "wanted numbers from 0 to 2**31 - 1"
                )
            yield Document(name, "", tokens=tokens)

    def tokenizer_directory(self) -> Path | None:
        """Where the tokenizer lies beside the tokens, if it does."""
        path = _checked("PreparedTokens", self.directory)
        return path if (path / "tokenizer.json").is_file() else None


def _name(kind: str, directory: str) -> str:
    path = Path(directory)
    return f"{kind}:{path.parent.name}/{path.name}"


def _described(value: Any) -> str:
    if isinstance(value, bytes | str):
        return "text"
    array = np.asarray(value)
    return f"an array of shape {array.shape} and dtype {array.dtype}"


def _checked(kind: str, directory: str) -> Path:
    path = Path(staged(directory)).expanduser()
    for file in ("dataset_info.json", "features.json"):
        if not (path / file).is_file():
            raise ValueError(
                f"{kind}.directory: {directory!r} is not a prepared dataset (it has no {file}); "
                "give the version directory, <data_dir>/<name>/<version>"
            )
    return path


def _files(kind: str, directory: str) -> list[Path]:
    return sorted(path for path in _checked(kind, directory).iterdir() if path.is_file())


def _rows(kind: str, directory: str, split: str, option: str, field: str) -> Any:
    """The rows of a split as a data source."""
    path = _checked(kind, directory)
    import tensorflow_datasets as tfds

    builder: Any = tfds.builder_from_directory(path)
    file_format = builder.info.file_format
    if file_format is not tfds.core.FileFormat.ARRAY_RECORD:
        raise ValueError(
            f"{kind}.directory: {str(path)!r} is stored as {file_format}; only array_record can "
            "be read without TensorFlow"
        )
    features = sorted(builder.info.features or {})
    if field not in features:
        raise ValueError(
            f"{kind}.{option}: {field!r} is not a feature of {path}, which has {features}"
        )
    try:
        return builder.as_data_source(split=split)
    except ValueError as error:
        raise ValueError(
            f"{kind}.split: {split!r} of {path}, which has the splits "
            f"{sorted(builder.info.splits)}: {error}"
        ) from None


def _values(rows: Any, place: str, field: str) -> Iterator[tuple[str, Any]]:
    """(name, value of the field) of every row."""
    for start in range(0, len(rows), _ROWS_PER_READ):
        numbers = range(start, min(start + _ROWS_PER_READ, len(rows)))
        try:
            found = rows.__getitems__(numbers)
        except RuntimeError as error:
            raise ValueError(
                f"{place}: the rows {numbers[0]} to {numbers[-1]} cannot be read: {error}"
            ) from error
        for number, row in zip(numbers, found, strict=True):
            yield f"{place}:{number}", row[field]
