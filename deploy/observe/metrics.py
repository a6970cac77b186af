"""The metrics of the endpoint, in Prometheus' conventions. Ray's agent of each node exports them.

Ray writes `ray_` in front of each name, and adds labels for the node and the process. The metrics of Serve
itself (`ray_serve_…`) stand next to them.
"""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge, Histogram

from blip2_actor import EngineStats, ModelInfo, __version__

_SECONDS = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0]

# Gateways ---------------------------------------------------------------------------------------------------

HTTP_SECONDS = Histogram(
    "blip2_http_request_duration_seconds",
    "Seconds from the headers of a request to the end of its answer, in the gateway.",
    _SECONDS,
    ("route", "code"),
)
QUEUE_SECONDS = Histogram(
    "blip2_queue_seconds", "Seconds that an admitted request waits for slots.", _SECONDS
)
IMAGE_DECODE_SECONDS = Histogram(
    "blip2_image_decode_seconds",
    "Seconds from encoded bytes to pixels, the wait for a decoding process included.",
    _SECONDS,
)
ADMITTED_COST = Counter("blip2_admitted_slot_steps_total", "Slots times steps of the requests let in.")
REFUSED_COST = Counter(
    "blip2_refused_slot_steps_total", "Slots times steps of the requests refused.", ("reason",)
)
REFUSED_REQUESTS = Counter("blip2_refused_requests_total", "Requests refused by admission.", ("reason",))
REQUESTS_IN_FLIGHT = Gauge("blip2_requests_in_flight", "Requests that are served or wait.")
CACHE_REQUESTS = Counter(
    "blip2_cache_requests_total",
    "Images by where their answer is from: made, joined (to an equal request under way), kept (in memory), "
    "run (a finished run); run_failed: the run could not be read.",
    ("result",),
)
CACHE_BYTES = Gauge("blip2_cache_bytes", "Memory of the answers that are kept, about.")
SHADOW_REQUESTS = Counter(
    "blip2_shadow_requests_total",
    "Requests of the share for the shadow model, by what became of their copy: made, failed, or dropped.",
    ("result",),
)
TRIAL_ROWS = Counter(
    "blip2_trial_rows_total", "Rows recorded of models on trial: written, or dropped.", ("result",)
)

# Serve's proxies --------------------------------------------------------------------------------------------

FRONT_ANSWERS = Counter(
    "blip2_front_answers_total", "Answers given in Serve's proxy in place of the gateway's.", ("code", "type")
)

# Captioners -------------------------------------------------------------------------------------------------

STEP_SECONDS = Histogram(
    "blip2_engine_step_seconds",
    "Seconds of the engine's steps; those that encode images may also prefill and decode.",
    _SECONDS,
    ("work",),
)
ENCODE_BATCH = Histogram(
    "blip2_encode_batch_images", "Images encoded in one step of the engine.", [1, 2, 4, 8, 16, 32, 64, 128]
)
TOKENS = Counter("blip2_generated_tokens_total", "Tokens that the engine has generated.")
SLOTS_IN_USE = Gauge("blip2_engine_slots_in_use", "Slots of the engine that hold a running text.")
ENGINE_WAITING = Gauge("blip2_engine_waiting", "Requests and images that wait inside the engine.")
BUILD_INFO = Gauge(
    "blip2_build_info", "1; the labels say what runs.", ("version", "model", "digest", "dtype")
)


def observe_step(seconds: float, num_images: int, num_tokens: int) -> None:
    """Count one step of an engine (`EngineLike.step_watchers`)."""
    STEP_SECONDS.observe(seconds, {"work": "encode" if num_images else "decode"})
    if num_images:
        ENCODE_BATCH.observe(num_images)
    if num_tokens:
        TOKENS.inc(num_tokens)


def show_engine(model: ModelInfo, stats: EngineStats) -> None:
    """Set what is shown of an engine as it is now."""
    SLOTS_IN_USE.set(stats.num_running)
    ENGINE_WAITING.set(stats.num_waiting)
    labels = {"version": __version__, "model": model.model, "digest": model.digest, "dtype": model.dtype}
    BUILD_INFO.set(1, labels)
