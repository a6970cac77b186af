"""Braces and globs mean what they mean in a shell."""

import pytest

from pipeline.inputs.globs import expand_braces, matches


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("a/{000..002}.tar", ["a/000.tar", "a/001.tar", "a/002.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{2..1}", ["2", "1"]),
        ("{train,val}/{0..1}", ["train/0", "train/1", "val/0", "val/1"]),
        ("x{a,b{1..2}}", ["xa", "xb1", "xb2"]),
        ("{only}{}", ["{only}{}"]),
        ("plain", ["plain"]),
    ],
)
def test_braces(text, expanded):
    assert expand_braces(text) == expanded


@pytest.mark.parametrize(
    ("pattern", "path", "whole", "beginning"),
    [
        ("*.tar", "0.tar", True, True),
        ("*.tar", "a/0.tar", False, False),
        ("a/*.tar", "a", False, True),
        ("a/*.tar", "b", False, False),
        ("**/*.tar", "0.tar", True, True),
        ("**/*.tar", "a/b/0.tar", True, True),
        ("**/x/*.tar", "a/b", False, True),
        ("[ab]?/0.tar", "a1/0.tar", True, True),
        ("*.TAR", "0.tar", False, False),
    ],
)
def test_globs(pattern, path, whole, beginning):
    assert matches(path.split("/"), pattern.split("/")) == whole
    assert matches(path.split("/"), pattern.split("/"), beginning=True) == beginning
