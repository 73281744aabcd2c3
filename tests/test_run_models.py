"""The models of a config: pipelines, students, adapters; and what is refused before training."""

import shutil
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import tiny
from diffusers import UNet2DConditionModel

from lcm_jax.distill import student as student_lib
from lcm_jax.errors import LcmError
from lcm_jax.models import lora
from lcm_jax.pretrained import RECORD, load_pipeline, save_single_file, text
from lcm_jax.pretrained.model import weights_hash
from lcm_jax.run import config as config_lib
from lcm_jax.run import models as run_models
from lcm_jax.run import step as training_step
from lcm_jax.run.models import Models
from lcm_jax.runtime.mesh import make_mesh

DIM = 16


def make_lcm(teacher: Path, target: Path, dim: int | None = DIM, **record) -> Path:
    """A copy of `teacher` with the UNet of an LCM with random weights; record: its lcm_config.json."""
    shutil.copytree(teacher, target)
    shutil.rmtree(target / "unet")
    config = UNet2DConditionModel.load_config(teacher / "unet") | {"time_cond_proj_dim": dim}
    tiny.randomise(UNet2DConditionModel.from_config(config), 31).save_pretrained(target / "unet")
    if record:
        tiny.write_json(target / RECORD, record)
    return target


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return tiny.build("deep teacher", tmp_path_factory.mktemp("student") / "teacher")


@pytest.fixture(scope="module")
def lcm(teacher, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("student") / "lcm"
    return make_lcm(teacher, folder, solver_steps=50, w_min=2.0, w_max=14.0, prediction_type="epsilon")


def make_config(teacher, **changes):
    config = config_lib.default_config()
    config.data.source, config.data.resolution, config.data.batch_size = "shapes", 64, 4
    config.model.teacher = teacher and str(teacher)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    config_lib.validate(config)
    return config_lib.resolve(config)


def load(config) -> Models:
    """Teacher and student, checked as `train` checks them."""
    run_models.shapes(config)
    return run_models.load(config)


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and jax.tree.all(jax.tree.map(np.array_equal, a, b))


def test_a_variant_is_read_wherever_it_is(teacher, lcm, tmp_path):
    """Of the teacher, and of a student that has it; cached latents know weights by their values."""
    half = tiny.build("deep teacher", tmp_path / "half", variant="fp16")
    with pytest.raises(LcmError, match="name the variant, .*config.model.variant"):
        load(make_config(half))
    models = load(make_config(half, model__variant="fp16"))
    whole = run_models.load_teacher(make_config(teacher))[1]
    rounded = jax.tree.map(lambda x: x.astype(np.float16).astype(np.float32), dict(whole))
    assert same(models.teacher_params, rounded)
    assert weights_hash(models.teacher_params["vae"]) != weights_hash(whole["vae"])
    changes = {"model__student": str(lcm), "distill__w_embedding_dim": DIM}
    models = load(make_config(half, model__variant="fp16", **changes))
    assert same(models.teacher_params, rounded) and models.student.has_w_embedding


def frozen_of(config, models):
    problem = training_step.make_problem(config, models.teacher, models.student)
    null = text.null(models.teacher, models.teacher_params) if problem.teacher is not None else None
    return problem, training_step.make_frozen(problem, models, null)


LORA = {"lora__rank": 4, "lora__alpha": 2.0, "distill__w_embedding_dim": 0, "sample__guidance_scale": 1.0}


def test_lora_on_the_teacher_shares_its_weights(teacher):
    config = make_config(teacher, **LORA)
    models = load(config)
    base = models.teacher_params["unet"]
    assert models.student.unet == lora.Adapted(models.teacher.unet, 0.5) and not models.student.has_w_embedding
    assert models.student_params["unet"]["base"] is base
    problem, frozen = frozen_of(config, models)
    assert frozen.base is None and frozen.teacher is base and problem.student is models.student.unet
    assert models.trainable is models.student_params["unet"]["lora"]
    assert lora.target_paths(base) == sorted(lora.by_layer(models.trainable))
    again = run_models.load_student(config, models.teacher, models.teacher_params)[1]
    assert same(models.trainable, again["unet"]["lora"]), "the first adapters follow from the seed"
    other = run_models.load_student(make_config(teacher, **LORA, seed=1), models.teacher, models.teacher_params)[1]
    assert not same(models.trainable, other["unet"]["lora"])


def test_merged_is_the_adapted_model_as_an_ordinary_one(teacher):
    models = load(make_config(teacher, **LORA, lora__targets=("to_k", "conv1")))
    unet, params = models.student.unet, models.student_params["unet"]
    rng = np.random.default_rng(0)
    trained = jax.tree.map(lambda x: rng.standard_normal(x.shape, np.float32), models.trainable)
    params = student_lib.with_trainable(unet, params, trained)
    base = models.teacher_params["unet"]
    assert student_lib.trainable(unet, params) is trained and params["base"] is base
    module, merged = student_lib.merged(unet, params)
    assert module is models.teacher.unet
    assert same(merged, lora.merge(base, [(trained, 0.5)])) and not same(merged, base)
    assert student_lib.merged(module, base) == (module, base) and student_lib.trainable(module, base) is base


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 4])
def test_steps_in_bfloat16_are_the_same_with_frozen_weights_in_either_dtype(teacher, rank):
    """To the bit: each use of a frozen weight rounds it anyway, and norms stay in float32."""

    def trained(dtype):
        options = {"lora__rank": rank, "distill__w_embedding_dim": 0 if rank else DIM, "sample__guidance_scale": 1.0}
        config = make_config(teacher, model__dtype="bfloat16", model__teacher_dtype=dtype, **options)
        models, mesh = load(config), make_mesh(devices=jax.devices()[:1])
        program, rng = training_step.make(config, models, mesh), np.random.default_rng(0)
        state, frozen = program.begin(models.trainable), program.place_frozen(models)
        assert frozen.teacher["conv_in"]["kernel"].dtype == dtype
        for _ in range(2):
            batch = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), program.batch)
            state, metrics = program.step(state, frozen, batch, jax.random.key(1))
        return metrics["loss"], state.params, state.ema_params

    jax.tree.map(np.testing.assert_array_equal, trained("bfloat16"), trained("float32"))


