"""What the endpoint is built from: the `args` of a Serve config, and the flags of `blip2 serve`.

Nothing here imports pydantic, Ray or torch, so `blip2 serve --help` is fast; `deploy.app` checks the `args`.
"""

from __future__ import annotations

import math
import re
import shlex
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from ipaddress import ip_address
from typing import Any, ClassVar, NoReturn

from blip2_actor import (
    Calibration,
    EngineConfig,
    FetchPolicy,
    GenerationOptions,
    ImageLimits,
    MatchingConfig,
    ModelInfo,
)
from blip2_actor.flags import Parser, add_flags, hiding, prefixed, written_as
from blip2_actor.inputs.field_types import require_types
from deploy.observe.logs import LogLevel
from deploy.trials.share import Share

BODY_WITHIN_S = 60.0
"""Seconds from the headers of a request to the end of its body, apart from the time for the answer."""
FETCH_WITHIN_S = 15.0
"""Seconds for fetching one image, redirects included."""
MAX_IN_FLIGHT = 1000
"""Half of what Serve itself queues for a gateway, so that the gateway refuses requests first, in JSON."""

_MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_HOST = r"[A-Za-z0-9_]([A-Za-z0-9_.-]*[A-Za-z0-9_.])?"
_NAME = rf"\*|{_HOST}|\[[\w:.]+\]|[\da-fA-F]*:[\da-fA-F]*:[\da-fA-F:.]*"
_PLACES = {
    "allow_image_host": (_HOST, "a host name such as images.example.com", "leave out scheme, port and path"),
    "allowed_hosts": (_NAME, "a host name such as api.example.com, or *", "leave out scheme, port and path"),
    "allowed_origins": (  # as browsers write them
        rf"\*|null|file://|(?!(?i:http://.*:80|https://.*:443)$)[A-Za-z][A-Za-z0-9+.-]*://({_HOST}|\[[\w:.]+\])(:\d+)?",
        "an origin such as https://app.example.com, or *",
        "write scheme://host[:port] without a path or a default port",
    ),
}
"""Fields that name hosts or origins: their form, what it is, and how to write it."""


