"""The folder of `benchmarks.growth` that does not exist is listed as one that does."""

from __future__ import annotations

import os

import pytest

from benchmarks.growth.folder_books import NAMINGS, FolderBooks
from pipeline.inputs.listing import list_input


@pytest.mark.parametrize("naming", NAMINGS)
def test_a_folder_of_names_that_are_made_up_is_listed(tmp_path, monkeypatch, naming):
    """The case ended when the listing began to ask each entry whether it is a link."""
    monkeypatch.setattr(os, "scandir", os.scandir)  # which FolderBooks replaces
    FolderBooks(str(tmp_path), 100, naming)
    listing = list_input((str(tmp_path),))
    assert sum(shard.num_rows or 0 for shard in listing.shards) == 100
