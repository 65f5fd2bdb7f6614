"""Settings that the tests with hypothesis share."""

from hypothesis import HealthCheck, settings

LIMITS = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,  # the same examples in every run
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
