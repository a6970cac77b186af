"""Named outputs that contradict each other, or other columns, are refused before a run begins."""

import pytest

from pipeline.inputs.reader import ReadOptions
from pipeline.settings.job_settings import CaptionSettings, ScoreSettings
from pipeline.settings.outputs import Outputs


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ask": ("color",)}, "ask must be NAME=PROMPT, got 'color'"),
        ({"ask": ("caption=what?",)}, "ask must not name columns that the output has itself, got caption"),
        ({"ask": ("a=x",), "embed": ("a=vision",)}, "embed must not name columns .* got a;"),
        ({"score": ("a=x", "a=y")}, "score must name each column once, got a more than once"),
        ({"embed": ("a=pixels",)}, "embed must be NAME=KIND with one of vision, qformer, queries"),
        ({"caption": False}, "outputs must name at least one column"),
        ({"caption": False, "embed": ("a=vision",), "regenerate": True}, "regenerate must be left out"),
    ],
)
def test_outputs_that_contradict_each_other_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        Outputs(**values)


def test_a_kept_column_and_a_named_one_cannot_have_the_same_name():
    with pytest.raises(ValueError, match="ask must not name columns that the output has itself, got url"):
        CaptionSettings(
            input=("in",),
            output="out",
            outputs=Outputs(ask=("url=what?",)),
            reading=ReadOptions(keep=("url",)),
        )


def test_captions_of_the_input_can_be_scored():
    """`caption` means the caption that the run makes, but only if it makes captions."""
    scoring = ScoreSettings(input=("in",), output="out", text_column="caption").job()
    assert scoring.read_options.text_columns == ("caption",)
    captioning = CaptionSettings(input=("in",), output="out", outputs=Outputs(score=("fit=caption",)))
    assert captioning.read_options.text_columns == ()
