"""A pytest plugin for ``make fuzz``: every property test looks at many more examples."""

from hypothesis import HealthCheck, settings

settings.register_profile("fuzz", max_examples=20_000, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fuzz")
