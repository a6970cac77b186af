"""Braces and globs have the same meaning as in a shell."""

import pytest

from pipeline.inputs.globs import expand_braces, matches, may_match_below


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("a/{000..002}.tar", ["a/000.tar", "a/001.tar", "a/002.tar"]),
        ("{9..11}", ["9", "10", "11"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{2..1}", ["2", "1"]),
        ("{0..5..2}", ["0", "2", "4"]),
        ("{010..0..-5}", ["010", "005", "000"]),
        ("{-1..1}", ["-1", "0", "1"]),
        ("{-01..1}", ["-01", "000", "001"]),
        ("x{a..c}", ["xa", "xb", "xc"]),
        ("{e..a..2}", ["e", "c", "a"]),
        ("{a..3}", ["{a..3}"]),
        ("{train,val}/{0..1}", ["train/0", "train/1", "val/0", "val/1"]),
        ("x{a,b{1..2}}", ["xa", "xb1", "xb2"]),
        ("{only}{}", ["{only}{}"]),
        ("plain", ["plain"]),
    ],
)
def test_braces_are_expanded_like_in_a_shell(text, expanded):
    assert expand_braces(text) == expanded


@pytest.mark.parametrize(
    ("pattern", "path", "is_match", "is_match_below"),
    [
        ("*.tar", "0.tar", True, False),
        ("*.tar", "a/0.tar", False, False),
        ("a/*.tar", "a", False, True),
        ("a/*.tar", "b", False, False),
        ("**/*.tar", "0.tar", True, True),
        ("**/*.tar", "a/b/0.tar", True, True),
        ("**/x/*.tar", "a/b", False, True),
        ("[ab]?/0.tar", "a1/0.tar", True, False),
        ("[ab]?/0.tar", "a1", False, True),
        ("a/**", "a/b", True, True),
        ("a/**", "a", False, True),
        ("*.TAR", "0.tar", False, False),
    ],
)
def test_globs_match_like_in_a_shell(pattern, path, is_match, is_match_below):
    assert matches(path.split("/"), pattern.split("/")) == is_match
    assert may_match_below(path.split("/"), pattern.split("/")) == is_match_below
