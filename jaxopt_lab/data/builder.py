"""Documents on disk: a TensorFlow Datasets builder in array_record format, without TensorFlow."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from jaxopt_lab.data.sources import Document

_ROWS_PER_READ = 256


class _LocalInfo(tfds.core.DatasetInfo):
    def initialize_from_bucket(self) -> None:
        """Asks no server for facts about our dataset, and leaves no directory for them behind."""


class TextDocuments(tfds.core.GeneratorBasedBuilder):
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

    # TFDS prints these two messages to standard output.
    def _log_download_bytes(self) -> None:
        pass

    def _log_download_done(self) -> None:
        pass


def write_documents(
    directory: Path, documents: Mapping[str, Iterable[tuple[str, Document]]]
) -> None:
    """Prepares a TFDS dataset of documents below `directory`.

    Args:
        directory: an existing directory; the dataset is the only thing in it.
        documents: split -> (key, document) pairs, no split empty.
    """
    tfds.disable_progress_bar()
    builder = TextDocuments(documents=documents, data_dir=directory, file_format="array_record")
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
