"""The maths of diffusion and consistency models: pure functions on arrays, float32 throughout.

- schedule: the noise table, adding noise, conversions between epsilon, v and x0
- guidance: classifier-free guidance, sampling and embedding the guidance weight w
- denoiser: calling a UNet with its conditioning, with w, or guided
- consistency: boundary scalings and the consistency function f
- solvers: the solver grid of distillation, the solvers' jumps, the guided ODE's endpoint
- samplers: LCM, DDIM and DPM-Solver++(2M), each one `lax.scan`
"""
