"""Samplers beyond LCM's own in a request: their defaults, timesteps by hand, presets, refusals, warnings."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import tiny

from lcm_jax import sample
from lcm_jax.diffusion import timesteps
from lcm_jax.errors import BadArgument
from lcm_jax.sampling import like, presets
from lcm_jax.sampling.plan import Settings, make_plan, noise_entries
from lcm_jax.sampling.request import make_request, warnings


@pytest.fixture(scope="module")
def pipeline():
    return tiny.loaded("sd1")[0]


@pytest.fixture(scope="module")
def phased(pipeline):
    return dataclasses.replace(pipeline, record={"map": "phased", "phases": 2, "solver_steps": 40})


def test_a_phased_map_is_sampled_by_tcd_in_as_many_steps(pipeline, phased):
    request = make_request(phased)
    assert request.settings == Settings("tcd", 2) and request.guidance_scale == 1.0
    assert make_plan(phased, request.settings).timesteps == (999, 499) and noise_entries(request.settings) == 1
    assert not warnings(phased, request)
    assert "2 phases" in warnings(phased, make_request(phased, steps=4))[0]
    assert "use tcd in 2 steps" in warnings(phased, make_request(phased, sampler="lcm"))[0]
    lcm = dataclasses.replace(pipeline, record={"solver_steps": 50})
    assert make_request(lcm).settings == Settings("lcm", 4)
    assert "can raise contrast" in warnings(lcm, make_request(lcm, sampler="tcd"))[0]
    assert not warnings(lcm, make_request(lcm, sampler="tcd", gamma=1.0))


def test_timesteps_by_hand(pipeline):
    request = make_request(pipeline, timesteps=(999, 749, 499, 249))
    assert request.settings == Settings("lcm", 4, timesteps=(999, 749, 499, 249))
    assert make_plan(pipeline, request.settings).timesteps == (999, 749, 499, 249)
    with_noise = make_request(pipeline, sampler="tcd", gamma=0.3, timesteps=[800]).settings
    assert noise_entries(with_noise) == 1 and noise_entries(dataclasses.replace(with_noise, steps=3)) == 3
    assert noise_entries(Settings("euler_ancestral", 4)) == 4 and noise_entries(Settings("euler", 4)) == 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"timesteps": (249, 999)}, "timesteps=249,999: must fall, from 999"),
        ({"timesteps": (1000, 5)}, "timesteps=1000,5: must fall, from 999"),
        ({"timesteps": (999, -1)}, "must fall"),
        ({"timesteps": (999, 499), "steps": 4}, "steps=4: there are 2 timesteps"),
        ({"timesteps": (999, 499), "sampler": "ddim"}, "equal strides; take euler"),
        ({"timesteps": (999, 499), "image": np.zeros((64, 64, 3), np.uint8)}, "has those of its strength"),
        ({"gamma": 0.3}, "gamma=0.3: is of the sampler tcd"),
        ({"gamma": 1.3, "sampler": "tcd"}, "gamma=1.3: .*from 0, no fresh noise, to 1"),
        ({"gamma": float("nan"), "sampler": "tcd"}, "gamma=nan"),
        ({"spacing": "leading", "sampler": "euler"}, "spacing=leading: euler has timesteps of its own; leave it out"),
        ({"spacing": "leading"}, "spacing=leading: lcm has timesteps of its own"),
        ({"spacing": "leading", "timesteps": (9,), "sampler": "dpm_solver_2m"}, "leading: timesteps are given"),
        ({"steps": 51, "sampler": "tcd"}, "steps=51"),
    ],
)
def test_what_a_sampler_does_not_have_is_refused(pipeline, options, words):
    with pytest.raises(BadArgument, match=words):
        make_request(pipeline, **options)


@pytest.mark.parametrize(("strength", "sampler", "want"), [(0.5, "tcd", [499, 259]), (0.5, "euler", [499, 249])])
def test_they_start_from_an_image(pipeline, strength, sampler, want):
    request = make_request(pipeline, sampler=sampler, steps=2, image=np.zeros((64, 64, 3), np.uint8), strength=strength)
    assert make_plan(pipeline, request.settings).t.tolist() == want


@pytest.mark.parametrize("name", presets.PRESETS)
def test_a_preset_is_a_request(pipeline, name):
    """Every preset's flags are taken by the command line, and make a request of its sampler."""
    p = sample.parser()
    words = ["--model=x", "--out=y", "--prompt=z"]
    args = p.parse_args([*presets.words(name, None), *words])
    one = presets.PRESETS[name]
    keys = ("sampler", "steps", "gamma", "timesteps", "guidance_scale")
    request = make_request(pipeline, **{key: getattr(args, key) for key in keys})
    assert request.settings.sampler == one.sampler and request.guidance_scale == one.guidance_scale
    plan = make_plan(pipeline, request.settings)
    assert len(plan.timesteps) == (one.steps[0] if one.steps else 4)
    assert p.parse_args([*presets.words(name, None), *words, "--guidance_scale=2"]).guidance_scale == 2


