"""Reservations: stages that do not fit together wait forever; numbers fixed at the start never grow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from blip2_actor import EngineConfig
from blip2_actor.testing import FakeEngineConfig
from pipeline.errors import RefusedByCluster
from pipeline.placement.cluster import Cluster, Node
from pipeline.placement.node_types import NodeType
from pipeline.placement.reservations import Reservations, fit, reserve, resolve_engine
from pipeline.settings.placement import Placement

ENGINE = EngineConfig(model="demo")
ON_CPU = EngineConfig(model="demo", device="cpu")
HEAD = Node({"CPU": 0.0})
CPU_TYPE = NodeType("cpu", 32, {"CPU": 16.0}, {"pool": "cpu"})
GPU_TYPE = NodeType("accelerator", 8, {"CPU": 8.0, "GPU": 1.0}, {"pool": "accelerator"})
GROWING = Cluster((HEAD,), (CPU_TYPE, GPU_TYPE), is_local=False)
"""As `ray_cluster.yaml` describes it, before its first job."""
CPUS_ONLY = Cluster((Node({"CPU": 16.0}), Node({"CPU": 16.0})), is_local=False)


def machine(cpus: float, gpus: float = 0.0) -> Cluster:
    return Cluster((Node({"CPU": cpus, "GPU": gpus} if gpus else {"CPU": cpus}),))


def placed(cluster: Cluster, engine: Any = ENGINE, num_shards: int = 100, **values: Any) -> Reservations:
    return reserve(Placement(**values), cluster, engine, num_shards)


@pytest.mark.parametrize(("cpus", "gpus"), [(1, 0), (2, 0), (2, 1), (4, 0), (64, 8)])
@pytest.mark.parametrize("max_actors", [1, 2])
@pytest.mark.parametrize("is_local", [True, False])
def test_one_of_each_stage_fits_at_the_same_time(cpus, gpus, max_actors, is_local):
    """Otherwise actors hold all CPUs while the read task that would feed them waits forever."""
    cluster = Cluster(machine(cpus, gpus).nodes, is_local=is_local)
    needs = reserve(Placement(max_actors=max_actors), cluster, FakeEngineConfig())
    assert needs.read.num_cpus + needs.decode.num_cpus + max_actors * needs.caption.num_cpus <= cpus
    assert min(needs.read.num_cpus, needs.decode.num_cpus) > 0
    if not gpus:
        assert needs.num_threads is not None and 1 <= needs.num_threads <= cpus


@pytest.mark.parametrize("cpus", [1, 2, 4, 16])
def test_captioning_on_the_cpus_of_a_cluster_has_an_actor_on_each_node(cpus):
    """It used to have one actor, however many nodes there were."""
    needs = placed(Cluster((Node({"CPU": cpus}),) * 3, is_local=False), ON_CPU)
    assert needs.max_actors is None and not needs.caption.accelerators
    assert cpus / 2 < needs.caption.num_cpus < cpus
    assert needs.read.num_cpus + needs.decode.num_cpus + needs.caption.num_cpus <= cpus


def test_accelerators_that_do_not_run_yet_are_asked_for():
    """The job used to caption on CPUs to its end, because no accelerator ran when it started."""
    needs = placed(GROWING)
    assert needs.caption.options["num_gpus"] == 1
    assert (needs.min_actors, needs.max_actors) == (8, None)
    assert placed(GROWING, num_shards=3).min_actors == 3
    assert (placed(GROWING, max_actors=2).min_actors, placed(GROWING, min_actors=9).min_actors) == (2, 9)


def test_no_more_actors_are_asked_for_than_all_types_together_may_get_nodes():
    """Each type alone may get all of them: the job used to wait for actors that no node would ever take."""
    spot = NodeType("spot", 8, {"CPU": 8.0, "GPU": 1.0}, max_of_all=10)
    large = NodeType("large", 4, {"CPU": 8.0, "GPU": 2.0}, max_of_all=10)
    cpus = NodeType("cpu", 10, {"CPU": 16.0}, max_of_all=10)
    assert placed(Cluster((HEAD,), (cpus, spot, large), is_local=False)).min_actors == 4 * 2 + 6


def test_nothing_is_sized_by_the_empty_cluster():
    needs = placed(GROWING)
    assert needs.decode.num_cpus == 1 and needs.max_open_shards is None


@pytest.mark.parametrize(
    ("num_mib", "num_workers"), [(0, 1), (15, 1), (40, 3), (1000, 4), (None, 4)], ids=str
)
def test_a_small_input_gets_few_processes_on_one_machine(num_mib, num_workers):
    """Each used to cost a second of CPU time, for twenty images."""
    num_bytes = None if num_mib is None else num_mib << 20
    needs = reserve(Placement(max_decode_actors=4), machine(4), ON_CPU, 100, num_bytes)
    assert (needs.max_open_shards, needs.max_decode_actors) == (num_workers, num_workers)
    of_cluster = reserve(Placement(), CPUS_ONLY, ON_CPU, 100, num_bytes)
    assert of_cluster.max_open_shards is None and of_cluster.max_decode_actors is None


def test_a_cluster_without_accelerators_is_refused_and_the_remedy_named():
    with pytest.raises(RefusedByCluster, match=r"needs 1 GPU, .* has 32 CPU on 2 nodes, .*--device cpu"):
        placed(CPUS_ONLY)
    assert not placed(CPUS_ONLY, ON_CPU).caption.accelerators
    with pytest.raises(
        RefusedByCluster, match=r"needs 1 NPU, .*1 GPU \(accelerator\); start such nodes, name "
    ):
        placed(GROWING, accelerator="NPU=1")


def test_unknown_node_types_are_not_refused():
    assert placed(Cluster((HEAD,), None, is_local=False)).caption.accelerators["GPU"] == 1


def test_one_machine_takes_what_it_has():
    assert not placed(machine(4)).caption.accelerators
    needs = placed(machine(4, 2))
    assert (needs.caption.accelerators["GPU"], needs.min_actors, needs.max_actors) == (1, 1, 2)
    with pytest.raises(RefusedByCluster, match="this machine has 4 CPU"):
        placed(machine(4), gpus_per_actor=1)


def test_device_cpu_takes_no_accelerator():
    """Actors used to reserve GPUs and leave them idle."""
    caption = placed(machine(4, 2), ON_CPU).caption
    assert not caption.accelerators and str(caption) == f"{caption.num_cpus:g} CPU"


def test_other_accelerators_and_parts_of_a_gpu():
    npus = Cluster((Node({"CPU": 8.0, "NPU": 4.0}), Node({"CPU": 8.0, "NPU": 2.0})), is_local=False)
    needs = placed(npus, accelerator="NPU=2")
    assert needs.caption.options == {
        "num_cpus": 0.0,
        "num_gpus": None,
        "resources": {"NPU": 2.0},
        "label_selector": None,
    }
    assert str(needs.caption) == "2 NPU"
    assert needs.max_actors == 3, "Ray Data does not limit a pool by such resources"
    assert placed(machine(4, 2), gpus_per_actor=0.5).max_actors == 4


def test_a_split_model_takes_all_cards_of_one_node():
    nodes = (Node({"CPU": 8.0, "GPU": 4.0}), Node({"CPU": 8.0, "GPU": 1.0}))
    needs = placed(Cluster(nodes), EngineConfig(model="demo", device_map="auto"))
    assert (needs.caption.accelerators["GPU"], needs.max_actors) == (4, 1)


def test_types_and_labels_choose_the_nodes():
    big = NodeType("big", 2, {"CPU": 8.0, "GPU": 1.0, "accelerator_type:H100": 1.0}, {"pool": "big"})
    cluster = Cluster((HEAD,), (CPU_TYPE, GPU_TYPE, big), is_local=False)
    typed = placed(cluster, accelerator_type="H100")
    assert (
        typed.caption.accelerators == {"GPU": 1.0, "accelerator_type:H100": 0.001} and typed.max_actors == 2
    )
    labeled = placed(cluster, caption_label=("pool=big",), decode_label=("pool=cpu",))
    assert labeled.max_actors == 2 and labeled.decode.options["label_selector"] == {"pool": "cpu"}
    with pytest.raises(RefusedByCluster, match="needs 1 GPU, pool=small"):
        placed(cluster, caption_label=("pool=small",))
    assert placed(cluster, caption_label=("pool=in(big, small)",)).max_actors == 2
    without_label = placed(cluster, caption_label=("pool=!big",))
    assert without_label.max_actors == GPU_TYPE.max_nodes


@pytest.mark.parametrize(("max_actors", "num_threads"), [(1, 16), (3, 16), (6, 8), (12, 4), (100, 1)])
def test_a_number_of_actors_shares_the_cores_of_all_nodes(max_actors, num_threads):
    cluster = Cluster((Node({"CPU": 16.0}),) * 3, is_local=False)
    assert placed(cluster, ON_CPU, max_actors=max_actors).num_threads == num_threads


def test_each_stage_is_sized_by_the_nodes_that_its_labels_choose():
    """It used to be sized by the largest node, although it ran on others, and waited forever."""
    on_cpus = placed(GROWING, ON_CPU, caption_label=("pool=accelerator",))
    assert on_cpus.caption.num_cpus < 8 and on_cpus.num_threads == 8
    small = Node({"CPU": 2.0, "GPU": 2.0, "accelerator_type:L4": 1.0}, {"pool": "small"})
    cluster = Cluster((Node({"CPU": 64.0, "GPU": 8.0}), small), is_local=False)
    needs = placed(cluster, decode_label=("pool=small",), read_label=("pool=small",))
    assert (needs.decode.num_cpus, needs.read.num_cpus) == (0.5, 0.25)
    split = EngineConfig(model="demo", device_map="auto")
    assert placed(cluster, split).caption.accelerators["GPU"] == 8
    assert placed(cluster, split, caption_label=("pool=small",)).caption.accelerators["GPU"] == 2
    assert placed(cluster, split, accelerator_type="L4").caption.accelerators["GPU"] == 2
    assert placed(cluster, ON_CPU, max_actors=1, caption_label=("pool=small",)).num_threads == 2


@pytest.mark.parametrize("stage", ["caption", "decode", "read"])
@pytest.mark.parametrize("cluster", [GROWING, CPUS_ONLY, machine(4)], ids=["growing", "fixed", "local"])
def test_a_label_that_no_node_has_is_refused_for_every_stage(cluster, stage):
    """Only an accelerator's label used to be checked: the job started accelerators, and waited forever."""
    labels: dict[str, Any] = {f"{stage}_label": ("pool=cpuu",)}
    with pytest.raises(RefusedByCluster, match=rf"pool=cpuu, and no node offers it: .*--{stage}-label"):
        placed(cluster, ON_CPU, **labels)
    assert placed(Cluster((HEAD,), None, is_local=False), ON_CPU, **labels)


