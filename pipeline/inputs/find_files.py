"""Find the files of one input: a file, a folder, braces or a glob, on a disk or in a store.

No file is opened or looked up on its own: a disk is listed folder by folder, an object store page by page,
so that an input of 10^8 files can be listed.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.errors import InputError
from pipeline.inputs.globs import expand_braces, is_glob, matches, may_match_below
from pipeline.inputs.stamps import stamp_of
from pipeline.storage.file_table import FileTable, ListedFile
from pipeline.storage.filesystems import EMPTY, infos_of, join, open_filesystem
from pipeline.storage.secrets import without_secrets

IGNORED_FOLDERS = ("_blip2", "__MACOSX", "@eaDir")
"""Never part of an input, like everything whose name begins with a dot."""


@dataclass(frozen=True, kw_only=True)
class FoundFiles:
    """The files of one input."""

    name: str
    """The input as the user named it."""
    root: str
    """URI of the folder that holds the files: the folder named, or what precedes the pattern."""
    files: FileTable = field(repr=False)
    """The files, by their paths below the root."""
    one_by_one: bool
    """Whether the user named every file itself. Otherwise the files may include some that were not meant."""

    @property
    def address(self) -> tuple[str, ...]:
        """Scheme, bucket and folders of the root, so that roots can be compared part by part."""
        scheme, separator, path = without_secrets(self.root).partition("://")
        if not separator:
            return tuple(self.root.strip("/").split("/"))
        return scheme, *path.strip("/").split("/")


def find_files(name: str, may_lack: bool = False) -> FoundFiles:
    """List the files of an input.

    Args:
        may_lack: whether some or all files may be gone since a run listed the input.

    Raises:
        InputError: the input does not exist or cannot be listed, or braces or a glob match no file.
    """
    root, pattern, query = _split(name)
    filesystem, base = open_filesystem(root + query)
    try:
        if not pattern:
            return _find_plain(name, root, query, filesystem, base, may_lack)
        files, absent, one_by_one = _find_matching(filesystem, base, expand_braces(pattern))
    except UnicodeEncodeError:
        raise InputError(f"{name!a} must be a name in UTF-8; rename the file or its folder") from None
    except (OSError, pa.ArrowException) as error:
        if may_lack and isinstance(error, FileNotFoundError):  # the folder of a glob is gone
            return FoundFiles(name=name, root=root + query, files=FileTable(), one_by_one=False)
        raise InputError(f"{name} cannot be listed: {error}; check the path and the permissions") from error
    if absent and not may_lack:
        names = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
        raise InputError(f"{name}: no file below {root} matches {names}; check the pattern")
    return FoundFiles(name=name, root=root + query, files=files, one_by_one=one_by_one)


def find_named(name: str, root: str, files: Sequence[str], may_lack: bool) -> FoundFiles:
    """Find files that are named one by one.

    Args:
        name: what names them, for messages.
        root: URI of their folder.
        files: their paths below it.
        may_lack: as for `find_files`.

    Raises:
        InputError: one of them does not exist, or they cannot be looked up.
    """
    filesystem, base = open_filesystem(root)
    try:
        infos = infos_of(filesystem, [join(base, file) for file in files])
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{name} names files that cannot be looked up: {error}") from error
    absent = [f for f, info in zip(files, infos, strict=True) if info.type != pafs.FileType.File]
    if absent and not may_lack:
        more = f" and {len(absent) - 1:,} more" if len(absent) > 1 else ""
        raise InputError(
            f"{name} names a file that is not there: {join(without_secrets(root), absent[0])}{more}"
        )
    listed = (
        (file, _listed(filesystem, info))
        for file, info in zip(files, infos, strict=True)
        if info.type == pafs.FileType.File
    )
    return FoundFiles(name=name, root=root, files=FileTable(listed), one_by_one=True)


def same_place(name: str, folder: str) -> str:
    """Return one spelling for all names of the same input: absolute, without secrets or a trailing slash.

    Args:
        folder: the working folder in which the name was given.
    """
    if name.startswith("@"):
        return "@" + same_place(name.removeprefix("@"), folder)
    name = _without_file_scheme(name)
    if "://" in name:
        return without_secrets(name).rstrip("/")
    return os.path.normpath(os.path.join(folder, os.path.expanduser(name)))


def _without_file_scheme(name: str) -> str:
    if not name.startswith("file://"):
        return name
    return unquote(name.removeprefix("file://").removeprefix("localhost"))


def _split(name: str) -> tuple[str, str, str]:
    """Split a name into the folder to start from, the pattern below it, and the query of a URI.

    The pattern is empty if the name has neither braces nor wildcards. A local path that exists is taken
    literally, whatever characters it holds.
    """
    name = _without_file_scheme(name)
    if not name:
        raise InputError(EMPTY)
    scheme, separator, path = name.partition("://")
    query = ""
    if separator:
        path, mark, query = path.partition("?")
        query = mark + query
        special = "*[{"
    else:
        path = os.path.abspath(os.path.expanduser(name))
        special = "*?[{"
        if os.path.lexists(path):
            return path, "", ""
    prefix = f"{scheme}{separator}" if separator else ""
    positions = [position for position in map(path.find, special) if position >= 0]
    if not positions:
        return prefix + path, "", query
    slash = path.rfind("/", 0, min(positions))
    if slash < 0:
        raise InputError(
            f"{name} has braces or wildcards in the name of its bucket; name each bucket as an input"
        )
    return prefix + (path[:slash] or "/"), path[slash + 1 :], query


def _find_plain(
    name: str, uri: str, query: str, filesystem: pafs.FileSystem, path: str, may_lack: bool
) -> FoundFiles:
    """Find one file, or all files below one folder."""
    (info,) = filesystem.get_file_info([path])
    if info.type == pafs.FileType.NotFound and may_lack:
        return FoundFiles(name=name, root=uri + query, files=FileTable(), one_by_one=False)
    if info.type == pafs.FileType.NotFound:
        hint = "; write %23 for each # of a name" if "#" in name and "://" in name else ""
        raise InputError(f"no such file or folder: {name}{hint}")
    _refuse_special(info)
    if info.type == pafs.FileType.Directory:
        files = FileTable(_all_below(filesystem, path))
        if not files and not may_lack:
            raise InputError(f"{name} is an empty folder; name a folder that holds files")
        return FoundFiles(name=name, root=uri + query, files=files, one_by_one=False)
    folder, _, file = uri.rpartition("/")
    files = FileTable([(file, _listed(filesystem, info))])
    return FoundFiles(name=name, root=(folder or "/") + query, files=files, one_by_one=True)


def _refuse_special(info: pafs.FileInfo) -> None:
    """Raise InputError for a pipe, a socket or a device, whose reader may wait for ever."""
    if info.type == pafs.FileType.Unknown:
        raise InputError(f"{info.path} must be a file or a folder, got neither; copy its content to a file")


def _find_matching(
    filesystem: pafs.FileSystem, base: str, patterns: list[str]
) -> tuple[FileTable, list[str], bool]:
    """Find the files that patterns match.

    Returns:
        The files, the patterns that match none, and whether every pattern is a plain file name.
    """
    tables, named, absent = [], [], []
    globs = [pattern for pattern in patterns if is_glob(pattern)]
    one_by_one = not globs
    for pattern in globs:
        tables.append(FileTable(_matching(filesystem, base, pattern.split("/"))))
        if not tables[-1]:
            absent.append(pattern)
    plain = [pattern for pattern in patterns if not is_glob(pattern)]
    infos = infos_of(filesystem, [join(base, path) for path in plain])
    for path, info in zip(plain, infos, strict=True):
        _refuse_special(info)
        if info.type == pafs.FileType.Directory:
            one_by_one = False
            below = _all_below(filesystem, info.path)
            tables.append(FileTable((join(path, file), listed) for file, listed in below))
        elif info.type == pafs.FileType.NotFound:
            absent.append(path)
        else:
            named.append((path, _listed(filesystem, info)))
    files = FileTable(chain(*(table.entries() for table in tables), named))
    return files, absent, one_by_one


def _all_below(filesystem: pafs.FileSystem, base: str) -> Iterator[tuple[str, ListedFile]]:
    """Yield every file below a folder.

    An object store lists everything below a prefix page by page, so its folders are not asked for one by one.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        yield from _matching(filesystem, base, None)
        return
    for info in filesystem.get_file_info(pafs.FileSelector(base, recursive=True)):
        path = info.path[len(base.rstrip("/")) + 1 :]
        if info.type != pafs.FileType.Directory and not any(map(_is_ignored, path.split("/"))):
            yield path, _listed(filesystem, info)