def test_lora_on_another_student_brings_its_base(teacher, lcm):
    config = make_config(teacher, **LORA | {"distill__w_embedding_dim": DIM}, model__student=str(lcm))
    models = load(config)
    assert models.student.has_w_embedding and not models.teacher.has_w_embedding
    _, frozen = frozen_of(config, models)
    assert frozen.base is models.student_params["unet"]["base"] and "cond_proj" in frozen.base["time_embedding"]


def test_a_student_without_w_is_the_teacher(teacher):
    models = load(make_config(teacher, distill__w_embedding_dim=0, sample__guidance_scale=1.0))
    assert models.student.unet is models.teacher.unet
    assert models.student_params["unet"] is models.teacher_params["unet"]


def test_lcf_has_no_teacher_unless_it_is_mixed_with_lcd(teacher, lcm):
    lcf = {"objective": "lcf", "model__student": str(lcm), "distill__w_embedding_dim": DIM}
    for of in (None, teacher):
        config = make_config(of, **lcf)
        models = load(config)
        problem, frozen = frozen_of(config, models)
        assert models.student.has_w_embedding and models.student_params["unet"] is models.teacher_params["unet"]
        assert problem.teacher is None and problem.objective == "lcf" and jax.tree.leaves(frozen) == []
    config = make_config(teacher, **lcf, distill__lcd_weight=0.5)
    models = load(config)
    problem, frozen = frozen_of(config, models)
    assert problem.teacher is models.teacher.unet and problem.lcd_weight == 0.5 and not models.teacher.has_w_embedding
    assert frozen.teacher is models.teacher_params["unet"] and frozen.null is not None and frozen.base is None
    config = make_config(None, **lcf, lora__rank=2)
    models = load(config)
    problem, frozen = frozen_of(config, models)
    assert isinstance(problem.student, lora.Adapted) and not frozen.teacher
    assert frozen.base is models.teacher_params["unet"]


