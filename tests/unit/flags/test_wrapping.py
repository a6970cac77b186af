"""Sentences are wrapped at words in a terminal, but text to be pasted must stay in one piece."""

from __future__ import annotations

import io

import pytest

from blip2_actor.flags import Parser
from blip2_actor.flags.wrapping import wrap, wrap_for


def test_a_sentence_breaks_at_its_words_and_keeps_its_margin():
    text = "decode sandbox: uid 65534, no new privileges, no files, no network, no other processes"
    assert wrap(text, 40).split("\n") == [
        "decode sandbox: uid 65534, no new",
        "privileges, no files, no network, no",
        "other processes",
    ]
    assert wrap("  a.jpg: a red circle above a blue square", 24).split("\n") == [
        "  a.jpg: a red circle",
        "    above a blue square",
    ]
    assert wrap("short", 40) == "short"
    assert wrap("one\ntwo", 40) == "one\ntwo"


def test_the_second_column_stays_a_column():
    text = "warn  shared memory: 0.06 GiB; start the container with more"
    assert wrap(text, 30).split("\n") == [
        "warn  shared memory: 0.06 GiB;",
        "      start the container with",
        "      more",
    ]


COMMANDS = [
    "pip install 'blip2-ray[serve]'",
    "blip2 caption photos -o captions --prompt 'a photo of' --max-failed-fraction 0.1",
    "blip2 show --output /data/my_captions --status not_ok",
    "ray job stop --address http://127.0.0.1:8265 captions-0123456789abcdef",
    "python -m deploy.guard.keys NAME --batch",
    "blip2 calibrate",
]


@pytest.mark.parametrize("width", [20, 40, 80])
@pytest.mark.parametrize("end", ["", "; then run the first command again", " to see which of them are wrong"])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_never_broken(command, end, width):
    text = f"blip2 serve needs fastapi and some more packages; run: {command}{end}"
    lines = wrap(text, width).split("\n")
    assert any(command in line for line in lines), lines
    assert " ".join(line.strip() for line in lines) == text
    prose = [line for line in lines if command not in line]
    assert all(len(line) <= width for line in prose)


def test_a_line_that_is_a_command_stays_one_line():
    text = "      blip2 report --output /data/somewhere/captions --html report.html"
    assert wrap(text, 40) == text


def test_a_path_that_is_longer_than_a_line_is_left_to_the_terminal():
    path = "/a/very/long/path/that/somebody/wants/to/copy.parquet"
    assert wrap(f"output: {path}", 30).split("\n") == ["output:", path]


def test_wide_characters_fill_two_columns():
    assert wrap("你好 你好 你好", 10).split("\n") == ["你好 你好", "你好"]


def test_nothing_changes_where_there_is_no_terminal():
    text = "word " * 100
    assert wrap_for(io.StringIO(), text) == text


def test_help_breaks_at_words_and_leaves_examples_whole(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    example = "blip2 caption 's3://bucket/{000..099}.tar' -o s3://bucket/captions"
    parser = Parser(
        prog="blip2",
        description="Caption every image of an input into Parquet files, one per shard.",
        examples=((example, "tars in a bucket; their texts are kept next to the captions"),),
    )
    lines = parser.format_help().splitlines()
    assert f"  {example}" in lines
    assert max(len(line) for line in lines if example not in line) <= 40
    assert "Caption every image of an input into" in lines