def test_labels_that_a_platform_does_not_report_may_be_there():
    """Its autoscaler reports the resources of its groups of nodes, but no labels."""
    cluster = Cluster((HEAD,), (NodeType("group", 4, {"CPU": 8.0}, None),), is_local=False)
    labels: dict[str, Any] = {f"{stage}_label": ("pool=cpu",) for stage in ("caption", "decode", "read")}
    assert placed(cluster, ON_CPU, **labels).num_threads == 8
    unknown = Cluster((Node({"CPU": 16.0}),), None, is_local=False)
    assert placed(unknown, ON_CPU, **labels).num_threads == 16


def test_a_head_whose_nodes_are_yet_to_join_is_waited_for():
    """Nodes of a cluster without autoscaler may join seconds after the job has begun."""
    assert placed(Cluster((HEAD,), is_local=False), ON_CPU).caption.num_cpus > 0


def test_a_node_that_is_alive_may_have_more_than_its_type_says():
    node = Node({"CPU": 8.0, "GPU": 1.0}, {"ray.io/node-group": "bare"})
    cluster = Cluster((HEAD, node), (NodeType("bare", 4, {}),), is_local=False)
    assert placed(cluster).caption.accelerators["GPU"] == 1


@dataclass(frozen=True)
class NoDevice:
    """An engine whose device cannot be chosen."""


