"""The method: Latent Consistency Distillation as pure functions of parameters, batch and draws."""