def test_a_phased_map_in_the_step_and_in_the_record(teacher, tmp_path):
    phased = {"distill__map": "phased", "distill__w_embedding_dim": DIM, "sample__steps": 2}
    config = make_config(teacher, **phased, distill__stages=("2:30",), train__steps=60)
    models = load(config)
    problem, _ = frozen_of(config, models)
    assert problem.stages == (30,) and problem.ends.shape == (2, 50)
    assert {*problem.ends[0].tolist()} == {759, 499, 259, 0} and {*problem.ends[1].tolist()} == {499, 0}
    assert models.student.record["map"] == "phased" and models.student.record["phases"] == 2
    assert models.student.constants.phases == 2
    made = make_lcm(teacher, tmp_path / "phased", DIM, **models.student.record)
    lcf = {"objective": "lcf", "model__student": str(made)}
    assert load(make_config(None, **lcf, **phased, distill__phases=2)).student.constants.phases == 2
    with pytest.raises(LcmError, match=r"phases = 4, but .* distilled with 2; set that"):
        load(make_config(None, **lcf, **phased | {"sample__steps": 4}))
    with pytest.raises(LcmError, match=r"map = 'origin', but .* distilled with 'phased'"):
        load(make_config(None, **lcf, distill__w_embedding_dim=DIM))


def test_how_an_lcm_is_recognised(teacher, lcm, tmp_path):
    """By time_cond_proj_dim, a record, or LCMScheduler; the latter two also without w embedding."""
    lcf = {"objective": "lcf", "distill__w_embedding_dim": 0, "sample__guidance_scale": 1.0}
    with pytest.raises(LcmError, match="is not a Latent Consistency Model") as error:
        load(make_config(None, **lcf, model__student=str(teacher)))
    assert all(sign in str(error.value) for sign in ("time_cond_proj_dim", RECORD, "LCMScheduler", "scheduler_config"))
    recorded = make_lcm(teacher, tmp_path / "recorded", None, solver_steps=50)
    assert not load(make_config(None, **lcf, model__student=str(recorded))).student.has_w_embedding
    scheduled = make_lcm(teacher, tmp_path / "scheduled", None)
    changes = {"_class_name": "LCMScheduler", "original_inference_steps": 40}
    tiny.change_json(scheduled / "scheduler" / "scheduler_config.json", **changes)
    assert load(make_config(None, **lcf, model__student=str(scheduled), distill__solver_steps=40))
    with pytest.raises(LcmError, match=r"solver_steps = 50, but .* distilled with 40"):
        load(make_config(None, **lcf, model__student=str(scheduled)))
    with pytest.raises(LcmError, match=r"w_embedding_dim = 256: .* without w embedding; set 0"):
        load(make_config(None, objective="lcf", model__student=str(scheduled), distill__solver_steps=40))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distill__solver_steps": 25}, r"solver_steps = 25, but .* was distilled with 50"),
        ({"distill__timestep_scaling": 5.0}, r"timestep_scaling = 5.0, but .* 10.0"),
        ({"distill__sigma_data": 1.0}, r"sigma_data = 1.0, but .* 0.5"),
        ({"distill__map": "phased"}, r"map = 'phased', but .* 'origin'; set that"),
        ({"distill__w_max": 20.0}, r"w_max = 20: .* on w in \[2, 14\]"),
        ({"distill__w_embedding_dim": 256}, r"dimension 16.*w_embedding_dim is 256"),
        ({"model__prediction_type": "v_prediction"}, r"'v_prediction', but .* 'epsilon'"),
    ],
)
def test_lcf_needs_the_constants_of_the_lcm(lcm, changes, words):
    lcf = {"objective": "lcf", "model__student": str(lcm), "distill__w_embedding_dim": DIM}
    with pytest.raises(LcmError, match=words) as error:
        load(make_config(None, **lcf | changes))
    assert "\n" not in str(error.value)