@dataclass(frozen=True, kw_only=True)
class OnlineImageLimits(ImageLimits):
    """Limits for one image; tighter than in a batch job, because a caller waits for the answer."""

    max_file_bytes: int = 20 << 20
    cpu_s: float = 10.0
    wall_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The model and the limits of the service. Replicas and devices are Serve's own `deployments`."""

    __pydantic_config__: ClassVar[dict[str, Any]] = {"extra": "forbid"}

    engine: EngineConfig = field(default=EngineConfig(), metadata=hiding("allow_urls"))
    """model and device"""
    options: GenerationOptions = field(default=GenerationOptions())
    """generation, if a request does not say otherwise"""
    other_models: tuple[str, ...] = field(default=(), metadata=written_as("NAME=MODEL"))
    """Further model that requests may name, with engines of its own, such as
    tuned="folder --quantize int8": flags of the engine after it differ from those of --model."""
    ab_test: str | None = field(default=None, metadata=written_as("NAME=SHARE"))
    """Have one of --other-models answer a share of the requests that name no model, such as tuned=0.1. A
    request with the same X-Request-ID always gets the same model; each answer says which."""
    shadow: str | None = field(default=None, metadata=written_as("NAME=SHARE"))
    """Have one of --other-models make again what the first model has made, for a share of the requests. It
    has low priority, its answers are thrown away, and under load it makes none."""
    trial_record: str | None = None
    """Folder of this machine where the captions of both models are written as Parquet files, with the
    SHA-256 of the image, for blip2 compare; by default nothing is recorded."""
    trial_prompts: bool = False
    """Also record prompts, which may be private."""
    score_model: str | None = None
    """Retrieval checkpoint that compares images with texts, next to the captioning model, such as
    Salesforce/blip2-itm-vit-g."""
    score_revision: str | None = None
    """Commit, tag or branch of --score-model."""
    calibration: str | None = None
    """File of blip2 calibrate, or its URI in a bucket that --model can name: captions with its prompt and
    options get a confidence, the probability that they are right."""
    min_confidence: float = 0.0
    """Set the flag `abstained` on captions whose confidence is lower, from 0 to 1."""
    timeout_s: float = 60.0
    """Seconds from the whole request to its answer; after that the answer is 504."""
    max_in_flight: int = 512
    """Requests that one gateway serves or lets wait at once; the answer to more is 503."""
    slots: int = 128
    """Slots of the engines that the requests of one gateway hold at once, one per text or beam. Others wait,
    and callers take turns. Half of the slots are for small requests. Set it to the slots of all engines
    divided by the number of gateways."""
    keys_file: str | None = None
    """File with the keys of the callers, made by `python -m deploy.guard.keys`; read again if it changes."""
    admin_keys_file: str | None = None
    """File with the keys of operators, in the same form; without one, there are no routes under /admin."""
    allow_anonymous: bool = False
    """Serve callers without a key, beyond this machine too."""
    allowed_hosts: tuple[str, ...] = ()
    """Names by which callers may reach the endpoint, next to addresses and localhost; * allows all."""
    allowed_origins: tuple[str, ...] = ()
    """Origins of other pages that may use the endpoint from a browser, such as https://app.example.com."""
    allow_image_host: tuple[str, ...] = ()
    """Host whose images are fetched when a request names them by URL, such as images.example.com; it must
    have a public address. By default, no URL is fetched."""
    image: OnlineImageLimits = field(default=OnlineImageLimits(), metadata=prefixed("image"))
    """limits for one image"""
    cache_bytes: int = 64 << 20
    """Memory of one gateway, in bytes, for answers that equal requests get again; 0 keeps none. Equal
    requests at the same time share the work in any case."""
    cache_from: str | None = None
    """Output of a finished blip2 caption run; images that it has captioned, with the same model, prompt and
    options, are answered from its files."""
    decode_children: int = 2
    """Processes per gateway that decode images, and one more for large ones; reserve as many CPUs for it."""

    @cached_property
    def other_engines(self) -> dict[str, EngineConfig]:
        """The engines of `other_models`, by name."""
        return dict(_engine_of(given, self.engine) for given in self.other_models)

    @cached_property
    def ab_test_share(self) -> Share | None:
        return None if self.ab_test is None else Share.parse("ab_test", self.ab_test, self.other_engines)

    @cached_property
    def shadow_share(self) -> Share | None:
        return None if self.shadow is None else Share.parse("shadow", self.shadow, self.other_engines)

    @property
    def matching(self) -> MatchingConfig | None:
        """The retrieval checkpoint, with the device, dtype and threads of the engine; None without one."""
        if self.score_model is None:
            return None
        shared = {name: getattr(self.engine, name) for name in ("device", "dtype", "num_threads")}
        return MatchingConfig(model=self.score_model, revision=self.score_revision, **shared)

    def read_calibration(self) -> Calibration | None:
        """Return the calibration of the captions, or None without one; ValueError if it cannot be read."""
        return None if self.calibration is None else Calibration.load(self.calibration)

    def check_models(self) -> None:
        """Refuse models that cannot be served, without loading weights.

        Raises:
            ValueError: a checkpoint cannot be run, the two take images of different sizes, an option has
                token ids that the model does not have, or the calibration is of another model.
            OSError: a checkpoint cannot be found or fetched.
        """
        models = [self.engine.info(), *(engine.info() for engine in self.other_engines.values())]
        self.require_fit(models[0], None if self.matching is None else self.matching.info())
        for model in models[1:]:
            self.require_fit(model, None)
        calibration = self.read_calibration()
        if calibration is not None and calibration.model not in [model.digest for model in models]:
            raise ValueError(
                f"calibration must be of a model that is served, got {self.calibration}; run blip2 calibrate"
            )

    def require_fit(self, model: ModelInfo, matching: ModelInfo | None) -> None:
        """Raise ValueError unless the models fit each other and the options.

        An image is decoded once, so both take the same size.
        """
        if matching is not None and matching.image_size_px != model.image_size_px:
            raise ValueError(
                f"score_model must take images of {model.image_size_px} px as the model does, got "
                f"{matching.image_size_px} px; name another checkpoint"
            )
        if model.vocab_size:  # an engine that is not EngineConfig's may not know it
            self.options.require_known_tokens(model.vocab_size)

    def __post_init__(self) -> None:
        require_types(self)
        for name in (one.name for one in fields(self) if getattr(self, one.name) == ""):
            raise ValueError(f"{name} must not be empty; leave it out")
        if self.score_revision is not None and self.score_model is None:
            raise ValueError("score_revision must be left out without score_model; name the checkpoint")
        names = [self.engine.model, *(given.partition("=")[0] for given in self.other_models)]
        if len({self.engine.model, *self.other_engines}) < len(names):
            raise ValueError(f"other_models must have different names, got {', '.join(names)}; rename one")
        shares = self.ab_test_share, self.shadow_share  # each refuses what is wrong in it
        if shares == (None, None) and self.trial_record is not None:
            raise ValueError("trial_record must be left out without ab_test or shadow; give one of them")
        if self.trial_record is None and self.trial_prompts:
            raise ValueError("trial_prompts must be left out without trial_record; name a folder")
        if not 0 < self.timeout_s < math.inf:
            raise ValueError(f"timeout_s must be above 0 and finite, got {self.timeout_s}")
        if not 1 <= self.max_in_flight <= MAX_IN_FLIGHT:
            raise ValueError(f"max_in_flight must be from 1 to {MAX_IN_FLIGHT}, got {self.max_in_flight}")
        for name, least in {"decode_children": 1, "slots": 1, "cache_bytes": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence must be from 0 to 1, got {self.min_confidence}")
        if self.min_confidence and self.calibration is None:
            raise ValueError("min_confidence must be left out without calibration; name its file")
        for name, (form, what, remedy) in _PLACES.items():
            for given in getattr(self, name):
                if not re.fullmatch(form, given):
                    raise ValueError(f"{name} must be {what}, got {given!r}; {remedy}")
        if self.keys_file is not None and self.allow_anonymous:
            raise ValueError(
                f"allow_anonymous must not be given with keys_file, got {self.keys_file}; drop one of them"
            )

    @property
    def image_policy(self) -> FetchPolicy:
        """Limits of size and time for one image, and the hosts from which it may be fetched."""
        return FetchPolicy(
            hosts=self.allow_image_host,
            max_bytes=self.image.max_file_bytes,
            timeout_s=min(FETCH_WITHIN_S, self.timeout_s),
        )

    @property
    def longest_request_s(self) -> float:
        """Maximum seconds from the first byte of a request to its answer."""
        return BODY_WITHIN_S + self.timeout_s

    def require_keys(self, host: str) -> None:
        """Raise ValueError unless callers have keys, or may be anonymous, or can only be on this machine."""
        if self.keys_file is None and not self.allow_anonymous and not is_loopback(host):
            raise ValueError(
                f"keys_file must be given to serve on {host}; make a key with python -m "
                "deploy.guard.keys NAME, or set allow_anonymous to serve everybody who can reach the port"
            )


@dataclass(frozen=True, kw_only=True)
class ServeSettings(Settings):
    """Serve captions over HTTP from this machine, until Ctrl-C or SIGTERM."""

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 listens on every address of the machine."""
    port: int = 8000
    """Port to listen on."""
    metrics_port: int | None = None
    """Port of 127.0.0.1 where Prometheus finds the metrics; by default a free one, printed at the start."""
    log_level: LogLevel = "info"
    """How much the logs say; info has one line for each request."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, port in (("port", self.port), ("metrics_port", self.metrics_port)):
            if port is not None and not 1 <= port <= 65535:
                raise ValueError(f"{name} must be from 1 to 65535, got {port}")
        if self.metrics_port == self.port:
            raise ValueError(f"metrics_port must be another port than port, got {self.port} for both")
        if not re.fullmatch(_HOST, self.host) and not is_address(self.host):
            raise ValueError(f"host must be a name or address without brackets and port, got {self.host!r}")
        self.require_keys(self.host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach what listens on a host."""
    return host == "localhost" or (is_address(host) and ip_address(host).is_loopback)


def is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


class _EngineFlags(Parser):
    """The flags after a further model; a wrong one is a ValueError."""

    def __init__(self) -> None:
        super().__init__(requires=False)
        add_flags(self, EngineConfig, frozenset({"model", "allow_urls"}))

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _engine_of(given: str, first: EngineConfig) -> tuple[str, EngineConfig]:
    """Return the name and the engine of one of `other_models`."""
    name, _, rest = given.partition("=")
    try:
        model, *words = shlex.split(rest) or [""]
        if not model or not _MODEL_NAME.fullmatch(name):
            raise ValueError("the name has at most 64 letters, digits and the characters . _ -")
        flags = vars(_EngineFlags().parse_args(words))
        own = {field.name: flags[field.name] for field in fields(EngineConfig) if field.name in flags}
        return name, replace(first, **{"model": model, "revision": None, "adapter": None} | own)
    except ValueError as error:
        raise ValueError(f"other_models must be NAME=MODEL, got {given!r}: {error}") from None
