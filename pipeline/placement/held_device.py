"""`hold_device`: a broken accelerator is occupied, so that no stage gets it."""

from __future__ import annotations

from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.errors import Stopped
from pipeline.stages.device_health import Device

HOLD_S = 60.0
"""How long an actor waits for an accelerator that processes which are ending have held."""


class _Holder:
    """An actor that does nothing; Ray gives its accelerator to no other."""

    def device(self) -> Device:
        return Device.of_this_worker()


def hold_device(device: Device) -> list[Any]:
    """Occupy the accelerators of a device, so that no stage gets them; return the actors that hold them.

    Ray gives an actor any free accelerator of a node, so actors are started until each one is held.

    Raises:
        Stopped: Ray does not give the accelerators.
    """
    one = {"num_gpus": 1} if device.resource == "GPU" else {"resources": {device.resource: 1}}
    on_node = NodeAffinitySchedulingStrategy(device.node_id, soft=False)
    actor = ray.remote(_Holder).options(num_cpus=0, scheduling_strategy=on_node, **one)
    held: dict[str, Any] = {}
    while not held.keys() >= set(device.ids):
        holder = actor.remote()
        try:
            held[ray.get(holder.device.remote(), timeout=HOLD_S).ids[0]] = holder
        except ray.exceptions.RayError as error:
            raise Stopped(f"{device} is broken and cannot be left out: {error}") from error
    return [held[accelerator] for accelerator in device.ids]
