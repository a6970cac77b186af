"""`--endpoint`: the flags, and the recipe by which a job builds a remote engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from blip2_actor import (
    EngineConfig,
    Features,
    GenerationOptions,
    ModelInfo,
    Request,
    Result,
    Score,
    Status,
)
from blip2_actor.inputs.field_types import require_types
from pipeline.endpoint.client import Endpoint, EndpointError, read_key
from pipeline.settings.outputs import Outputs
from pipeline.settings.placement import Placement

if TYPE_CHECKING:
    from pipeline.endpoint.remote_engine import RemoteEngine

ACCELERATORS = ("gpus_per_actor", "accelerator", "accelerator_type")
"""Settings of a placement that are about the accelerators of a captioning actor."""


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """A recipe for a `RemoteEngine`; an `EngineBuilder`, as `EngineConfig` is."""

    endpoint: Endpoint
    key_file: str | None = None
    """File with the key, or its URI; the machine that starts the job reads it."""
    ignore_generation_config: bool = False
    known: ModelInfo | None = None
    """The model that the endpoint must serve; None asks for it."""
    device: ClassVar[str] = "cpu"
    """A worker needs no accelerator."""

    def info(self) -> ModelInfo:
        """Return the model of the endpoint.

        Raises:
            EndpointError: it gives no answer.
        """
        if self.known is not None:
            return self.known
        info = self.endpoint.model_info()
        return dataclasses.replace(info, generation_config={}) if self.ignore_generation_config else info

    def with_info(self) -> EndpointConfig:
        """Return a recipe that any machine can use: it has the key, and it knows its model.

        Raises:
            EndpointError: the endpoint gives no answer.
            ValueError: the key cannot be read.
        """
        endpoint = self.endpoint
        if self.key_file is not None:
            endpoint = dataclasses.replace(endpoint, key=read_key("endpoint_key_file", self.key_file))
        keyed = dataclasses.replace(self, endpoint=endpoint, key_file=None)
        return dataclasses.replace(keyed, known=keyed.info())

    def check_prompts(self, prompts: Sequence[str], max_new_tokens: int) -> None:
        self.try_out(Outputs(), GenerationOptions(max_new_tokens=max_new_tokens), prompts)

    def try_out(self, outputs: Outputs, options: GenerationOptions, prompts: Sequence[str] = ()) -> None:
        """Have the endpoint make of a black image what the job will ask for, before any work begins.

        Raises:
            ValueError: it refuses the key, the options, a prompt, features or scores.
        """
        import numpy as np

        size_px = self.info().image_size_px
        image = np.zeros((size_px, size_px, 3), np.uint8)
        with self.build(waits=False) as engine:
            options = options.resolve(self.info().generation_config)
            asks = prompts or ((None,) if outputs.caption else ())
            results = engine.generate([Request(image=image, prompt=prompt) for prompt in asks], options)
            tried: dict[str, Result | Features | Score] = {
                "captions" if prompt is None else f"the prompt {prompt!r}": result
                for prompt, result in zip(asks, results, strict=True)
            }
            if outputs.embed:
                (tried["embed"],) = engine.features([image])
            if outputs.score:
                (tried["score"],) = engine.score([image], ["black"], [None])
            for what, outcome in tried.items():
                if outcome.status is Status.REFUSED:
                    raise EndpointError(f"{self.endpoint.url} refuses {what}: {outcome.error}")

    def build(self, waits: bool = True) -> RemoteEngine:
        """Start the threads that send requests.

        Args:
            waits: an endpoint that is gone, busy, or has another model is waited for; else it is an error.
        """
        from pipeline.endpoint.remote_engine import RemoteEngine

        return RemoteEngine(self.endpoint, self.info(), waits)


@dataclass(frozen=True, kw_only=True)
class EndpointSettings:
    """Whether a running endpoint makes the captions."""

    endpoint: str | None = None
    """URL of a running endpoint, such as http://127.0.0.1:8000, that makes captions, answers, vectors and
    scores behind the requests of its other callers; no model is loaded here."""
    endpoint_key_file: str | None = None
    """File with the key for --endpoint, or its URI; the key needs the right to send batch work."""

    def __post_init__(self) -> None:
        require_types(self)
        if self.endpoint is not None:
            Endpoint(self.endpoint)
        elif self.endpoint_key_file is not None:
            raise ValueError(
                "endpoint_key_file must be left out without endpoint; give the URL of an endpoint"
            )

    @property
    def config(self) -> EndpointConfig | None:
        """The recipe for the engine; None if the model is loaded here."""
        if self.endpoint is None:
            return None
        return EndpointConfig(endpoint=Endpoint(self.endpoint), key_file=self.endpoint_key_file)

    def check(self, engine: EngineConfig, outputs: Outputs, placement: Placement) -> None:
        """Refuse what an endpoint does not make, and settings of an engine that it would ignore.

        Raises:
            ValueError: one is given; the message names it.
        """
        if self.endpoint is None:
            return
        if outputs.score_model:
            raise ValueError(
                "score_model must be left out with endpoint, which scores with its captioning model; compare "
                "images and texts in a run of its own: blip2 score"
            )
        for name in ACCELERATORS:
            if getattr(placement, name):
                raise ValueError(f"{name} must be left out with endpoint, which has the accelerators")
        if placement.step_timeout_s != Placement.step_timeout_s:
            raise ValueError(
                "step_timeout_s must be left out with endpoint, which watches its own engine, got "
                f"{placement.step_timeout_s:g}"
            )
        for each in dataclasses.fields(EngineConfig):
            value: Any = getattr(engine, each.name)
            if each.name != "ignore_generation_config" and value != each.default:
                raise ValueError(
                    f"{each.name} must be left out with endpoint, which has a model of its own, got {value}"
                )

    def of_placement(self, placement: Placement) -> Placement:
        """Return the placement that actors have here: those that only send reserve no accelerator."""
        if self.endpoint is None:
            return placement
        none: dict[str, Any] = dict.fromkeys(ACCELERATORS)
        return dataclasses.replace(placement, **none)

    def of_model(self, engine: EngineConfig, info: ModelInfo) -> EngineConfig:
        """Return the engine that would make the same rows here."""
        if self.endpoint is None:
            return engine
        return dataclasses.replace(engine, model=info.model, quantize=info.quantize)  # type: ignore[arg-type]
