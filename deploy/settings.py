"""What an application is built from: the `args` of a Serve config file."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from blip2_actor import EngineConfig, GenerationOptions, ImageLimits


class Settings(BaseModel):
    """The model and the limits of the service. Replicas and devices are Serve's own `deployments`."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    engine: EngineConfig = EngineConfig()
    """Which model, and how it runs; the fields of `EngineConfig`."""
    options: GenerationOptions = GenerationOptions()
    """Options of a request that gives none; the fields of `GenerationOptions`."""
    timeout_s: float = Field(default=60.0, gt=0)
    """Seconds from the first byte of a request to its caption; beyond them the answer is 504."""
    max_in_flight: int = Field(default=512, ge=1, le=1000)
    """Requests one gateway replica serves at once; beyond them the answer is 503."""
    image: ImageLimits = ImageLimits(max_file_bytes=20 << 20, cpu_s=10.0, wall_s=30.0)
    """What one image may cost; the fields of `ImageLimits`, tighter than in a batch job."""
    decode_children: int = Field(default=2, ge=1)
    """Processes per gateway replica that decode images; give the replica as many CPUs."""