def test_an_engine_without_a_device_takes_what_is_there():
    builder: Any = NoDevice()
    assert not placed(CPUS_ONLY, builder).caption.accelerators
    assert placed(GROWING, builder).caption.accelerators["GPU"] == 1


def test_a_device_that_is_left_out_is_waited_for_only_if_nodes_may_come():
    two = machine(4, 2)
    assert fit(Placement(min_actors=2), 1, two) == Placement(min_actors=1, max_actors=1)
    assert fit(Placement(min_actors=2), 1, GROWING) == Placement(min_actors=1)


def test_the_engine_is_told_its_device_and_threads_on_cpus():
    on_cpus = resolve_engine(ENGINE, placed(machine(4)))
    assert isinstance(on_cpus, EngineConfig) and (on_cpus.device, on_cpus.num_threads) == ("cpu", 4)
    assert resolve_engine(ENGINE, placed(GROWING)) == ENGINE


def test_the_smallest_store_of_a_worker_holds_many_blocks():
    """Twelve blocks in progress used to fill a store of 100 MiB, and Ray spilled a seventh of the pixels."""
    stores = [
        {"CPU": cpus, "object_store_memory": mib * 2.0**20} for cpus, mib in [(0, 10), (2, 320), (2, 96)]
    ]
    assert placed(Cluster(tuple(map(Node, stores)))).max_block_bytes == 3 << 20
    assert placed(CPUS_ONLY, ON_CPU).max_block_bytes is None
