"""The maths of diffusion and consistency models: pure functions on arrays, float32 throughout.

- schedule: noise table, noising, conversions among epsilon, v and x0
- solvers: the solver grid of distillation, the DDIM jump, the guided ODE's endpoint
- guidance: classifier-free guidance, drawing and embedding the guidance weight w
- consistency: boundary scalings and the consistency function f
- samplers: LCM, DDIM and DPM-Solver++(2M), each one `lax.scan`
"""
