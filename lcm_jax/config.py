"""`default_config`, under the name that config files import it by; the keys are in `lcm_jax/run/config.py`."""

from lcm_jax.run.config import default_config

__all__ = ["default_config"]
