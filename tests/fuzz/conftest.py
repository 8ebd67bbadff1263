"""How many calls are tried: 300, always the same; `--hypothesis-profile=long` tries thousands, new ones each time.

Of calls on families, a sixth of that.
"""

from hypothesis import HealthCheck, Phase, settings

SLOW = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}

settings.register_profile("short", max_examples=300, derandomize=True, database=None, phases=[Phase.generate], **SLOW)
settings.register_profile("long", max_examples=3000, **SLOW)
settings.load_profile("short")