def _matching(
    filesystem: pafs.FileSystem, base: str, pattern: list[str] | None
) -> Iterator[tuple[str, ListedFile]]:
    """Yield the files that match a glob, and all files below the folders that match it; all without a glob.

    A folder is listed only if something below it can match.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        for name, is_folder, listed in _children(filesystem, join(base, folder)):
            path = f"{folder}{name}"
            if pattern is not None and not matches(path.split("/"), pattern):
                if is_folder and may_match_below(path.split("/"), pattern):
                    folders.append(f"{path}/")
            elif not is_folder:
                yield path, listed
            elif pattern is None:
                folders.append(f"{path}/")
            else:
                below = _all_below(filesystem, join(base, path))
                yield from ((f"{path}/{file}", listed) for file, listed in below)


def _children(filesystem: pafs.FileSystem, folder: str) -> Iterator[tuple[str, bool, ListedFile]]:
    """Yield each entry of a folder: its name, whether it is a folder, and what the listing says about it."""
    if not isinstance(filesystem, pafs.LocalFileSystem):
        for info in filesystem.get_file_info(pafs.FileSelector(folder, recursive=False)):
            if not _is_ignored(info.base_name):
                yield info.base_name, info.type == pafs.FileType.Directory, _listed(filesystem, info)
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_ignored(entry.name):
                continue
            if entry.is_symlink() and not os.path.exists(entry.path):
                # A broken link, or one to itself, is an input: its row says that the file cannot be read.
                yield entry.name, False, ListedFile()
            elif entry.is_dir():
                if not (entry.is_symlink() and _leads_back(entry.path)):
                    yield entry.name, True, ListedFile()
            elif entry.is_file() or not os.path.exists(entry.path):
                yield entry.name, False, ListedFile()


def _listed(filesystem: pafs.FileSystem, info: pafs.FileInfo) -> ListedFile:
    """Return what a listing says about a file; the stamps of local files come from `local_stamps`."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        return ListedFile(info.size)
    return ListedFile(info.size, stamp_of(info))


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name in IGNORED_FOLDERS


def _leads_back(link: str) -> bool:
    """Whether a link leads to a folder above itself, so that following it would never end."""
    target = os.path.realpath(link).rstrip("/")
    folder = link
    while (folder := os.path.dirname(folder)) not in ("", "/"):
        if f"{os.path.realpath(folder)}/".startswith(f"{target}/"):
            return True
    return False