def test_models_that_do_not_go_together(teacher, lcm, tmp_path):
    with pytest.raises(LcmError, match=r"holds a single model .*, or this UNet with .*config.model.student"):
        load(make_config(None, objective="lcf", model__student=str(lcm / "unet"), distill__w_embedding_dim=DIM))
    of_v = make_lcm(teacher, tmp_path / "v", prediction_type="v_prediction", solver_steps=50)
    with pytest.raises(LcmError, match=r"lcm_config.json says v_prediction, but .* used with epsilon"):
        load(make_config(teacher, objective="lcf", model__student=str(of_v), distill__w_embedding_dim=DIM))
    plain = tmp_path / "plain"
    shutil.copytree(teacher, plain)
    with pytest.raises(LcmError, match="w_embedding_dim = 256: a LoRA run cannot train .*set 0"):
        load(make_config(teacher, lora__rank=4, model__student=str(plain)))
    with pytest.raises(LcmError, match="is a Latent Consistency Model itself"):
        load(make_config(lcm, **LORA | {"distill__w_embedding_dim": DIM}, model__student=str(plain)))
    with pytest.raises(LcmError, match=r"'epsilon', but the model's scheduler_config.json has 'v_prediction'"):
        load(make_config(tiny.folder("sd2"), model__prediction_type="epsilon"))


def test_a_teacher_for_another_task_is_refused_before_it_is_read(tmp_path):
    refiner = tiny.copy("refiner", tmp_path / "refiner")
    for weights in refiner.rglob("*.safetensors"):
        weights.unlink()
    with pytest.raises(LcmError, match=r"config.model.teacher = '.*refiner' is an SDXL refiner, .*text-to-image model"):
        run_models.shapes(make_config(refiner))


def test_the_record_of_a_student_is_typed(teacher, tmp_path):
    lcf = {"objective": "lcf", "distill__w_embedding_dim": 0, "sample__guidance_scale": 1.0}
    for record in ({"solver_steps": "50"}, {"w_min": [2.0]}, {"sigma_data": float("nan")}):
        student = make_lcm(teacher, tmp_path / next(iter(record)), None, **record)
        with pytest.raises(LcmError, match=f"{next(iter(record))} of {RECORD}="):
            load(make_config(None, **lcf, model__student=str(student)))


def test_another_vae_and_its_precision(teacher, tmp_path):
    vae = Path(shutil.copytree(teacher / "vae", tmp_path / "vae"))
    path = vae / "config.json"
    tiny.change_json(path, force_upcast=True, scaling_factor=0.5)
    config = make_config(teacher, model__vae=str(vae), model__dtype="bfloat16")
    models = load(config)
    unet, vae = models.student.unet, models.teacher.vae
    assert unet.dtype == models.teacher.unet.dtype == jnp.bfloat16 and vae.dtype == jnp.float32
    assert training_step.make_problem(config, models.teacher, models.student).scaling_factor == 0.5
    tiny.change_json(path, force_upcast=False)
    assert run_models.load_teacher(config)[0].vae.dtype == jnp.bfloat16
    assert load_pipeline(teacher)[0].vae.scaling_factor != 0.5


def test_a_single_file_teacher_equals_the_folder_that_it_was_made_from(teacher, tmp_path):
    file = save_single_file(*load_pipeline(teacher), tmp_path / "teacher.safetensors", dtype=np.float32)
    with pytest.raises(LcmError, match=r"config\.model\.config = '.*': goes with a single \.safetensors file"):
        make_config(teacher, model__config=str(teacher))
    config = make_config(file, model__config=str(teacher))
    models, expected = load(config), load(make_config(teacher))
    assert models.student == expected.student and same(models.student_params["unet"], expected.student_params["unet"])
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), models.student_params)
    assert run_models.shapes(config).student_params == shapes


