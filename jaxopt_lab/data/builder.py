"""Documents on disk: TensorFlow Datasets builders in array_record format, without TensorFlow."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from jaxtyping import Int

from jaxopt_lab.data.documents import StoredDocument, in_chunks
from jaxopt_lab.data.labelled import LabelledText

_ROWS_PER_READ = 256
_ROWS_PER_SHARD = 1 << 18
_WRITE_BYTES = 1 << 24
_SPLIT = "documents"


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
    """Documents in the order of the hash of their content; `text` holds the content.

    Written by `write_documents`, and not by the builder itself: that one orders the rows anew, and
    holds a gigabyte of them in memory before it does so on disk.
    """

    VERSION = tfds.core.Version("2.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        # Not dataset_info_from_configs: that looks for a metadata directory beside this module.
        text = tfds.features.Text
        features = tfds.features.FeaturesDict({"id": text(), "name": text(), "text": text()})
        return _LocalInfo(builder=self, features=features, disable_shuffling=True)

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        raise NotImplementedError

    def _generate_examples(self, **kwargs: Any) -> Iterator[Any]:
        raise NotImplementedError


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


def write_documents(directory: Path, documents: Iterable[StoredDocument]) -> None:
    """Writes a TFDS dataset of documents below `directory`, in their order.

    Args:
        directory: an existing directory; the dataset is the only thing in it.
        documents: at least one; read once.
    """
    builder = TextDocuments(data_dir=directory, file_format="array_record")
    Path(builder.data_dir).mkdir(parents=True)
    writer: Any = tfds.core.SequentialWriter(
        builder.info, _ROWS_PER_SHARD, overwrite=False, file_format="array_record"
    )
    writer.initialize_splits([_SPLIT])
    for chunk in in_chunks(documents, _WRITE_BYTES, lambda document: len(document.content)):
        rows = [{"id": d.key.hex(), "name": d.name, "text": d.content} for d in chunk]
        writer.add_examples({_SPLIT: rows})
    writer.close_all()


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


def read_documents(
    directory: Path, numbers: Int[np.ndarray, " rows"] | None = None
) -> Iterator[StoredDocument]:
    """Yields documents by their numbers, all without, in the order of the keys."""
    builder: Any = tfds.builder_from_directory(
        directory / TextDocuments.name / str(TextDocuments.VERSION)
    )
    rows = builder.as_data_source(split=_SPLIT)
    numbers = np.arange(len(rows)) if numbers is None else numbers
    for start in range(0, len(numbers), _ROWS_PER_READ):
        try:
            found = rows.__getitems__(numbers[start : start + _ROWS_PER_READ].tolist())
        except RuntimeError as error:
            raise ValueError(
                f"the documents in {directory} are damaged, delete that directory: {error}"
            ) from error
        for row in found:
            yield StoredDocument(
                bytes.fromhex(row["id"].decode()), row["name"].decode(), row["text"]
            )
