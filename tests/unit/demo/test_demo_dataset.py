"""The demonstration's data set: its expected results must be those of a reader of the files."""

from __future__ import annotations

import json
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from blip2_actor import Status, decode_image
from blip2_actor.demo import all_captions
from pipeline.demo.dataset import INPUTS, TRUTH_FILE, Expected, write_demo_dataset
from pipeline.inputs.listing import list_shards

NUM_IMAGES = 400


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Expected]]:
    folder = tmp_path_factory.mktemp("dataset")
    return folder, write_demo_dataset(folder, num_images=NUM_IMAGES, seed=3)


def paths_in(folder: Path) -> list[Path]:
    return [path for name in INPUTS for path in sorted((folder / name).iterdir())]


def read_images(folder: Path) -> dict[str, bytes | None]:
    images: dict[str, bytes | None] = {}
    for path in paths_in(folder):
        if path.suffix == ".parquet":
            table = pq.read_table(path)
            images.update(zip(table["key"].to_pylist(), table["image"].to_pylist(), strict=True))
            continue
        with tarfile.open(path) as tar:
            for member in tar:
                key, extension = member.name.split(".")
                images.setdefault(key, None)
                if extension not in ("txt", "json"):
                    file = tar.extractfile(member)
                    assert file is not None
                    images[key] = file.read()
    return images


def test_files_contain_exactly_the_expected_rows_in_order(dataset) -> None:
    folder, truth = dataset
    assert list(read_images(folder)) == list(truth)
    assert len(truth) == NUM_IMAGES
    stored = json.loads((folder / TRUTH_FILE).read_text())
    assert {k: Expected(status=Status(e.pop("status")), **e) for k, e in stored.items()} == truth


def test_every_row_decodes_to_its_expected_status(dataset) -> None:
    folder, truth = dataset
    for key, image in read_images(folder).items():
        decoded = decode_image(image, 64)
        assert decoded.status is truth[key].status, (key, truth[key], decoded.error)


def test_every_kind_of_odd_row_occurs_and_most_rows_are_plain(dataset) -> None:
    notes = Counter(expected.note for expected in dataset[1].values())
    assert len(notes) == 7
    assert notes[""] >= 0.95 * NUM_IMAGES


def test_captions_were_held_out_from_training(dataset) -> None:
    held_out = {str(c) for c in all_captions() if c.split == "held_out"}
    captions = {expected.caption for expected in dataset[1].values() if expected.caption is not None}
    assert captions <= held_out


def test_equal_seeds_write_equal_files(dataset, tmp_path: Path) -> None:
    folder, _ = dataset
    write_demo_dataset(tmp_path, num_images=NUM_IMAGES, seed=3)
    for path in paths_in(folder):
        assert (tmp_path / path.relative_to(folder)).read_bytes() == path.read_bytes(), path.name


def test_each_folder_of_inputs_is_an_input_by_itself(dataset) -> None:
    """Tars and a table used to share one folder, which `blip2 caption` and `blip2 plan` refuse."""
    folder, _ = dataset
    formats = [{shard.format for shard in list_shards(str(folder / name))} for name in INPUTS]
    assert formats == [{"webdataset"}, {"parquet"}]
