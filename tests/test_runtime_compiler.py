"""What XLA is told beside the program: options that this jaxlib knows, and that reach the programs."""

import jax
import jax.numpy as jnp
import pytest

from lcm_jax.runtime import kernels as compiler

YNN = "__ynn_fusion"  # in the compiled text


def soft(x):
    """A product, an exponential and a sum, which XLA's CPU compiler gives to YNNPACK if left alone."""
    return jnp.exp(x @ x).sum(0)


def compiled_text(options):
    return jax.jit(soft, compiler_options=options).lower(jnp.ones((256, 256))).compile().as_text()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of the CPU's compiler")
def test_a_cpu_computes_without_ynnpack_but_for_the_sums_of_training():
    assert YNN in compiled_text({})
    assert YNN not in compiled_text(compiler.inference())
    training = compiled_text(compiler.training("cpu"))
    assert YNN in training and " dot(" in training  # the product is XLA's own


def test_each_platform_has_its_own():
    assert compiler.inference("tpu") == compiler.inference("gpu") == compiler.training("gpu") == {}
    assert all(name.startswith("xla_tpu_") for name in compiler.training("tpu"))


def test_a_jaxlib_that_does_not_know_an_option_gets_none(monkeypatch):
    monkeypatch.setattr(compiler, "_INFERENCE", {"cpu": {"xla_cpu_no_such_option": ""}})
    compiler._has_ynnpack.cache_clear()
    try:
        assert compiler.inference("cpu") == compiler.training("cpu") == {}
    finally:
        compiler._has_ynnpack.cache_clear()
