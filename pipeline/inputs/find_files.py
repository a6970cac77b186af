"""From one input as the user named it to the files that it means: a folder, a file, braces, a glob."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.fs as pafs

from pipeline.inputs.globs import expand_braces, is_glob, matches
from pipeline.inputs.shards import InputError, without_secrets
from pipeline.storage.filesystems import join, open_filesystem

IGNORED_FOLDERS = ("_blip2", "__MACOSX")
"""Never part of an input, like everything whose name begins with a dot."""

Sizes = dict[str, int | None]
"""Paths below a root, with their bytes where the listing tells them; a disk does not."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """The files of one input."""

    name: str
    """The input as the user named it."""
    root: str
    """URI of the folder below which the files are: the one named, or what stands before the pattern."""
    files: Sizes = field(repr=False)
    one_by_one: bool
    """Whether every file was named itself; otherwise some may only lie beside what was meant."""

    @property
    def address(self) -> tuple[str, ...]:
        """Scheme, bucket and folders of the root, by which roots relate to each other."""
        scheme, separator, path = without_secrets(self.root).partition("://")
        if not separator:
            return tuple(self.root.strip("/").split("/"))
        return scheme, *path.strip("/").split("/")


def find_files(name: str) -> Found:
    """List what an input means.

    Raises:
        InputError: it is not there or cannot be listed, or a brace or glob means nothing.
    """
    root, rest, query = _split(name)
    filesystem, base = open_filesystem(root + query)
    try:
        if not rest:
            return _find_plain(name, root, query, filesystem, base)
        files, absent, one_by_one = _find_matching(filesystem, base, expand_braces(rest))
    except (OSError, pa.ArrowException) as error:
        raise InputError(f"{name} cannot be listed: {error}; check the path and the permissions") from error
    if absent:
        names = ", ".join(absent[:3]) + (", …" if len(absent) > 3 else "")
        raise InputError(f"{name} must match files, got none for {names} below {root}; check the pattern")
    return Found(name=name, root=root + query, files=files, one_by_one=one_by_one)


def _split(name: str) -> tuple[str, str, str]:
    """Where to begin, the pattern below it (empty when the name is plain), and a URI's query."""
    if name.startswith("file://"):
        name = unquote(name.removeprefix("file://").removeprefix("localhost"))
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
    found = [at for at in map(path.find, special) if at >= 0]
    before = f"{scheme}{separator}" if separator else ""
    if not found:
        return before + path, "", query
    cut = path.rfind("/", 0, min(found))
    if cut < 0:
        raise InputError(f"{name} must name its bucket without braces or stars; name each as an input")
    return before + (path[:cut] or "/"), path[cut + 1 :], query


def _find_plain(name: str, uri: str, query: str, filesystem: pafs.FileSystem, path: str) -> Found:
    (info,) = filesystem.get_file_info([path])
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"{name} must be a file or folder that is there, got nothing; check the path")
    if info.type == pafs.FileType.Directory:
        files = dict(_all_below(filesystem, path))
        if not files:
            raise InputError(f"{name} must hold files, got an empty folder")
        return Found(name=name, root=uri + query, files=files, one_by_one=False)
    folder, _, file = uri.rpartition("/")
    return Found(name=name, root=(folder or "/") + query, files={file: info.size}, one_by_one=True)


def _find_matching(
    filesystem: pafs.FileSystem, base: str, patterns: list[str]
) -> tuple[Sizes, list[str], bool]:
    """Files that the patterns mean, the patterns that mean none, and whether all were plain file names."""
    files: Sizes = {}
    absent = []
    globs = [pattern for pattern in patterns if is_glob(pattern)]
    one_by_one = not globs
    for pattern in globs:
        matched = dict(_matching(filesystem, base, pattern.split("/")))
        files.update(matched)
        if not matched:
            absent.append(pattern)
    plain = [pattern for pattern in patterns if not is_glob(pattern)]
    infos = filesystem.get_file_info([join(base, path) for path in plain])
    for path, info in zip(plain, infos, strict=True):
        if info.type == pafs.FileType.Directory:
            one_by_one = False
            files.update((join(path, file), size) for file, size in _all_below(filesystem, info.path))
        elif info.type == pafs.FileType.NotFound:
            absent.append(path)
        else:
            files[path] = info.size
    return files, absent, one_by_one


def _matching(filesystem: pafs.FileSystem, base: str, pattern: list[str]) -> Iterator[tuple[str, int | None]]:
    """Yield the files that match, and all files in the folders that match; look into no other folder."""
    folders = [""]
    while folders:
        folder = folders.pop()
        for name, is_folder, size in _children(filesystem, join(base, folder)):
            path = f"{folder}{name}"
            parts = path.split("/")
            if matches(parts, pattern):
                if is_folder:
                    below = _all_below(filesystem, join(base, path))
                    yield from ((f"{path}/{file}", file_size) for file, file_size in below)
                else:
                    yield path, size
            if is_folder and matches(parts, pattern, beginning=True):
                folders.append(f"{path}/")


def _all_below(filesystem: pafs.FileSystem, base: str) -> Iterator[tuple[str, int | None]]:
    """Yield every file below a folder: from an object store page by page, without asking for each folder."""
    if not isinstance(filesystem, pafs.LocalFileSystem):
        for info in filesystem.get_file_info(pafs.FileSelector(base, recursive=True)):
            path = info.path[len(base.rstrip("/")) + 1 :]
            if info.type != pafs.FileType.Directory and not any(map(_is_ignored, path.split("/"))):
                yield path, info.size
        return
    folders = [""]
    while folders:
        folder = folders.pop()
        for name, is_folder, size in _children(filesystem, join(base, folder)):
            if is_folder:
                folders.append(f"{folder}{name}/")
            else:
                yield f"{folder}{name}", size


def _children(filesystem: pafs.FileSystem, folder: str) -> Iterator[tuple[str, bool, int | None]]:
    """Yield name, whether it is a folder, and size of what stands in a folder."""
    if not isinstance(filesystem, pafs.LocalFileSystem):
        for info in filesystem.get_file_info(pafs.FileSelector(folder, recursive=False)):
            if not _is_ignored(info.base_name):
                yield info.base_name, info.type == pafs.FileType.Directory, info.size
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if _is_ignored(entry.name):
                continue
            if entry.is_dir():
                if not (entry.is_symlink() and _leads_up(entry.path)):
                    yield entry.name, True, None
            elif entry.is_file() or entry.is_symlink():
                # A link that leads nowhere is an input too: its row will say so.
                yield entry.name, False, None


def _is_ignored(name: str) -> bool:
    return name.startswith(".") or name in IGNORED_FOLDERS


def _leads_up(link: str) -> bool:
    """Whether a linked folder holds the link itself, so that following it has no end."""
    here = os.path.realpath(os.path.dirname(link))
    return f"{here}/".startswith(f"{os.path.realpath(link).rstrip('/')}/")
