"""What a request asks of each of its images: fields of the body, and the work that they become."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, field_validator

from deploy.http.errors import ApiError
from deploy.http.options import options_schema, parse_options
from deploy.http.served_model import ServedModel
from deploy.work import ImageWork, TextToGenerate, TextToScore

MAX_TEXT_CHARS = 8_192
"""Maximum length of a prompt; the model's own limit, in tokens, is lower."""
MAX_TEXTS = 64
"""Maximum number of texts to score or to choose from."""
MAX_QUESTIONS = 16

Text = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
Texts = Annotated[list[Text], Field(max_length=MAX_TEXTS)]
CAPTION = "caption"
"""The name of the caption among the outputs of a stream; a prompt of `ask` needs another one."""
Name = Annotated[str, Field(min_length=1, max_length=64, json_schema_extra={"not": {"const": CAPTION}})]
ModelName = Annotated[str, Field(max_length=MAX_TEXT_CHARS)]
Options = Annotated[dict[str, Any], WithJsonSchema(options_schema())]
EmbeddingKind = Literal["vision", "qformer", "queries", "contrastive"]
EmbeddingKinds = Annotated[list[EmbeddingKind], Field(max_length=len(get_args(EmbeddingKind)))]


class Body(BaseModel):
    """The fields of a request; unknown ones are refused, and no type is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True)


class Wishes(Body):
    """What is asked of an image; all of it shares one pass of the vision encoder."""

    model: ModelName | None = None
    """One of `/v1/models`; without one, the first of them."""
    prompt: Text | None = None
    """Text that the caption continues; without one, the image is described."""
    options: Options | None = None
    """Generation options; what is left out takes the value of the service."""
    ask: Annotated[dict[Name, Text], Field(max_length=MAX_QUESTIONS)] | None = None
    """Further prompts by name, such as {"color": "Question: what color is it? Answer:"}."""
    choices: Texts | None = None
    """Possible answers to the prompt; each gets a probability, and these add up to 1."""
    score: Texts | None = None
    """Texts whose log-probability after the image and the prompt is wanted."""
    match: Texts | None = None
    """Texts to compare with the image; this needs a retrieval model (--score-model)."""
    embed: EmbeddingKinds | None = None
    """Vectors of the image: vision (pooled), qformer (the mean of the queries), queries (each of them), and
    contrastive, which needs a retrieval model."""
    attention: bool = False
    """Say where in the image the Q-Former looked."""

    @field_validator("ask")
    @classmethod
    def _refuse_taken_name(cls, ask: dict[str, str] | None) -> dict[str, str] | None:
        if CAPTION in (ask or {}):
            raise ValueError(f"{CAPTION!r} is the name of the caption itself; give the prompt another one")
        return ask

    def work(self, model: ServedModel) -> ImageWork:
        """Return what the engine has to do for each image; raise ApiError 400 if it cannot."""
        options = parse_options(self.options, model.options)
        kinds = self.embed or []
        if self.match or "contrastive" in kinds:
            require_matching(model, "match" if self.match else "embed")
        asked = (self.ask or {}).values()
        # Only the best answer is reported.
        answer_options = replace(options, num_return_sequences=1) if asked else options
        return ImageWork(
            texts=(
                TextToGenerate(prompt=self.prompt or None, options=options),
                *(TextToGenerate(prompt=prompt, options=answer_options) for prompt in asked),
            ),
            scores=tuple(
                TextToScore(text=text, prompt=self.prompt or None)
                for text in (*(self.choices or ()), *(self.score or ()))
            ),
            matches=tuple(self.match or ()),
            features=any(kind != "contrastive" for kind in kinds),
            contrastive="contrastive" in kinds,
            attention=self.attention,
        )


def require_matching(model: ServedModel, what: str) -> None:
    """Raise ApiError 400 unless the model has a retrieval model next to it."""
    if model.matching is None:
        raise ApiError(
            400,
            "unsupported",
            f"{what} needs a retrieval model, and {model.name} is a captioning model, which gives "
            "texts, log-probabilities and features; start the service with --score-model, or use score",
        )
