"""`POST /`: the image-to-text task as Hugging Face's clients call it at the address of an endpoint."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse

from deploy.guard.cost import cost_of
from deploy.http.answers import Answer
from deploy.http.errors import bad_request
from deploy.http.images import ImageField
from deploy.http.openapi import body_of, errors
from deploy.http.options import parse_options
from deploy.http.request_body import read_body
from deploy.http.wishes import Body, ModelName, Options
from deploy.service import Service
from deploy.work import ImageWork, TextToGenerate


class ImageToTextParameters(Body):
    max_new_tokens: int | None = None
    generation_parameters: Options | None = None
    """Generation options, with the names of transformers."""
    generate_kwargs: Options | None = None
    """Another name of `generation_parameters`."""

    @property
    def options(self) -> dict[str, Any]:
        """The options that are given; raise ApiError 400 if one is given in two ways."""
        if self.generation_parameters is not None and self.generate_kwargs is not None:
            raise bad_request("parameters: generate_kwargs must be left out with generation_parameters")
        options = self.generation_parameters or self.generate_kwargs or {}
        given = {name: x for name, x in options.items() if x is not None}
        if self.max_new_tokens is None:
            return given
        if given.get("max_new_tokens", self.max_new_tokens) != self.max_new_tokens:
            raise bad_request("parameters: max_new_tokens must be given once")
        return given | {"max_new_tokens": self.max_new_tokens}


class ImageToTextBody(Body):
    """The image, as `inputs` or `image` in JSON; or the body itself."""

    inputs: ImageField | None = None
    image: ImageField | None = None
    """Another name of `inputs`."""
    parameters: ImageToTextParameters = ImageToTextParameters()
    model: ModelName | None = None
    """One of `/v1/models`; without one, the first of them."""


class GeneratedText(Answer):
    generated_text: str


def image_to_text_router(service: Service) -> APIRouter:
    """Return the route of the task."""
    router = APIRouter(tags=["Hugging Face"], responses=errors())

    @router.post("/", openapi_extra=body_of(ImageToTextBody, raw=True), response_model=list[GeneratedText])
    async def image_to_text(request: Request) -> JSONResponse:
        """Caption one image, as `huggingface_hub.InferenceClient.image_to_text` asks."""
        body = await read_body(request, ImageToTextBody, service.image_policy)
        image = body.inputs if body.image is None else body.image
        if image is None or (body.inputs is not None and body.image is not None):
            raise bad_request("inputs or image must be given, one of them")
        async with service.model(body.model, may_be_on_trial=True) as model:
            options = parse_options(body.parameters.options, model.options)
            work = ImageWork(texts=(TextToGenerate(prompt=None, options=options),))
            async with service.admit(cost_of(work)):
                made = await service.make(model, image, work)
        return JSONResponse([{"generated_text": one.text} for one in made.outputs.completions])

    return router
