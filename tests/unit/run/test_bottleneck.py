"""The bottleneck decides what a person changes: naming the wrong stage costs money and helps nothing."""

from pipeline.run.bottleneck import busy_fractions, describe_bottleneck
from pipeline.stages.coordinator import Load


def test_the_busiest_stage_is_the_bottleneck_and_reading_when_none_is_busy():
    loads = {"decode": {"a": Load(1, 10), "b": Load(3, 10)}, "caption": {"c": Load(9, 10)}}
    assert busy_fractions(loads) == {"decode": 0.2, "caption": 0.9}
    assert describe_bottleneck({"decode": 0.2, "caption": 0.9}).startswith("bottleneck: caption, busy 90%")
    assert "reading" in describe_bottleneck({"decode": 0.2, "caption": 0.3})
