"""The method: distillation of diffusion models into few-step models, as pure functions of parameters, batch and draws.

OBJECTIVES holds what `config.objective` may be. A new method is a file beside lcm.py and a line here.
"""

from lcm_jax.distill.lcm import LCD, LCF

OBJECTIVES = {"lcd": LCD, "lcf": LCF}
