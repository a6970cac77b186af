"""The command `blip2 plan`: say what a job would take, without running it.

The plan is made here, or in a worker of a cluster. The output folder is as before when the command ends.
"""

from __future__ import annotations

import json
import sys

from blip2_actor import EngineBuilder
from pipeline.exit_status import before_work, errors_to_exit_status
from pipeline.plan.make_plan import make_plan
from pipeline.plan.on_cluster import make_plan_on_cluster
from pipeline.progress import Console, write_json
from pipeline.settings.plan_settings import AnyPlanSettings


@errors_to_exit_status
def plan(settings: AnyPlanSettings, engine: EngineBuilder | None = None) -> int:
    """Print a plan, as lines or as one JSON object."""
    console = Console()
    with before_work(type(settings)):  # a plan starts nothing: all that it refuses, the job would refuse
        if settings.on_cluster:
            found = make_plan_on_cluster(settings, engine, Console(sys.stderr).say)
        else:
            found = make_plan(settings, engine)
    if settings.json:
        write_json(json.dumps(found.to_dict()))
        return 0
    for line in found.lines():
        console.result(line)
    return 0
