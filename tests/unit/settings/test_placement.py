"""Reservations: stages that do not fit on the cluster at the same time wait for each other forever."""

import pytest

from pipeline.settings.placement import ClusterSize, Placement, reserve


@pytest.mark.parametrize(("cpus", "gpus"), [(1, 0), (2, 0), (2, 1), (4, 0), (64, 8)])
@pytest.mark.parametrize("max_actors", [1, 2])
def test_one_of_each_stage_fits_at_the_same_time(cpus, gpus, max_actors):
    """Otherwise actors hold all CPUs while the read task that would feed them waits forever."""
    placement = Placement(max_actors=max_actors)
    needs = reserve(placement, ClusterSize(num_cpus=cpus, num_gpus=gpus, cpus_per_node=cpus))
    assert needs.read_cpus + needs.decode_cpus + max_actors * needs.caption_cpus <= cpus
    assert min(needs.read_cpus, needs.decode_cpus) > 0
    if not gpus:
        assert needs.num_threads is not None and 1 <= needs.num_threads <= cpus
