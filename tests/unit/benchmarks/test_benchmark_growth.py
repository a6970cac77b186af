"""The nonexistent folder of `benchmarks.growth` is listed like a real one."""

from __future__ import annotations

import os

import pytest

from benchmarks.growth.folder_books import NAMINGS, FolderBooks
from pipeline.inputs.listing import list_input


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_folder_of_names_that_are_made_up_is_listed(tmp_path, monkeypatch, naming):
    """The benchmark used to fail since the listing asks each entry whether it is a link."""
    monkeypatch.setattr(os, "scandir", os.scandir)  # undoes what FolderBooks replaces
    FolderBooks(str(tmp_path), 100, naming)
    listing = list_input((str(tmp_path),))
    assert sum(shard.num_rows or 0 for shard in listing.shards) == 100
