"""The Serve application: gateways on CPU in front of engines on accelerators.

    client ── HTTP ──▶ Gateway (CPU: admission, reading, image decoding) ── uint8 ──▶ Captioner (engine)

A Serve config file names it as `import_path: deploy.app:build`; `blip2 serve` runs it on one machine.
"""

# Without `from __future__ import annotations`: Serve reads the annotation of `build` to check its `args`. An
# annotation that is a string would have Serve pass an unchecked dictionary.
from collections.abc import Mapping
from typing import Any

from pydantic import RootModel, model_validator
from ray import serve
from ray.serve import Application, Deployment
from ray.serve.config import BackpressureConfig, RequestRouterConfig

from blip2_actor import EngineBuilder
from blip2_actor.flags import with_current_names
from deploy.calls.direct_calls import DirectRouter
from deploy.captioner import Captioner
from deploy.gateway import Gateway
from deploy.guard.front import CALLBACK
from deploy.http.errors import RETRY_AFTER_S
from deploy.settings import Settings

NODE_ENVIRONMENT = {
    CALLBACK[0]: CALLBACK[1],
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",
}
"""What the nodes have in their environment for the processes of Serve. A request passes three of them. One
event loop in each costs a sixth less CPU time than two or three that wake each other; nothing here blocks it.
With the last variable, a handle can only be used inside an event loop.
"""

DIRECT = RequestRouterConfig(request_router_class=DirectRouter)

CAPTIONER: Deployment = serve.deployment(
    # What one engine may hold; the handle of a gateway queues the rest, and the autoscaler counts that queue.
    # Serve's own default of 5 would keep the engine's slots empty.
    max_ongoing_requests=256,
    request_router_config=DIRECT,
    health_check_period_s=10,
    health_check_timeout_s=30,
    ray_actor_options={"num_cpus": 1},
)(Captioner)

GATEWAY: Deployment = serve.deployment(
    # Beyond `Settings.max_in_flight` the gateway itself answers 503, in JSON, so Serve must let those
    # requests reach it; Serve's own limits are far higher. They count every request that has no replica
    # yet, including a burst that meets an idle one.
    max_ongoing_requests=2048,
    max_queued_requests=2048,
    request_router_config=DIRECT,
    backpressure_config=BackpressureConfig(status_code=503, retry_after_s=RETRY_AFTER_S),
    health_check_period_s=10,
    health_check_timeout_s=30,
    ray_actor_options={"num_cpus": 1},
)(serve.ingress()(Gateway))


class ServeArgs(RootModel[Settings]):
    """The `args` of a Serve config file: `Settings`, checked by pydantic, unknown names refused.

    A field that has been renamed may also have its former name.
    """

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, args: Any) -> Any:
        return with_current_names(Settings, args) if isinstance(args, dict) else args


def build(args: ServeArgs) -> Application:
    """Build the application from the `args` of a Serve config file.

    Raises:
        ValueError: there are no keys, and anonymous callers are not allowed. On a cluster, other machines
            can always reach the endpoint.
    """
    args.root.require_keys("a cluster")
    return compose(args.root.engine, args.root)


def compose(
    engine: EngineBuilder,
    settings: Settings,
    *,
    others: Mapping[str, EngineBuilder] | None = None,
    captioner: dict[str, Any] | None = None,
    gateway: dict[str, Any] | None = None,
) -> Application:
    """Put gateways in front of captioners that run any engine.

    Args:
        engine: of the first model.
        settings: of the service.
        others: engines of further models by name; those of the settings by default.
        captioner: Serve's deployment options of the captioners.
        gateway: Serve's deployment options of the gateways.
    """
    drain_s = settings.longest_request_s + 10
    replicas = CAPTIONER.options(graceful_shutdown_timeout_s=drain_s, **(captioner or {}))
    others = settings.other_engines if others is None else others
    further = {
        name: replicas.options(name=captioner_of(name)).bind(other, settings.options)
        for name, other in others.items()
    }
    first = replicas.bind(engine, settings.options, settings.matching)
    return GATEWAY.options(graceful_shutdown_timeout_s=drain_s, **(gateway or {})).bind(
        first, settings, further
    )


def captioner_of(model: str) -> str:
    """Return the name of the deployment that runs a further model."""
    return f"{CAPTIONER.name}_{model}"
