"""Documents on disk: a TensorFlow Datasets builder in array_record format, without TensorFlow."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxopt_lab.data.labelled import LabelledText
from jaxopt_lab.data.sources import Document

_ROWS_PER_READ = 256


class _LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Asks no server for facts about our dataset, and leaves no directory for them behind."""


class _QuietBuilder(tfds.core.GeneratorBasedBuilder):
    """Without the two messages that TFDS prints to standard output."""

    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


class TextDocuments(_QuietBuilder):
    """Text documents that the caller hands over; one split per entry of `documents`.

    The key of a row is the hash of its text, which TFDS hashes again to order the rows.
    """

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        documents: Mapping[str, Iterable[tuple[str, Document]]] | None = None,
        **kwargs: Any,
    ):
        """Keeps the documents for `download_and_prepare`.

        Args:
            documents: split -> (key, document) pairs; read once.
            **kwargs: for the TFDS builder.
        """
        self._documents = documents or {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        # Not dataset_info_from_configs: that looks for a metadata directory beside this module.
        text = tfds.features.Text
        features = tfds.features.FeaturesDict({"id": text(), "name": text(), "text": text()})
        return _LocalInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self._documents}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, str]]]:
        for key, document in self._documents[split]:
            yield key, {"id": key, "name": document.name, "text": document.text}


class LabelledTexts(_QuietBuilder):
    """Texts of several classes that the caller hands over; one split per entry of `rows`."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(
        self,
        *,
        rows: Mapping[str, Iterable[LabelledText]] | None = None,
        classes: Sequence[str] = (),
        **kwargs: Any,
    ):
        """Keeps the rows for `download_and_prepare`.

        Args:
            rows: split -> rows, whose identifiers are unique within it; read once.
            classes: their names.
            **kwargs: for the TFDS builder.
        """
        self._rows, self._classes = rows or {}, list(classes)
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        text, label = tfds.features.Text, tfds.features.ClassLabel(names=self._classes)
        features = tfds.features.FeaturesDict({"id": text(), "text": text(), "label": label})
        return _LocalInfo(builder=self, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        del dl_manager
        return {split: self._generate_examples(split) for split in self._rows}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for row in self._rows[split]:
            yield row.id, row._asdict()


def write_documents(
    directory: Path, documents: Mapping[str, Iterable[tuple[str, Document]]]
) -> None:
    """Prepares a TFDS dataset of documents below `directory`.

    Args:
        directory: an existing directory; the dataset is the only thing in it.
        documents: split -> (key, document) pairs, no split empty.
    """
    _write(TextDocuments(documents=documents, data_dir=directory, file_format="array_record"))


def write_labelled(
    directory: Path, rows: Mapping[str, Iterable[LabelledText]], classes: Sequence[str]
) -> None:
    """Prepares a TFDS dataset of labelled texts below `directory`.

    Args:
        directory: an existing directory; the dataset is the only thing in it.
        rows: split -> rows, no split empty.
        classes: their names.
    """
    _write(
        LabelledTexts(rows=rows, classes=classes, data_dir=directory, file_format="array_record")
    )


def read_labelled(directory: Path) -> dict[str, list[LabelledText]]:
    """The rows of every split, in the order of their identifiers."""
    builder: Any = tfds.builder_from_directory(
        directory / LabelledTexts.name / str(LabelledTexts.VERSION)
    )
    splits = {}
    for split in builder.info.splits:
        source = builder.as_data_source(split=split)
        found = source.__getitems__(range(len(source)))
        rows = (LabelledText(r["id"].decode(), r["text"].decode(), int(r["label"])) for r in found)
        splits[split] = sorted(rows)
    return splits


def _write(builder: Any) -> None:
    tfds.disable_progress_bar()
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(try_download_gcs=False)
    )


def read_documents(directory: Path, split: str) -> Iterator[tuple[str, str]]:
    """Yields (key, text) of a split in the order of the keys, which is that of the content.

    Rows are stored in another order, and that order is TFDS's business; sorting by key makes the
    token stream a function of the texts alone.
    """
    builder: Any = tfds.builder_from_directory(
        directory / TextDocuments.name / str(TextDocuments.VERSION)
    )
    if split not in builder.info.splits:
        return
    rows = builder.as_data_source(split=split)
    keys = [rows[index]["id"].decode() for index in range(len(rows))]
    order = sorted(range(len(rows)), key=keys.__getitem__)
    for start in range(0, len(order), _ROWS_PER_READ):
        chunk = order[start : start + _ROWS_PER_READ]
        for index, row in zip(chunk, rows.__getitems__(chunk), strict=True):
            yield keys[index], row["text"].decode()
