"""Previews: x0 of each step, decoded by a TAESD."""

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import lcm_jax
from lcm_jax import sample
from lcm_jax.sampling.preview import load_preview

PROMPT = "a small red circle"


@pytest.fixture(scope="module")
def taesd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("preview") / "taesd"
    tiny.torch_tiny_vae().save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_each_step_shows_x0_and_changes_nothing(taesd):
    """The last x0 of an LCM is the latent itself; one program more may round differently, by one level of 255."""
    model, shown = lcm_jax.load(tiny.folder("micro lcm")), {}
    args = model.encode([PROMPT] * 2), model.noise(0, [0, 1], 3, 16, 16), 8.0, lcm_jax.Settings(steps=3)
    plain = model.latents(*args)
    model.preview = load_preview(str(taesd), model.pipeline, lambda images, step: shown.update({step: images}))
    z = model.latents(*args)
    jax.effects_barrier()
    np.testing.assert_allclose(z, plain, rtol=0, atol=1e-5)
    assert sorted(shown) == [1, 2, 3] and shown[1].shape == (2, 32, 32, 3)  # this TAESD enlarges by 4
    preview, params = model.preview
    want = np.clip(np.asarray(preview.vae.apply({"params": params}, z, method="decode")) / 2 + 0.5, 0, 1) * 255
    assert np.abs(shown[3] - want).max() <= 1
    assert np.abs(shown[1].astype(int) - shown[3]).max() > 8


def test_the_program_shows_one_file_while_it_works(taesd, tmp_path, monkeypatch, capsys):
    seen = []

    def show(path, images, step, show=sample.show):
        show(path, images, step)
        seen.append((path.name, Image.open(path).size, step))

    monkeypatch.setattr(sample, "show", show)
    words = [f"--model={tiny.folder('micro lcm')}", f"--out={tmp_path / 'out'}", f"--prompt={PROMPT}", "--steps=2"]
    assert sample.main([*words, "--num_images=2", f"--preview={taesd}"]) == 0
    assert sorted(seen) == [("preview.png", (64, 32), 1), ("preview.png", (64, 32), 2)]
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == ["0000_0000.png", "0000_0001.png"]
    vae = tiny.folder("micro lcm") / "vae"
    assert sample.main([*words, f"--preview={vae}"]) == 2
    assert f"--preview={vae}: is no TAESD for latents of 4 channels" in capsys.readouterr().err