def test_lcf_of_a_single_file_equals_that_of_its_folder(lcm, tmp_path):
    record = {RECORD: (lcm / RECORD).read_text()}
    file = save_single_file(*load_pipeline(lcm), tmp_path / "lcm.safetensors", dtype=np.float32, metadata=record)
    lcf = {"objective": "lcf", "distill__w_embedding_dim": DIM}
    models = load(make_config(None, **lcf, model__student=str(file), model__config=str(lcm)))
    expected = load(make_config(None, **lcf, model__student=str(lcm)))
    assert models.student == expected.student and same(models.student_params["unet"], expected.student_params["unet"])


def one_weight(folder: Path) -> None:
    """Changes one number in the middle of the folder's largest tensor."""
    (path,) = folder.glob("*.safetensors")
    tensors = safetensors.numpy.load_file(path)
    largest = max(tensors.values(), key=lambda tensor: tensor.size).reshape(-1)
    largest[largest.size // 2 + 1] += 1
    safetensors.numpy.save_file(tensors, path, metadata={"format": "pt"})


def test_digests_are_of_what_is_computed_with(teacher, lcm, tmp_path):
    """Each part on its own; files that hold the same otherwise have the same digests."""

    def digests(folder=None, **changes):
        config = make_config(folder or tmp_path / "model", distill__w_embedding_dim=DIM, **changes)
        return {part: entry["digest"] for part, entry in run_models.load(config).digests.items()}

    def changes(part: str, change) -> set[str]:
        """The parts whose digests differ after `change` of the folder of `part`."""
        shutil.rmtree(tmp_path / "model", ignore_errors=True)
        shutil.copytree(teacher, tmp_path / "model")
        change(tmp_path / "model" / part)
        found = digests()
        return {name for name in begun.keys() | found.keys() if begun.get(name) != found.get(name)}

    begun = digests(teacher)
    assert set(begun) == {"unet", "vae", "text_encoder", "tokenizer", "scheduler", "student"}
    assert changes("unet", one_weight) == {"unet", "student"}
    assert changes("vae", one_weight) == {"vae"} and changes("text_encoder", one_weight) == {"text_encoder"}
    assert changes("vae", lambda f: tiny.change_json(f / "config.json", scaling_factor=0.5)) == {"vae"}
    beta = lambda f: tiny.change_json(f / "scheduler_config.json", beta_end=0.013)  # noqa: E731
    assert changes("scheduler", beta) == {"scheduler"}
    special = lambda f: tiny.change_json(f / "tokenizer_config.json", pad_token="!")  # noqa: E731
    assert changes("tokenizer", special) == {"tokenizer"}

    def rewritten(folder: Path) -> None:
        tiny.change_json(folder / "config.json", _diffusers_version="9", _name_or_path="elsewhere")
        (folder.parent / "README.md").write_text("another")
        (path,) = folder.glob("*.safetensors")
        tensors = {key: value.copy() for key, value in sorted(safetensors.numpy.load_file(path).items(), reverse=True)}
        safetensors.numpy.save_file(tensors, path, metadata={"format": "pt", "about": "more"})

    assert changes("unet", rewritten) == set()
    other = digests(model__student=str(lcm))
    assert {part for part in begun if begun[part] != other[part]} == {"student"}


def test_names_in_models_json_have_the_revision_on_the_hub(teacher, tmp_path, monkeypatch):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "1a2b"
    shutil.copytree(teacher, snapshot)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(snapshot))
    found = run_models.load(make_config("owner/name")).digests
    assert {entry["name"] for entry in found.values()} == {"teacher owner/name@1a2b", "student owner/name@1a2b"}
