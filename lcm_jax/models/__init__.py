"""Linen ports of the networks of Stable Diffusion: pure `apply`, NHWC; they know neither files nor sharding."""
