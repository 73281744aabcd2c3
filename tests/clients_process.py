"""stable-diffusion.cpp in a process of its own: `python clients_process.py REQUEST.json` draws what the file asks for.

    {"model": FILE, "prompt": TEXT, "seed": N, "steps": N, "size": PIXELS, "out": FILE.npy, "lora": FILE or null}

Its log of drawing goes to stdout. While it loads, no callback is set: cyllama 0.2.18 hangs in one at an unknown tensor.
"""

import json
import sys

import cyllama.sd as sd
import numpy as np


def main(request: dict) -> None:
    params = sd.SDContextParams()
    params.model_path, params.n_threads, params.wtype = request["model"], 1, sd.SDType.F32
    params.rng_type = params.sampler_rng_type = sd.RngType.CPU  # torch's
    context = sd.SDContext(params)
    sd.set_log_callback(lambda level, text: print(text, end=""))
    job = sd.SDImageGenParams()
    job.prompt, job.negative_prompt, job.seed = request["prompt"], "", request["seed"]
    job.width = job.height = request["size"]
    sampling = job.sample_params
    sampling.sample_method, sampling.scheduler = sd.SampleMethod.LCM, sd.Scheduler.LCM
    sampling.sample_steps, sampling.cfg_scale = request["steps"], 1.0
    job.sample_params = sampling
    if request["lora"]:
        job.set_loras([{"path": request["lora"], "multiplier": 1.0}])
    np.save(request["out"], np.asarray(context.generate_with_params(job)[0].to_numpy()))


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as file:
        main(json.load(file))
