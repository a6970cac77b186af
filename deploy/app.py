"""The Serve application: gateways on CPU in front of engines on accelerators.

    client ── HTTP ──▶ Gateway (CPU: admission, reading, decoding) ── uint8 ──▶ Captioner (engine)

`import_path: deploy.app:build` in a Serve config file; `python -m deploy` on one machine.
"""

# No `from __future__ import annotations` here: Serve reads the annotation of `build` to check its `args`,
# and hands over an unchecked dictionary where it finds a text.
from typing import Any

from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import BackpressureConfig

from blip2_actor import EngineBuilder
from deploy.captioner import Captioner
from deploy.errors import RETRY_AFTER_S
from deploy.gateway import Gateway
from deploy.settings import Settings

CAPTIONER: Deployment = serve.deployment(
    # What one engine may hold; a gateway's handle queues the rest, where the autoscaler sees it. Serve's
    # own default of 5 would keep the engine's slots empty.
    max_ongoing_requests=256,
    health_check_period_s=10,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=60,
    ray_actor_options={"num_cpus": 1},
)(Captioner)

GATEWAY: Deployment = serve.deployment(
    # Beyond `Settings.max_in_flight` the gateway answers 503 itself, in JSON, so Serve must let those
    # requests through to be refused; its own limits stand far behind. They count every request that has
    # no replica yet, also those of a burst on an idle one.
    max_ongoing_requests=2048,
    max_queued_requests=2048,
    backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
    health_check_period_s=10,
    health_check_timeout_s=30,
    graceful_shutdown_timeout_s=60,
    ray_actor_options={"num_cpus": 1},
)(serve.ingress()(Gateway))


def build(args: Settings) -> Application:
    """Build the application from the `args` of a Serve config file."""
    return compose(args.engine, args)


def compose(
    engine: EngineBuilder,
    settings: Settings,
    *,
    captioner: dict[str, Any] | None = None,
    gateway: dict[str, Any] | None = None,
) -> Application:
    """Put gateways in front of captioners of any engine; the last two are Serve's deployment options."""
    engines = CAPTIONER.options(**(captioner or {})).bind(engine, settings.options)
    return GATEWAY.options(**(gateway or {})).bind(engines, settings)
