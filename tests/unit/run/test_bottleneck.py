"""Users act on the bottleneck: naming the wrong stage costs money and helps nothing."""

import pytest

from pipeline.attempts.attempt import WorkerLoad
from pipeline.run.bottleneck import (
    TOO_SHORT,
    Machines,
    WorkerLoads,
    busy_fractions,
    describe_bottleneck,
)

TWO_CORES = Machines(num_cpus=2, num_accelerators=0, num_workers={"caption": 1, "decode": 2})


def test_the_busiest_stage_is_the_bottleneck_and_reading_when_none_is_busy():
    loads = {"decode": {"a": WorkerLoad(1, 10), "b": WorkerLoad(3, 10)}, "caption": {"c": WorkerLoad(9, 10)}}
    busy = busy_fractions(loads)
    assert busy == {"decode": 0.2, "caption": 0.9}
    assert describe_bottleneck(busy, 60, TWO_CORES).startswith("bottleneck: caption, busy 90%")
    assert "reading" in describe_bottleneck({"decode": 0.2, "caption": 0.3}, 60, TWO_CORES)


def test_a_short_run_names_none():
    """The engine of a run of ten seconds is busy 40 % of the time, because it has just been filled."""
    assert describe_bottleneck({"caption": 0.9}, 59.9, TWO_CORES) == TOO_SHORT
    assert describe_bottleneck({}, 100, TWO_CORES) == TOO_SHORT


@pytest.mark.parametrize(
    ("stage", "cpus", "accelerators", "workers", "advice"),
    [
        ("caption", 2, 0, 1, "a faster device or more machines"),
        ("caption", 64, 8, 8, "a faster device or more machines"),
        ("caption", 64, 8, 3, "--max-actors, up to 8"),
        ("decode", 2, 0, 2, "more CPUs or --image-jpeg-draft"),
        ("decode", 16, 0, 2, "--max-decode-actors, up to 16"),
        ("write", 16, 0, 1, "a faster store for the output"),
    ],
)
def test_more_actors_are_advised_only_if_there_is_something_to_run_on(
    stage, cpus, accelerators, workers, advice
):
    """On two cores, the advice used to be more captioning actors, which would share the same cores."""
    machines = Machines(num_cpus=cpus, num_accelerators=accelerators, num_workers={stage: workers})
    assert advice in describe_bottleneck({stage: 0.9}, 3600, machines)


def test_a_worker_that_is_gone_counts_no_longer_as_one_with_nothing_to_do():
    """Workers of lost nodes used to make a stage look idle, and reading was named as the bottleneck."""
    worker_loads = WorkerLoads()
    for second in range(1, 101):
        busy_s = {"a-1": min(second, 10.0), "b-1": max(0.0, second - 10.0)}
        loads = {"caption": {worker: WorkerLoad(busy_s[worker], float(second)) for worker in busy_s}}
        at_work = {"a-1", "b-1"} if second <= 10 else {"b-1"}
        found = worker_loads.stop_gone(loads, at_work)
    assert found["caption"] == {"a-1": WorkerLoad(10.0, 11.0), "b-1": WorkerLoad(90.0, 100.0)}
    assert worker_loads.stop_gone(loads, ()) == found, "at the end the others are let go"
    assert WorkerLoads().stop_gone(loads, ()) == loads
