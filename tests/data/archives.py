"""Tiny archives in the layouts of the registries."""

import io
import tarfile
import zipfile
from collections.abc import Mapping


def wheel(files: Mapping[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return out.getvalue()


def tar(files: Mapping[str, bytes], compression: str = "gz") -> bytes:
    """What an sdist (folder NAME-VERSION) and an npm package (folder package) are."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return out.getvalue()


def debian(files: Mapping[str, bytes]) -> bytes:
    members = {
        "debian-binary": b"2.0\n",
        "control.tar.xz": tar({"./control": b"odd"}, "xz"),
        "data.tar.xz": tar({f"./{name}": content for name, content in files.items()}, "xz"),
    }
    out = b"!<arch>\n"
    for name, content in members.items():
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{'100644':<8}{len(content):<10}`\n".encode()
        out += content + b"\n" * (len(content) % 2)
    return out
