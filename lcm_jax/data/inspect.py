"""The older name of `python -m lcm_jax.inspect`."""

import runpy

if __name__ == "__main__":
    runpy.run_module("lcm_jax.inspect", run_name="__main__", alter_sys=True)
