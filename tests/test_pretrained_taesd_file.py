"""TAESD's original files against diffusers' folder of the same weights."""

import jax
import numpy as np
import pytest
import tiny
from safetensors.numpy import save_file

from lcm_jax.errors import LcmError
from lcm_jax.models.taesd import AutoencoderTiny
from lcm_jax.pretrained import load_pipeline, load_vae, names


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    """A state dict of the published size, with diffusers' keys."""
    rng = np.random.default_rng(0)
    table = names.torch_table(AutoencoderTiny())
    return {key: 0.05 * rng.standard_normal(p.torch_shape, np.float32) for key, p in table.items()}


def halves(state) -> dict[str, dict[str, np.ndarray]]:
    """Half -> tensors under the keys of its file; these indices stand in the published code."""
    found = {"encoder": {}, "decoder": {}}
    for key, value in state.items():
        half, _, layer, rest = key.split(".", 3)
        found[half][f"{int(layer) + (half == 'decoder')}.{rest}"] = value
    return found


def write(folder, tensors, name="taesd"):
    for half, content in tensors.items():
        save_file(content, folder / f"{name}_{half}.safetensors")
    return folder / f"{name}_decoder.safetensors"


def folder_of(state, folder):
    folder.mkdir()
    save_file(state, folder / "diffusion_pytorch_model.safetensors")
    tiny.write_json(folder / "config.json", {"_class_name": "AutoencoderTiny"})
    return folder


def test_each_form_of_the_files_gives_the_same_weights(state, tmp_path):
    """Bit for bit: the folder, either half, and both joined with ComfyUI's scalars beside them."""
    tensors = halves(state)
    assert {half: (len(of), sum(v.size for v in of.values())) for half, of in tensors.items()} == {
        "encoder": (67, 1_222_532),
        "decoder": (67, 1_222_531),
    }
    decoder = tensors["decoder"]
    assert "0.weight" not in decoder and decoder["1.weight"].shape == (64, 4, 3, 3) and "7.bias" not in decoder
    module, want = load_vae(folder_of(state, tmp_path / "folder"))
    path = write(tmp_path, tensors)
    joined = {f"taesd_{half}.{key}": value for half, of in tensors.items() for key, value in of.items()}
    save_file(joined | {"vae_scale": np.float32([0.18215]), "vae_shift": np.float32([0])}, tmp_path / "j.safetensors")
    for file in (path, path.with_name("taesd_encoder.safetensors"), tmp_path / "j.safetensors"):
        found_module, found = load_vae(file)
        assert found_module == module and module.factor == 8
        jax.tree.map(np.testing.assert_array_equal, found, want)


def test_a_model_takes_the_file_as_its_vae_and_is_warned_of_another_family(state, tmp_path, caplog):
    def loaded(source, name):
        caplog.clear()
        pipeline, params = load_pipeline(source, vae=write(tmp_path, halves(state), name))
        assert isinstance(pipeline.vae, AutoencoderTiny) and pipeline.vae.scaling_factor == 1
        np.testing.assert_array_equal(
            params["vae"]["decoder"]["layers_0"]["bias"], state["decoder.layers.0.bias"], err_msg=name
        )
        return [record.getMessage() for record in caplog.records if "another family" in record.getMessage()]

    assert loaded(tiny.folder("micro lcm"), "taesd") == loaded(tiny.folder("micro lcm"), "mine") == []
    assert len(loaded(tiny.folder("micro lcm"), "taesdxl")) == 1
    assert loaded(tiny.folder("sdxl"), "taesdxl") == [] and len(loaded(tiny.folder("sdxl"), "taesd")) == 1


def test_files_that_cannot_be_used_are_one_line(state, tmp_path):
    tensors = halves(state)
    path = write(tmp_path, {"decoder": tensors["decoder"]})
    with pytest.raises(
        LcmError, match="taesd_decoder.safetensors is the decoder of a TAESD; put the other half beside"
    ):
        load_vae(path)
    tensors["decoder"]["1.weight"] = np.zeros((64, 16, 3, 3), np.float32)
    with pytest.raises(
        LcmError, match="for latents of 16 channels, as those of SD 3, Flux or Sana; give taesd or taesdxl"
    ):
        load_vae(write(tmp_path, tensors))
    tensors["decoder"]["1.weight"] = state["decoder.layers.0.weight"]
    tensors["decoder"]["pool.weight"] = np.zeros(3, np.float32)
    with pytest.raises(LcmError, match=r"does not fit its config: 1 unexpected \(pool.weight\)"):
        load_vae(write(tmp_path, tensors))
    (tmp_path / "taesd_decoder.pth").write_bytes(b"PK\x03\x04" + b"archive/data.pkl")
    with pytest.raises(LcmError, match="pickled, which can run code, and is not opened; convert it once"):
        load_vae(tmp_path / "taesd_decoder.pth")
    save_file({"encoder.conv_in.weight": np.zeros(3, np.float32)}, tmp_path / "kl.safetensors")
    with pytest.raises(LcmError, match="holds a VAE without its config, and there is no model beside it"):
        load_vae(tmp_path / "kl.safetensors")


@pytest.mark.slow
def test_the_networks_of_the_files_are_those_of_diffusers(state, tmp_path):
    """To 1e-5 of values around 1, the rounding of 20 convolutions in float32."""
    import torch
    from diffusers import AutoencoderTiny as Theirs

    torch_vae = Theirs()
    torch_vae.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()})
    vae, params = load_vae(write(tmp_path, halves(state)))
    rng = np.random.default_rng(1)
    z, images = rng.standard_normal((1, 4, 4, 4), np.float32), rng.uniform(-1, 1, (1, 32, 32, 3)).astype(np.float32)
    with torch.no_grad():
        decoded = torch_vae.decode(torch.from_numpy(z.transpose(0, 3, 1, 2))).sample
        encoded = torch_vae.encode(torch.from_numpy(images.transpose(0, 3, 1, 2))).latents
    ours = vae.apply({"params": params}, z, method="decode"), vae.apply({"params": params}, images, method="encode")[0]
    for found, want in zip(ours, (decoded, encoded), strict=True):
        np.testing.assert_allclose(found, want.permute(0, 2, 3, 1), rtol=1e-5, atol=1e-5)
