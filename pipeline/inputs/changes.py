"""Compare the input of a run with what is there now: changed shards, files that are new or gone.

The shards of a run stay as they were listed. A changed shard must be made again whole, because rows are
joined by their number; new files become further shards.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.errors import InputError
from pipeline.inputs.file_kinds import Unread
from pipeline.inputs.listing import MAX_STAMPED_IMAGES, ListedFiles, shards_of, shards_of_file, take_rows
from pipeline.inputs.reader import ReadOptions
from pipeline.inputs.shards import Shard, is_local
from pipeline.inputs.stamps import has_content, local_stamps_by_path, may_be_same, merged, path_of, size_in
from pipeline.progress import count
from pipeline.storage.file_table import UNKNOWN, FilesBelowRoots, FileTable, ListedFile
from pipeline.storage.secrets import without_secrets

NO_FILES = ListedFiles({}, {}, {}, Unread())
MAX_NAMED = 10
"""How many files a message names; it counts the others."""


@dataclass(frozen=True)
class InputChanges:
    """What has become of the input since the run listed it."""

    shards: tuple[Shard, ...]
    """The shards of the run, with the stamps of files that were not known or were only copied."""
    changed: Mapping[str, str]
    """How each changed shard has changed, by its name."""
    stamps: Mapping[str, tuple[str, ...]]
    """The stamps that the files of the changed shards have now."""
    gone: tuple[tuple[str, str], ...]
    """Root, without secrets, and path of each file of the run that is no longer in the input."""
    new: ListedFiles
    """Files of the input that are not in the run."""
    unread: Unread
    """Files of the input that are not read."""

    @property
    def num_new(self) -> int:
        return sum(map(len, self.new.chosen.values()))

    @property
    def names_of_gone(self) -> tuple[str, ...]:
        """The files that are gone, for messages: with their roots only if these differ."""
        is_one_root = len({root for root, _ in self.gone}) == 1
        return tuple(file if is_one_root else path_of(root, file) for root, file in self.gone)

    def require_unchanged(self) -> None:
        """Raise InputError if a shard has changed."""
        if self.changed:
            raise InputError(
                f"{self._changed_line()}; add --redo-changed to make all rows of such a shard again, restore "
                "the input, or give another --output"
            )

    def lines(self, is_start: bool = False, is_added: bool = False) -> list[str]:
        """Say what has changed, in a sentence for each kind of change.

        Args:
            is_start: whether a run starts now, which makes the changed shards again.
            is_added: whether the run takes the new files.
        """
        lines = []
        if self.changed:
            rows = "its rows" if len(self.changed) == 1 else "their rows"
            what = f"{rows} are made again" if is_start else f"--redo-changed makes {rows} again"
            lines.append(f"{self._changed_line()}; {what}")
        if self.gone:
            is_redone = any(UNKNOWN in stamps for stamps in self.stamps.values())  # a slice of a folder
            where = ", except in shards whose rows are made again" if is_redone else ""
            lines.append(
                f"{count(len(self.gone), 'file')} of the run can no longer be found in the input: "
                f"{name_some(self.names_of_gone)}; finished rows stay{where}"
            )
        if self.num_new:
            names = sorted(file for files in self.new.chosen.values() for file in files)
            them = "it" if len(names) == 1 else "them"
            what = (
                "added to the run"
                if is_added
                else f"run the first command again with --add-new to take {them} into the run"
            )
            lines.append(f"{count(len(names), 'new file')}: {name_some(names)}; {what}")
        return [*lines, *self.unread.lines()]

    def _changed_line(self) -> str:
        how = [f"{name} ({how})" for name, how in self.changed.items()]
        have = "has" if len(how) == 1 else "have"
        return f"{count(len(how), 'shard')} of the input {have} changed since the run began: {name_some(how)}"


def find_changes(
    shards: Sequence[Shard],
    listed: ListedFiles,
    content_of: Callable[[str], str | None],
    known_changed: Collection[str] = (),
) -> InputChanges:
    """Compare the shards of a run with the files that its input has now.

    Args:
        shards: the shards of the run.
        listed: the files of the input now; of a run with a limit, only the files of its shards matter.
        content_of: returns the digest of the bytes from which the output file of a shard was made, if the
            shard is finished.
        known_changed: shards that a read task or a commit has reported as changed.
    """
    now = FilesBelowRoots((without_secrets(root), files) for (root, _), files in listed.chosen.items())
    num_images = sum(len(shard.files) for shard in shards if shard.format == "folder")

    def has_stamps(shard: Shard) -> bool:
        return bool(shard.stamps) or _is_file(shard) or num_images <= MAX_STAMPED_IMAGES

    on_disk = local_stamps_by_path(filter(has_stamps, shards))
    kept: list[Shard] = []
    gone: dict[tuple[str, str], None] = {}  # Ranges of a table share a file.
    changed: dict[str, str] = {}
    changed_stamps: dict[str, tuple[str, ...]] = {}
    copies: dict[str, bool] = {}
    num_known: dict[tuple[str, Sequence[str]], int] = {}
    for shard in shards:
        root = without_secrets(shard.root)
        found = now.find(root, shard.files)
        num_known[root, shard.files] = len(found) - found.count(None)
        if None in found:
            gone |= {(root, f): None for f, file in zip(shard.files, found, strict=True) if file is None}
        if not has_stamps(shard):
            kept.append(shard)
            continue
        if is_local(shard.root):
            stamps = tuple(on_disk[path_of(shard.root, file)] for file in shard.files)
        else:
            stamps = tuple(UNKNOWN if file is None else file.stamp for file in found)
        how = _difference(shard, stamps)
        if how and _is_copy(shard, stamps, content_of, copies):
            how = None
        if shard.name in known_changed and found[0] is not None:
            how = how or "while it was read"
        if how:
            changed[shard.name], changed_stamps[shard.name] = how, stamps
            kept.append(shard)
        else:
            known = shard.stamps or (UNKNOWN,) * len(stamps)
            fuller = tuple(map(merged, known, stamps))
            kept.append(shard if fuller == shard.stamps else replace(shard, stamps=fuller))
    is_new = sum(num_known.values()) < sum(map(len, listed.chosen.values()))
    new = _not_in(shards, listed) if is_new else replace(listed, chosen={})
    return InputChanges(tuple(kept), changed, changed_stamps, tuple(gone), new, listed.unread)


def redo(changes: InputChanges, options: ReadOptions) -> tuple[tuple[Shard, ...], tuple[str, ...]]:
    """Begin the changed shards again, as they are now.

    Args:
        options: which members of a tar are rows, for a limit.

    Returns:
        The shards of the run, and the names of those whose output is no longer valid. All ranges of a changed
        table are made again: its row groups may have moved.
    """
    paths = {path_of(s.root, s.files[0]) for s in changes.shards if s.name in changes.changed and _is_file(s)}
    shards: list[Shard] = []
    of_file: dict[str, list[Shard]] = {}
    dropped = []
    for shard in changes.shards:
        path = path_of(shard.root, shard.files[0])
        if path in paths and _is_file(shard):
            of_file.setdefault(path, []).append(shard)
            dropped.append(shard.name)
        elif shard.name in changes.changed:
            stamps = changes.stamps[shard.name]
            shards.append(replace(shard, stamps=stamps, generation=shard.generation + 1))
            dropped.append(shard.name)
        else:
            shards.append(shard)
    for parts in of_file.values():
        stamp = next(changes.stamps[part.name][0] for part in parts if part.name in changes.stamps)
        shards += _list_again(parts, stamp, options)
    return tuple(sorted(shards, key=lambda shard: shard.name)), tuple(dropped)


def add_new(shards: Sequence[Shard], new: ListedFiles, options: ReadOptions) -> tuple[Shard, ...]:
    """Return the shards of a run with new files as further shards, by name; the others stay as they are.

    Args:
        options: which column of a table holds the images.

    Raises:
        InputError: a new shard would have the name of another one.
    """
    prefixes, folder_names, num_before = dict(new.prefixes), dict(new.folder_names), dict[str, int]()
    roots = {without_secrets(root): root for root, _ in new.chosen}
    for shard in shards:
        root = roots.get(without_secrets(shard.root))
        if shard.format == "folder":
            name = shard.name.rpartition("~")[0]
            num_before[name] = num_before.get(name, 0) + len(shard.files)
            if root is not None:
                folder_names[root] = name
        elif root is not None:
            prefixes[root] = shard.file_name.removesuffix(shard.files[0]).rstrip("/")
    named = replace(new, prefixes=prefixes, folder_names=folder_names)
    added = shards_of(named, num_before=num_before, options=options)
    names = {shard.name for shard in shards}
    for shard in added:
        if shard.name in names:
            raise InputError(
                f"the new file {shard.uri} would have the name {shard.name}, which another file of the run "
                "has; caption it into another --output"
            )
    return tuple(sorted((*shards, *added), key=lambda shard: shard.name))


def name_some(names: Sequence[str]) -> str:
    """Name the first of many files, and count the others."""
    more = len(names) - MAX_NAMED
    return ", ".join(names[:MAX_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def _is_file(shard: Shard) -> bool:
    return shard.format != "folder"


def _difference(shard: Shard, stamps: Sequence[str]) -> str | None:
    """Say how the files of a shard differ from its stamps, or return None."""
    pairs = [
        (file, known, now)
        for file, known, now in zip(shard.files, shard.stamps, stamps, strict=False)
        if not may_be_same(known, now)
    ]
    if not pairs:
        return None
    file, known, now = pairs[0]
    before, after = size_in(known), size_in(now)
    how = (
        f"{int(after):,} bytes, {int(before):,} before"
        if before != after
        else "same size, another modification time"
    )
    if _is_file(shard):
        return how
    return f"{file}: {how}" + (f", and {len(pairs) - 1:,} more" if len(pairs) > 1 else "")


def _is_copy(
    shard: Shard, stamps: Sequence[str], content_of: Callable[[str], str | None], copies: dict[str, bool]
) -> bool:
    """Return whether the file of a shard has the bytes that the run has read, although its time differs.

    Args:
        copies: the answers so far, because the ranges of a table share one file.
    """
    if not _is_file(shard) or size_in(shard.stamps[0]) != size_in(stamps[0]):
        return False
    path = path_of(shard.root, shard.files[0])
    if not copies.get(path):
        copies[path] = has_content(shard, content_of(shard.name))
    return copies[path]


def _not_in(shards: Sequence[Shard], listed: ListedFiles) -> ListedFiles:
    """Return the listed files that are in no shard."""
    known = FileTable((path_of(shard.root, file), ListedFile()) for shard in shards for file in shard.files)

    def new_below(root: str, files: FileTable) -> FileTable:
        return files.select(lambda file: path_of(root, file) not in known)

    new = {key: new_below(key[0], files) for key, files in listed.chosen.items()}
    return replace(listed, chosen={key: files for key, files in new.items() if files})


def _list_again(parts: Sequence[Shard], stamp: str, options: ReadOptions) -> list[Shard]:
    """Return the shards of a tar or a table that has changed.

    Args:
        parts: the shards that it was.
        stamp: the stamp that the file has now.
    """
    first = parts[0]
    whole = Shard(
        name=first.file_name,
        format=first.format,
        root=first.root,
        files=first.files,
        size_bytes=int(size_in(stamp)) if size_in(stamp).isdigit() else None,
        stamps=(stamp,),
        generation=1 + max(part.generation for part in parts),
    )
    shards = shards_of_file(whole, options)
    if any(part.max_rows is not None for part in parts):  # --limit has cut the file.
        return list(take_rows(shards, sum(part.num_rows or 0 for part in parts), options))
    return shards
