"""lcm_jax: Latent Consistency Models from Stable Diffusion checkpoints, in JAX and Flax."""

__version__ = "0.1.0"
