"""What the workers of a local cluster import: our packages, whatever the working folder holds.

Ray puts the driver's working folder in front of the import path of every worker. A user's `pipeline.py` in
that folder would be imported in place of this package, and no task could be unpickled. `OurPackagesFirst`
replaces the working folder with the folder of our packages.
"""

from __future__ import annotations

from ray.job_config import JobConfig

from blip2_actor.installation import ROOT


class OurPackagesFirst(JobConfig):
    """A job config whose workers search our folder first, and the driver's working folder not at all."""

    def _serialize(self) -> str:
        # Ray has added the working folder by now; only this method is called afterwards (Ray 2.60).
        self._py_driver_sys_path = [str(ROOT)]
        return super()._serialize()
