"""Object storage without a network: `gs://` is a directory in which names are all there is.

Objects are written whole. There are no directories beside the names, no renames and no appending;
etils, orbax and this package come through fsspec, as to a real bucket. TensorStore, which orbax
writes arrays with, has a client of its own and is led to the files.
"""

import contextlib
import datetime
import io
import os
import shutil
import sys
import threading
from pathlib import Path

from etils.epath import backend
from fsspec.spec import AbstractFileSystem
from orbax.checkpoint._src.path import gcs_utils

from jaxopt_lab.report import storage


class Store(AbstractFileSystem):
    protocol = ("gs", "gcs")
    cachable = False
    root = Path("/nowhere")
    calls: list[tuple[str, str]] = []  # of what writes
    fail = staticmethod(lambda call, key: None)  # raises what shall go wrong

    def _file(self, path):
        return self.root / self._strip_protocol(path)

    def _writing(self, call, path):
        key = self._strip_protocol(path)
        self.calls.append((call, key))
        self.fail(call, key)

    def info(self, path, **options):
        key, file = self._strip_protocol(path), self._file(path)
        self.fail("info", key)
        if file.is_file():
            written = datetime.datetime.fromtimestamp(file.stat().st_mtime)
            return {"name": key, "type": "file", "size": file.stat().st_size, "mtime": written}
        if any(below.is_file() for below in file.rglob("*")):
            return {"name": key, "type": "directory", "size": 0}
        raise FileNotFoundError(key)

    def ls(self, path, detail=True, **options):
        about, file = self.info(path), self._file(path)
        if about["type"] == "directory":
            names = [str(below.relative_to(self.root)) for below in file.iterdir()]
            found = [self._or_none(name) for name in names]
            found = [each for each in found if each]
        else:
            found = [about]
        return found if detail else [each["name"] for each in found]

    def _or_none(self, name):
        with contextlib.suppress(FileNotFoundError):  # an empty directory is none
            return self.info(name)

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            self.info(path)
            return self._file(path).open("rb")
        assert mode == "wb", mode
        return _Upload(self, path)

    def pipe_file(self, path, value, mode="overwrite", **options):
        self._writing("write", path)
        file = self._file(path)
        if mode == "create" and file.exists():
            raise FileExistsError(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        whole = self.root.parent / f"upload-{threading.get_ident()}"
        whole.write_bytes(value)
        whole.replace(file)  # readers see all of it or nothing

    def cp_file(self, path1, path2, **options):
        self._writing("copy", path2)
        self._file(path2).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._file(path1), self._file(path2))

    def rm_file(self, path):
        if not self._file(path).is_dir():
            self._writing("delete", path)
            self._file(path).unlink()

    _rm = rm_file

    def mkdir(self, path, create_parents=True, **options):
        pass

    def makedirs(self, path, exist_ok=False):
        pass

    def rmdir(self, path):
        pass

    def mv(self, *arguments, **options):
        raise NotImplementedError("a store has no renames")

    rename = move = mv


class _Upload(io.BytesIO):
    """Appears when it is closed."""

    def __init__(self, store, path):
        super().__init__()
        self._store, self._path = store, path

    def close(self):
        if not self.closed:
            self._store.pipe_file(self._path, self.getvalue())
        super().close()


def object_store(root, monkeypatch):
    """From now on `gs://` is below a directory; returns the class of the store."""
    kind = type("OneStore", (Store,), {"root": Path(root), "calls": []})

    def key_value_store(path):
        bucket, key = gcs_utils.parse_gcs_path(path, add_trailing_slash=False)
        return {"driver": "file", "path": os.path.join(root, bucket, key)}

    for protocol in Store.protocol:
        monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, protocol, kind)
    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", key_value_store)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    # Both keep the store that they have once found.
    store, etils = kind(), type(backend.fsspec_backend)
    monkeypatch.setattr(storage, "_reached", set())
    monkeypatch.setattr(storage, "_file_system", lambda: store)
    monkeypatch.setattr(etils, "_get_filesystem", lambda self, name: store)
    return kind
