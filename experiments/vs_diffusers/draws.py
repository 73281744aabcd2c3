"""The input of both sides of the comparison: the rows and the draws of each step, in torch's layout [b c h w].

The order of the images, the dropped captions and the draws come from `lcm_jax`, where they are functions of
(seed, step). Images and token ids are encoded by the other side's own networks.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
import torch
from ml_collections import ConfigDict

from lcm_jax.data import loader
from lcm_jax.distill import objective as objectives
from lcm_jax.distill import step as step_lib
from lcm_jax.pretrained import Pipeline
from lcm_jax.run import data as training_data
from lcm_jax.run import models as student_lib
from lcm_jax.run import step as training_step

Rows = Mapping[str, Any]


def make_draw(config: ConfigDict) -> Callable[[int], dict[str, torch.Tensor]]:
    """step (from 0) -> the draws of `lcm_jax.train` at that step: posterior, noise, index, w."""
    models = student_lib.shapes(config)
    problem = training_step.make_problem(config, models.teacher, models.student)
    shape = training_step.batch_shapes(config, models)["mean"].shape
    key = step_lib.named_key(config.seed, "draws")
    of_step = jax.jit(lambda step: objectives.draw(problem, jax.random.fold_in(key, step), shape))

    def draw(step: int) -> dict[str, torch.Tensor]:
        drawn = jax.device_get(of_step(step))
        arrays = {
            "posterior": _first(drawn.posterior),
            "noise": _first(drawn.noise),
            "index": drawn.index.astype(np.int64),
            "w": drawn.w,
        }
        return {name: torch.from_numpy(np.array(value)) for name, value in arrays.items()}

    return draw


def make_batches(
    config: ConfigDict, teacher: Pipeline, encode: Callable[[Rows], Rows], say: Callable[[str], None]
) -> Callable[[int], dict[str, Any]]:
    """step (from 0) -> the batch of `lcm_jax.train` at that step, from rows that `encode` has encoded at the start.

    Args:
      config: resolved; `data.encode` is "start".
      teacher: with its tokenizers.
      encode: rows {"pixels", "text_encoder"} or without pixels -> {"mean", "logvar", "encoder_hidden_states"}.
      say: prints a line.
    """
    log = training_data.DataLog(loader.BadRecordLog(0.0, lambda record: say(str(record))), say)
    parts = training_data.open_parts(config)
    examples, order = training_data.open_examples(config, parts, teacher, encode, log)
    batches = loader.Batches(tuple(examples), order, 0, range(order.batch_size))

    def batch(step: int) -> dict[str, Any]:
        rows, _ = batches[step]
        tensors = {name: torch.from_numpy(np.array(value)) for name, value in log.count_cut_tokens(rows).items()}
        moments = {name: tensors.pop(name) for name in ("mean", "logvar")}
        return {**moments, "cond": tensors}

    return batch


def make_encode(vae: torch.nn.Module, text_encoder: torch.nn.Module) -> Callable[[Rows], Rows]:
    """Rows of images and token ids -> moments [b c h w] and embeddings, by torch's networks."""

    @torch.no_grad()
    def encode(rows: Rows) -> Rows:
        encoded = {}
        if "pixels" in rows:
            pixels = torch.from_numpy(np.array(rows["pixels"])).permute(0, 3, 1, 2).float() / 127.5 - 1.0
            posterior = vae.encode(pixels).latent_dist
            encoded = {"mean": posterior.mean.numpy(), "logvar": posterior.logvar.numpy()}
        ids = torch.from_numpy(np.array(rows["text_encoder"])).long()
        return encoded | {"encoder_hidden_states": text_encoder(ids).last_hidden_state.numpy()}

    return encode


def _first(array: np.ndarray) -> np.ndarray:
    """[b h w c] -> [b c h w]."""
    return np.ascontiguousarray(np.moveaxis(array, -1, 1))
