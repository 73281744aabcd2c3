"""The student of a run: what training starts from, and what an export or a picture is made with.

The programs that need it, `train` and `export`, build it from the run's config alone.
"""

import dataclasses

from ml_collections import ConfigDict

from lcm_jax import assets
from lcm_jax.distill import state
from lcm_jax.pretrained import Pipeline, load_unet


def load_student(config: ConfigDict, teacher: Pipeline) -> Pipeline:
    """The teacher's pipeline with the UNet that training starts from, and its w embedding.

    Raises:
      LcmError: `config.model.student` cannot be loaded, or has a w embedding of another dimension.
    """
    unet, params = teacher.unet, teacher.params["unet"]
    if config.model.student not in (None, config.model.teacher):
        unet, params = load_unet(assets.resolve(config.model.student), dtype=unet.dtype)
    unet, params = state.student_of(unet, params, config.distill.w_embedding_dim)
    return dataclasses.replace(teacher, unet=unet, params={**teacher.params, "unet": params})
