"""Files out of wheels, source archives and packages of npm and Debian, without unpacking the rest.

Members are read, never extracted under the names that an archive gives them.
"""

import fnmatch
import io
import tarfile
import zipfile
from collections.abc import Iterator

_AR_MAGIC, _AR_HEADER = b"!<arch>\n", 60


def read_members(archive: bytes, patterns: tuple[str, ...]) -> dict[str, bytes]:
    """The members of a zip, tar (also compressed) or Debian archive whose path fits a pattern.

    >>> file = io.BytesIO()
    >>> with zipfile.ZipFile(file, "w") as archive:
    ...     archive.writestr("package/data/a.txt", "first")
    ...     archive.writestr("package/code.py", "pass")
    >>> read_members(file.getvalue(), ("package/data/*.txt",))
    {'a.txt': b'first'}

    Args:
        archive: its bytes.
        patterns: paths, in which `*` stands for anything; after a `!` those inside of an archive in
            the archive, `inner.tar.gz!folder/file`.

    Returns:
        Content by the last part of the path, sorted.

    Raises:
        ValueError: the archive cannot be read, a pattern fits nothing, or two members have one
            name.
    """
    inner: dict[str, list[str]] = {}
    plain = []
    for pattern in patterns:
        outer, mark, rest = pattern.partition("!")
        if mark:
            inner.setdefault(outer, []).append(rest)
        else:
            plain.append(pattern)
    found: dict[str, bytes] = {}
    fitted = set()
    for path, content in _members(archive, (*plain, *inner)):
        for pattern in (p for p in plain if fnmatch.fnmatchcase(path, p)):
            fitted.add(pattern)
            _add(found, path.rpartition("/")[2], content)
        for pattern in (p for p in inner if fnmatch.fnmatchcase(path, p)):
            fitted.add(pattern)
            for name, part in read_members(content, tuple(inner[pattern])).items():
                _add(found, name, part)
    if missing := [pattern for pattern in (*plain, *inner) if pattern not in fitted]:
        raise ValueError(f"the archive has no {', '.join(missing)}")
    return dict(sorted(found.items()))


def _add(found: dict[str, bytes], name: str, content: bytes) -> None:
    if name in found:
        raise ValueError(f"the archive has two files {name}")
    found[name] = content


def _members(archive: bytes, patterns: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """(path, content) of the files that fit; a leading `./` is no part of a path."""
    if archive.startswith(_AR_MAGIC):
        archive = _data_of_debian(archive)
    try:
        if zipfile.is_zipfile(io.BytesIO(archive)):
            with zipfile.ZipFile(io.BytesIO(archive)) as file:
                for name in file.namelist():
                    if _fits(name, patterns):
                        yield name, file.read(name)
            return
        with tarfile.open(fileobj=io.BytesIO(archive)) as file:
            for member in file:
                name = member.name.removeprefix("./")
                if member.isfile() and _fits(name, patterns):
                    content = file.extractfile(member)
                    assert content is not None  # it is a file
                    yield name, content.read()
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(f"not a zip, tar or Debian archive that can be read: {error}") from error


def _fits(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)


def _data_of_debian(archive: bytes) -> bytes:
    """The tar archive of files inside of a Debian package, which is an `ar` archive."""
    position = len(_AR_MAGIC)
    while position + _AR_HEADER <= len(archive):
        header = archive[position : position + _AR_HEADER]
        name, size = header[:16].decode("ascii", "replace").strip(), header[48:58].strip()
        if not size.isdigit():
            break
        start = position + _AR_HEADER
        if name.startswith("data.tar"):
            return archive[start : start + int(size)]
        position = start + int(size) + int(size) % 2  # members start at even places
    raise ValueError("the Debian archive has no data.tar")
