"""Inputs are listed as the same shards every time, and a doubtful input is refused in a sentence."""

from __future__ import annotations

import json
import os
import threading
from contextlib import nullcontext

import pyarrow.fs as pafs
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from pipeline.errors import InputError
from pipeline.inputs import listing
from pipeline.inputs.listing import list_input, list_shards
from pipeline.inputs.shards import Shard, refuse_unwritable
from pipeline.ledger.layout import folder_of_shard, is_result, output_name, parse_folder_of_shard
from pipeline.storage.filesystems import open_filesystem
from tests.unit.inputs.formats.reading_cases import read_rows, tar_bytes


def touch(folder, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def names(*inputs, **options) -> list[str]:
    return [shard.name for shard in list_shards([str(each) for each in inputs], **options)]


def refusal_of(*inputs, **options) -> str:
    with pytest.raises(InputError) as refusal:
        names(*inputs, **options)
    return str(refusal.value)


def test_a_folder_of_tars_is_listed_below_its_root_and_sorted(tmp_path):
    touch(tmp_path, "b/1.tar", "b/0.TAR", "a/0.tar.gz", "a/00.tgz", "c.tar", "notes.txt")
    assert names(tmp_path) == ["a/0.tar.gz", "a/00.tgz", "b/0.TAR", "b/1.tar", "c.tar"]


def test_shards_survive_json(tmp_path):
    touch(tmp_path, "x.jpg", "y.jpg")
    shards = list_shards(str(tmp_path))
    again = [Shard(**json.loads(shard.to_json())) for shard in shards]
    assert again == shards and hash(again[0]) == hash(shards[0])


def test_one_file_of_each_kind(tmp_path):
    touch(tmp_path, "0.tar", "0.parquet", "0.jpg")
    shards = list_shards([str(tmp_path / name) for name in ("0.tar", "0.parquet", "0.jpg")])
    assert [(shard.name, shard.format) for shard in shards] == [
        ("0.parquet", "parquet"),
        ("0.tar", "webdataset"),
        (f"{tmp_path.name}~0-0", "folder"),
    ]


def test_img2dataset_tables_next_to_tars_are_no_inputs(tmp_path):
    for at in ("00000", "00001"):
        touch(tmp_path, f"{at}.tar", f"{at}.parquet", f"{at}_stats.json")
    assert names(tmp_path) == ["00000.tar", "00001.tar"]
    assert listing.list_input(str(tmp_path)).unread.lines() == ["4 files not read: 2 .json, 2 .parquet"]
    assert names(tmp_path / "*") == ["00000.tar", "00001.tar"]
    assert names(tmp_path, format="parquet") == ["00000.parquet", "00001.parquet"]


def test_img2dataset_tables_next_to_folders_of_images_are_no_inputs(tmp_path):
    touch(tmp_path, "00000/000000000.jpg", "00000/000000000.txt", "00000.parquet", "00000_stats.json")
    assert names(tmp_path) == [f"{tmp_path.name}~0-0"]


def test_a_folder_with_two_kinds_of_files_is_refused_with_the_flags_to_choose_one(tmp_path):
    touch(tmp_path, "0.tar", "other.parquet")
    message = refusal_of(tmp_path)
    assert "got 1 Parquet table and 1 tar; choose one with --format parquet or --format webdataset" in message
    assert names(tmp_path, format="webdataset") == ["0.tar"]
    assert names(tmp_path / "*.tar", tmp_path / "*.parquet") == ["0.tar", "other.parquet"]
    touch(tmp_path / "t", "0.tar", "preview.png")
    assert "1 image and 1 tar; " in refusal_of(tmp_path / "t")


def test_files_of_other_tools_are_no_input(tmp_path):
    touch(tmp_path, "0.parquet", "_delta_log/1.parquet", "_tmp.parquet", ".hidden.parquet", ".git/x.parquet")
    touch(tmp_path, "_blip2/fragments/f.parquet", "__MACOSX/0.parquet")
    assert names(tmp_path) == ["0.parquet"]
    touch(tmp_path / "camera", "_DSC0001.JPG", "._DSC0001.JPG", ".thumbs/a.jpg")
    (shard,) = list_shards(str(tmp_path / "camera"))
    assert shard.files == ("_DSC0001.JPG",)


def test_braces_and_globs(tmp_path):
    touch(tmp_path, *(f"{part}/{at:05d}.tar" for part in ("train", "val") for at in range(3)), "train/x.json")
    assert names(f"{tmp_path}/train/{{00000..00002}}.tar") == ["00000.tar", "00001.tar", "00002.tar"]
    assert names(f"{tmp_path}/{{train,val}}/00001.tar") == ["train/00001.tar", "val/00001.tar"]
    assert names(f"{tmp_path}/*/0000[12].tar") == [
        f"{p}/0000{n}.tar" for p in ("train", "val") for n in (1, 2)
    ]
    assert (
        len(names(f"{tmp_path}/**/*.tar"))
        == len(names(f"{tmp_path}/{{train,val}}"))
        == len(names(f"{tmp_path}/*"))
        == 6
    )
    (tmp_path / "we{i,r}d [1].tar").write_bytes(b"")
    assert names(tmp_path / "we{i,r}d [1].tar") == ["we{i,r}d [1].tar"], (
        "the name of a file that exists is taken literally"
    )


def test_patterns_without_a_match_are_named(tmp_path):
    touch(tmp_path, *(f"{at:05d}.tar" for at in range(3)))
    assert "matches 00003.tar, 00004.tar" in refusal_of(f"{tmp_path}/{{00000..00004}}.tar")
    assert "matches val*.tar" in refusal_of(f"{tmp_path}/{{,val}}*.tar")


def test_names_of_several_inputs_never_collide(tmp_path):
    touch(tmp_path, "a/0.tar", "b/0.tar", "c/x.jpg", "d/x.jpg")
    assert names(tmp_path / "a", tmp_path / "b") == ["a/0.tar", "b/0.tar"]
    assert names(tmp_path / "a/0.tar", tmp_path / "b/0.tar") == ["a/0.tar", "b/0.tar"]
    assert names(tmp_path / "c", tmp_path / "d") == ["c~0-0", "d~0-0"]
    assert "a/0.tar occurs twice" in refusal_of(tmp_path / "a", tmp_path, format="webdataset")
    assert "c/x.jpg occurs twice" in refusal_of(tmp_path / "c", tmp_path, format="folder")
    assert names(tmp_path / "a", tmp_path / "a/0.tar") == ["0.tar"], "a file that is named twice is read once"


@pytest.mark.parametrize(
    ("make", "input", "options", "message"),
    [
        ([], "gone", {}, "no such file or folder: "),
        ([], "", {}, "is an empty folder"),
        (
            ["a.json", "b.json", "c"],
            "",
            {},
            "holds no tars or Parquet tables or images, only 2 .json, 1 without ending",
        ),
        (["a.tar"], "", {"format": "folder"}, "holds no images, only 1 .tar"),
        (["a.json"], "a.json", {}, "the name a.json does not tell whether"),
        (["a.csv"], "a.csv", {}, "if it lists images, put @ in front of its name"),
        (["a.tar"], "", {"format": "tar"}, "format must be auto, webdataset, parquet, folder, got 'tar'"),
        (["a.tar"], "", {"limit": 0}, "limit must be at least 1, got 0"),
    ],
)
def test_every_refusal_says_what_to_do(tmp_path, make, input, options, message):
    touch(tmp_path, *make)
    assert message in refusal_of(tmp_path / input, **options)


def test_no_input_at_all_is_refused():
    assert "no input given" in refusal_of()


def test_a_named_file_may_have_any_name_if_the_format_is_given(tmp_path):
    touch(tmp_path, "part-0")
    assert names(tmp_path / "part-0", format="webdataset") == ["part-0"]


def test_folders_are_sliced_by_their_sorted_listing(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "FILES_PER_SHARD", 10)
    touch(tmp_path / "in", *(f"{at % 4}/{at:03d}.jpg" for at in range(25)), "0/notes.txt")
    shards = list_shards(str(tmp_path / "in"))
    assert [shard.name for shard in shards] == ["in~00-09", "in~10-19", "in~20-24"]
    files = [file for shard in shards for file in shard.files]
    assert files == sorted(files) and len(files) == 25
    assert [shard.num_rows for shard in shards] == [10, 10, 5]


def test_a_large_folder_is_listed_without_asking_for_each_file(tmp_path, monkeypatch):
    # A network disk takes milliseconds for each question about a file: hours for 10^8 files.
    monkeypatch.setattr(listing, "MAX_STAMPED_IMAGES", 49)
    touch(tmp_path, *(f"{at}.jpg" for at in range(50)))
    asked = []
    monkeypatch.setattr(os, "stat", lambda *path, **more: asked.append(path))
    monkeypatch.setattr(os.path, "getsize", lambda path: asked.append(path))
    listed = list_input(str(tmp_path))
    assert listed.shards[0].num_rows == 50
    assert asked == []
    assert "has 50 images, more than 49: an image that is replaced" in listed.notes[-1]


def test_each_file_of_a_smaller_folder_has_a_stamp(tmp_path, monkeypatch):
    monkeypatch.setattr(listing, "MAX_STAMPED_IMAGES", 50)
    touch(tmp_path, *(f"{at}.jpg" for at in range(50)))
    listed = list_input(str(tmp_path))
    assert len(listed.shards[0].stamps) == 50 and not listed.notes


def test_links_are_followed_but_not_in_circles(tmp_path):
    touch(tmp_path, "elsewhere/a.jpg", "in/b.jpg")
    (tmp_path / "in/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "in/circle").symlink_to(tmp_path / "in")
    (shard,) = list_shards(str(tmp_path / "in"))
    assert shard.files == ("b.jpg", "link/a.jpg")


def test_links_that_lead_to_each_other_end(tmp_path):
    """a/b leads to c, and c/d to a: the listing used to end with "Too many levels of symbolic links"."""
    touch(tmp_path, "a/0.jpg", "c/1.jpg")
    (tmp_path / "a/b").symlink_to("../c")
    (tmp_path / "c/d").symlink_to("../a")
    (shard,) = list_shards(str(tmp_path))
    assert shard.files == ("a/0.jpg", "a/b/1.jpg", "c/1.jpg", "c/d/0.jpg")


@pytest.mark.parametrize("pattern", ["", "/*"])
def test_a_link_to_itself_costs_only_its_row(tmp_path, pattern):
    """The whole folder used to be refused: "Too many levels of symbolic links"."""
    (tmp_path / "0.jpg").write_bytes(b"x")
    (tmp_path / "1.jpg").symlink_to("1.jpg")
    (shard,) = list_shards(f"{tmp_path}{pattern}")
    assert shard.files == ("0.jpg", "1.jpg")
    rows, _ = read_rows(shard)
    assert [row["status"] for row in rows] == [None, "unreadable"]


def test_a_limit_takes_the_first_rows_over_the_sorted_shards(tmp_path):
    for at in range(3):
        members = [(f"{at}-{row}.jpg", b"x") for row in range(5)]
        (tmp_path / f"{at}.tar").write_bytes(tar_bytes(members))
    for limit in (1, 5, 7, 10, 14, 15, 99):
        shards = list_shards(str(tmp_path), limit=limit)
        keys = [row["key"] for shard in shards for row in read_rows(shard)[0]]
        assert keys == [f"{at}-{row}" for at in range(3) for row in range(5)][:limit]
        assert len(shards) == min(3, -(-limit // 5))


@pytest.mark.parametrize("scheme", ["memory", "file"])
def test_uris_give_the_same_shards_as_paths(tmp_path, scheme):
    base = f"memory://listing{tmp_path}" if scheme == "memory" else f"file://{tmp_path}"
    filesystem, root = open_filesystem(base)
    for name in ("a/0.tar", "a/1.tar", "b/0.tar", "b/_x/0.tar", "b/.hidden/0.tar"):
        filesystem.create_dir(f"{root}/{name.rpartition('/')[0]}", recursive=True)
        with filesystem.open_output_stream(f"{root}/{name}") as file:
            file.write(tar_bytes([("1.jpg", name.encode())]))
    assert names(base) == ["a/0.tar", "a/1.tar", "b/0.tar"]
    assert names(f"{base}/a/") == ["0.tar", "1.tar"]
    assert names(f"{base}/a/*.tar") == names(f"{base}/a/{{0..1}}.tar") == ["0.tar", "1.tar"]
    assert names(f"{base}/*/0.tar") == names(f"{base}/{{a,b}}/0.tar") == ["a/0.tar", "b/0.tar"]
    assert names(f"{base}/a/0.tar") == ["0.tar"]
    for shard in list_shards(base):
        assert read_rows(shard)[0][0]["image"] == shard.name.encode()
        assert shard.size_bytes and shard.size_bytes >= 1024
    assert "no such file or folder: " in refusal_of(f"{base}/gone")


def test_a_number_sign_in_a_uri_is_explained():
    """The part after the sign is not in the path, so the file was said not to exist."""
    assert "a; write %23" not in refusal_of("memory://bucket/a")
    assert refusal_of("memory://bucket/a#1.jpg").endswith("write %23 for each # of a name")


def test_wildcards_in_a_bucket_name_are_refused():
    assert "in the name of its bucket" in refusal_of("memory://{a,b}")


def test_the_bytes_of_a_remote_folder_are_known(tmp_path):
    filesystem, root = open_filesystem(f"memory://sizes{tmp_path}")
    assert isinstance(filesystem, pafs.PyFileSystem)
    filesystem.create_dir(root, recursive=True)
    for at in range(3):
        with filesystem.open_output_stream(f"{root}/{at}.png") as file:
            file.write(b"12345")
    (shard,) = list_shards(f"memory://sizes{tmp_path}")
    assert shard.size_bytes == 15
    assert [row["image"] for row in read_rows(shard)[0]] == [b"12345"] * 3


def test_files_that_braces_name_are_asked_for_at_the_same_time(tmp_path, monkeypatch):
    """1,024 tars of a bucket used to take a minute, one answer after another."""
    store, together = MemoryFileSystem(), threading.Barrier(4)
    for number in range(4):
        store.pipe_file(f"{tmp_path}/{number}.tar", b"")
    info = MemoryFileSystem.info

    def slow(self: MemoryFileSystem, path: str, **options: object) -> dict:
        together.wait(timeout=10)
        return info(self, path, **options)

    monkeypatch.setattr(MemoryFileSystem, "info", slow)
    assert len(list_shards(f"memory://{tmp_path}/{{0..3}}.tar")) == 4


def test_a_name_that_no_output_file_could_have_is_refused(tmp_path):
    (tmp_path / "\udcff.tar").write_bytes(b"")
    assert "is not valid UTF-8" in refusal_of(tmp_path)
    assert "must be a name in UTF-8; rename" in refusal_of(
        tmp_path / "\udcff.tar"
    )  # used to raise UnicodeEncodeError


def test_names_that_the_state_has_for_its_own_files_are_refused(tmp_path):
    """Their shards used to never finish: their results were taken for another shard's, or for none."""
    (tmp_path / "_blip2").mkdir()
    for name in ("x~again1", "y.tar", "_blip2/z.tar"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(InputError, match="the file x~again1 must not"):
        list_shards(str(tmp_path / "x~again1"), format="webdataset")
    with pytest.raises(InputError, match=r"the file _blip2/z\.tar must not"):
        list_shards([str(tmp_path / "y.tar"), str(tmp_path / "_blip2" / "z.tar")])
    for name in ("x~again1", "a/x~again12", "_blip2/z.tar", "x~again", "x~again1.tar", "a/_blip2/x.tar"):
        is_own = is_result(output_name(name)) and parse_folder_of_shard(folder_of_shard(name, 0)) == (name, 0)
        shard = Shard(name=name, format="webdataset", root="/", files=(name,))
        with nullcontext() if is_own else pytest.raises(InputError, match="rename"):
            refuse_unwritable([shard])


@pytest.mark.parametrize("name", ["", "@", "file://"])
def test_an_empty_name_is_not_the_working_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch(tmp_path, "a.tar")
    assert "must not be empty" in refusal_of(name)


def test_what_is_neither_file_nor_folder_is_refused(tmp_path):
    """Opening a pipe waits forever for its writer."""
    touch(tmp_path, "folder/a.tar")
    os.mkfifo(tmp_path / "folder" / "pipe.tar")
    (tmp_path / "folder" / "link.tar").symlink_to("pipe.tar")
    (tmp_path / "folder" / "broken.tar").symlink_to("nothing")
    for name in ("folder/pipe.tar", "folder/link.tar", "folder/{a,pipe}.tar", "/dev/null"):
        assert "must be a file or a folder" in refusal_of(tmp_path / name)
    assert "must be a file or a folder" in refusal_of(f"@{tmp_path}/folder/pipe.tar")
    for name in ("folder", "folder/*.tar"):  # these do not name the file itself
        assert names(tmp_path / name) == ["a.tar", "broken.tar"]
