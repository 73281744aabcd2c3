"""`default_config`, under the name that config files import it by; docs/config.md lists the keys."""

from lcm_jax.run.config import default_config

__all__ = ["default_config"]
