"""What XLA's compiler is told beside the program, by platform: `compiler_options` of `jax.jit`.

On a CPU, XLA hands whole subgraphs to YNNPACK, whose convolutions and exponentials are slower than XLA's own, its sums
of gradients faster. Our side of the workloads of experiments/speed on 2 cores, by these options' value: sampling the
embedded model in 4 steps takes 54 ms with YNNPACK, 43 without; a pass of Stable Diffusion 1.5 at 512 pixels 8.1 s, 4.9
without; a training step 301 ms, 269 without, 243 with its sums alone.
"""

import functools

import jax

Options = dict[str, str]

_YNNPACK = "xla_cpu_experimental_ynn_fusion_type"
_TRAINING = {
    "cpu": {_YNNPACK: "LIBRARY_FUSION_TYPE_REDUCE"},
    # XLA would turn each reduction of a gradient to its shards into a loop around the ring that reads the activations
    # anew in every turn; as one reduce-scatter the step moves far fewer bytes.
    "tpu": {
        "xla_tpu_enable_windowed_einsum_for_all_gather": "false",
        "xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false",
    },
}
_INFERENCE = {"cpu": {_YNNPACK: ""}}


def training(platform: str) -> Options:
    """For a program with gradients, on devices of a platform: "cpu", "gpu", "tpu"."""
    return _known(platform, _TRAINING)


def inference(platform: str | None = None) -> Options:
    """For a program without; None: the default backend's."""
    return _known(platform or jax.default_backend(), _INFERENCE)


def _known(platform: str, options: dict[str, Options]) -> Options:
    return {} if platform == "cpu" and not _has_ynnpack() else dict(options.get(platform, {}))


@functools.cache
def _has_ynnpack() -> bool:
    """Whether this jaxlib knows the option: it is experimental, and where it is gone there is nothing to mend."""
    try:
        jax.jit(lambda: 0, compiler_options=_INFERENCE["cpu"]).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