def test_presets_are_what_their_makers_publish(pipeline):
    assert "--timesteps=999,749,499,249" in presets.words("dmd2", None)
    assert "--timesteps=399" in presets.words("dmd2", 1) and "--timesteps=800" in presets.words("hyper-sd-unet", None)
    of_tdd = ",".join(map(str, timesteps.lcm(4, 1000, 250)))
    assert f"--timesteps={of_tdd}" in presets.words("tdd", 4) and "--guidance_scale=1.7" in presets.words("tdd", 4)
    assert "--gamma=0.3" in presets.words("tcd", None) and "--gamma=0" in presets.words("pcm", 8)
    assert presets.weighted("tdm", ["a.safetensors", "b"]) == ["a.safetensors:0.125", "b"]
    assert presets.weighted("tdm", ["a.safetensors:0.5"]) == ["a.safetensors:0.5"]
    assert presets.weighted("tcd", ["a"]) == ["a"]
    with pytest.raises(BadArgument, match="steps=3: preset dmd2 is for files made for 4, 1 steps"):
        presets.words("dmd2", 3)
    with pytest.raises(
        BadArgument, match="preset=dmd2: has timesteps by hand.*give --sampler=lcm --steps=4 --guidance"
    ):
        presets.words("dmd2", None, of_image=True)
    assert presets.words("lcm-lora", 2, of_image=True) == presets.words("lcm-lora", 2)


def test_a_sampler_beside_a_preset_wins_over_it(pipeline):
    args = sample.parser().parse_args([*presets.words("tcd", None, sampler="lcm"), "--sampler=lcm", "--out=y"])
    assert make_request(pipeline, sampler=args.sampler, gamma=args.gamma).settings.sampler == "lcm"
    assert "--gamma=0.3" in presets.words("tcd", None, sampler="tcd")


def test_timesteps_that_are_no_numbers_are_one_line(capsys):
    with pytest.raises(SystemExit):
        sample.parser().parse_args(["--out=a", "--timesteps=999,749,"])
    wanted = "error: argument --timesteps: '999,749,': give whole numbers, such as 999,749,499,249; see python -m "
    assert capsys.readouterr().err.startswith(wanted)


def test_what_an_image_records_of_its_sampler_repeats_it(pipeline):
    for options in (
        {},
        {"sampler": "tcd", "gamma": 0.3},
        {"timesteps": (999, 499)},
        {"sampler": "ddim", "spacing": "leading"},
    ):
        settings = make_request(pipeline, **options).settings
        about = like.about_sampler(settings)
        words = [f"--{name}={value}" for name, value in about.items()]
        args = sample.parser().parse_args([*words, "--model=x", "--out=y"])
        keys = ("sampler", "steps", "spacing", "gamma", "timesteps")
        assert make_request(pipeline, **{key: getattr(args, key) for key in keys}).settings == settings


@pytest.mark.parametrize("weight", ["0.5", "1e-1", "+.5", "-2", "nan"])
def test_a_lora_keeps_its_own_weight_however_it_is_written(weight):
    assert presets.weighted("tdm", [f"x:{weight}", "y"]) == [f"x:{weight}", "y"]
    assert presets.weighted("tdm", ["C:/x", "y"]) == ["C:/x:0.125", "y"]


def test_the_documents_have_the_table_of_presets():
    text = (Path(__file__).parents[1] / "docs" / "presets.md").read_text()
    assert presets.markdown() in text
