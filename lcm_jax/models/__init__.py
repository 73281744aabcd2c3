"""Linen ports of the networks of Stable Diffusion: pure `apply`, NHWC, no files, no sharding."""
