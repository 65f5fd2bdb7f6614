"""The service on Ray Serve: replicas on one machine or many, behind one address."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve import Application


def deployment(
    create: Callable[[], Any],
    *,
    replicas: int | tuple[int, int] = 1,
    cpus: float = 1.0,
    gpus: float = 0.0,
    max_requests: int = 64,
    drain_seconds: float = 30.0,
) -> "Application":
    """Return the service as an application of Ray Serve, for ``serve.run`` or the command ``serve run``.

    Ray starts the replicas, on any machine of its cluster, replaces those that die, and spreads the requests over
    them. Requests in flight in a replica that dies get 500, which OpenAI's clients repeat. Each replica creates its
    own application, and runs images of its requests together.

    Args:
        create: called in each replica; loads the models and returns ``create_app(...)``.
        replicas: their number, or the smallest and the largest, between which Ray chooses by the load.
        cpus: CPU cores per replica. Ray lets each replica use as many threads.
        gpus: GPUs per replica.
        max_requests: requests in a replica at a time. Ray refuses further ones with 503 once as many again wait.
        drain_seconds: seconds that requests have to finish when a replica is stopped.

    Raises:
        ValueError: a number out of range.
    """
    from ray import serve

    low, high = (replicas, replicas) if isinstance(replicas, int) else replicas
    if not 1 <= low <= high:
        raise ValueError(f"replicas: expected at least 1, or an increasing pair of such, got {replicas}")
    if max_requests < 1:
        raise ValueError(f"max_requests: expected at least 1, got {max_requests}")

    def build() -> Any:  # Ray takes a function only
        return create()

    number: dict[str, Any] = (
        {"num_replicas": low}
        if low == high
        else {"autoscaling_config": {"min_replicas": low, "max_replicas": high, "target_ongoing_requests": 2}}
    )
    options = serve.deployment(
        name="conditional_detr",
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
        max_ongoing_requests=max_requests,
        max_queued_requests=max_requests,
        graceful_shutdown_timeout_s=drain_seconds,
        **number,
    )
    return options(serve.ingress(build)()).bind()
