"""`CaptionSpec`: what the caption stage makes of each image.

The job, the plan and `pipeline.caption` each describe their work by one spec, which `CaptionStage` takes. So
a rule about these values is written once, here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from blip2_actor import Calibration, EngineBuilder, EngineConfig, GenerationOptions, ImageLimits, ModelInfo
from pipeline.endpoint.settings import EndpointConfig
from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.settings.outputs import Outputs

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, kw_only=True)
class CaptionSpec:
    """A picklable description of the work on one dataset; validated when it is made."""

    engine: EngineBuilder = field(default=EngineConfig())
    """Builds the engine; a `MatchingConfig` if a retrieval checkpoint makes every output."""
    options: GenerationOptions = field(default=GenerationOptions())
    """How texts are generated; `resolved` gives every option a value."""
    image_column: str = "image"
    """Column of images; `pipeline.stages.image_column` says what it may hold."""
    prompt: str | None = None
    """Text that every caption continues; None for plain captions."""
    prompt_column: str | None = None
    """Column with the prompt of each row, instead of `prompt`."""
    outputs: Outputs = field(default=Outputs())
    """What is made of each image: the caption, answers, vectors, scores."""
    calibration: Calibration | None = None
    """What `outputs.calibration` names; the driver reads it, so that workers need no file."""
    reuse_identical: bool = False
    """Whether the texts of identical images are generated once per actor."""
    limits: ImageLimits = field(default=ImageLimits())
    """Limits for decoding one image."""
    fetch: FetchSettings | None = None
    """How images at web addresses in the column are fetched; None refuses these."""
    text_prefix: str = ""
    """Prefix of the columns whose texts are scored."""

    def __post_init__(self) -> None:
        if self.prompt is not None and self.prompt_column is not None:
            raise ValueError("prompt_column cannot be given together with prompt; give one of them")

    def resolved(self, info: ModelInfo) -> CaptionSpec:
        """Return the spec with a value for every option of generation, from the checkpoint where it has one.

        Raises:
            ValueError: the options contradict each other.
        """
        return replace(self, options=self.options.resolve(info.generation_config))

    def check(self, info: ModelInfo) -> None:
        """Refuse settings that would fail every row, before any work begins.

        Raises:
            ValueError: the model cannot take a prompt that every row would have, an option has token ids that
                the model does not have, the retrieval checkpoint does not fit the model (see
                `Outputs.score_digest`), the calibration is of other captions, or the endpoint refuses such
                work.
        """
        self.outputs.score_digest(self.engine, info)
        self._check_calibration(info)
        if info.vocab_size:  # an engine that is not EngineConfig's may not know it
            self.options.require_known_tokens(info.vocab_size)
        prompts = [text for text in (self.prompt, *self.outputs.asks.values()) if text]
        if isinstance(self.engine, EndpointConfig):
            self.engine.try_out(self.outputs, self.options, prompts)
        elif prompts:
            self.engine.check_prompts(prompts, self.options.max_new_tokens)

    def _check_calibration(self, info: ModelInfo) -> None:
        if self.calibration is None:
            return
        if self.prompt_column is not None and not self.calibration.row_prompts:
            misfit: str | None = "prompt"
        else:
            options = self.options.resolve(info.generation_config)
            misfit = self.calibration.misfit(info.digest, self.prompt, options)
        if misfit is not None:
            raise ValueError(
                f"calibration must be of captions with the {misfit} of this run, got "
                f"{self.outputs.calibration}; make a new one: blip2 calibrate"
            )

    @property
    def result_fields(self) -> tuple[pa.Field, ...]:
        """The columns with results that every dataset gets, in order."""
        from pipeline.schema import result_fields  # needs pyarrow, which --help does not

        return result_fields(self.outputs.caption, self.options.num_return_sequences)

    @property
    def fields(self) -> tuple[pa.Field, ...]:
        """All columns that the stage adds: results, then the columns that the user has named."""
        return (*self.result_fields, *self.outputs.fields)
