"""experiments/speed: both sides do the same work, by turns, and the report says what was measured."""

import dataclasses
import json
import re
import time

import jax
import numpy as np
import parity
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from experiments.speed import jax_side, measure, report, run, side, torch_side, trace, worker, workloads
from experiments.speed.workloads import Workload
from lcm_jax.errors import LcmError
from lcm_jax.run import models as student
from lcm_jax.run import step as training_step
from lcm_jax.runtime import mesh as mesh_lib

SMALL = {kind: Workload(kind, "shapes", 64, 2, "float32") for kind in ("unet", "sample", "lcd", "lora")}


def torch_flops(workload: Workload) -> float:
    """What torch's own counter says of the eager way."""
    made = torch_side.prepare(workload)
    with FlopCounterMode(display=False) as counter:
        made.ways["eager"](1)
    assert made.finite() and made.peak_bytes() > 0
    return counter.get_total_flops()


@pytest.mark.slow
def test_sampling_asks_for_the_same_products_on_both_sides():
    """Text encoder, 4 steps, decoding: FLOPs counted in the jaxpr and by torch while it runs."""
    ours = jax_side._sampling_flops(jax_side._pipeline(SMALL["sample"]), SMALL["sample"])
    parity.close(torch_flops(SMALL["sample"]), ours, rtol=0.01)


@pytest.mark.parametrize("kind", ["lcd", pytest.param("lora", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_training_steps_ask_for_the_same_products_on_both_sides(kind):
    """Teacher twice, target, student, its gradient. Of adapters the order of products may differ a little."""
    config = side.training_config(SMALL[kind])
    teacher = student.load_teacher(config, weights=False)
    made = training_step.make(
        config, teacher, student.load_student(config, teacher), mesh_lib.make_mesh(devices=jax.devices()[:1])
    )
    parity.close(torch_flops(SMALL[kind]), made.model_flops(), rtol=0.02)


def test_products_of_both_sides():
    work = Workload("matmul", "none", 64, 1, "float32")
    ours, theirs = jax_side.prepare(work), torch_side.prepare(work)
    ours.ways["lcm_jax"](2)
    theirs.ways["eager"](2)
    assert ours.flops == 2 * 64**3 and ours.finite() and theirs.finite()


def test_random_weights_keep_a_signals_size():
    shapes = {
        "conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 64, 32), np.float32)},
        "norm": {"scale": jax.ShapeDtypeStruct((8,), np.float32), "bias": jax.ShapeDtypeStruct((8,), np.float32)},
    }
    found = jax_side.random_weights(shapes)
    parity.close(found["conv"]["kernel"].std(), (3 * 3 * 64) ** -0.5, rtol=0.05)
    assert (found["norm"]["scale"] == 1).all() and (found["norm"]["bias"] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_published_models_are_known_without_weights(model):
    """Configs alone decide the shapes; the training config holds the frozen weights in the networks' dtype."""
    config = side.training_config(Workload("lcd", model, 512, 4, "bfloat16", "block"))
    assert (config.model.teacher_dtype, config.train.remat, config.data.batch_size) == ("bfloat16", "block", 4)
    teacher = student.load_teacher(config, weights=False)
    assert teacher.unet.block_out_channels[0] == 320 and teacher.is_xl == (model == "sdxl")


def test_lists():
    """No name twice; a GPU's has every model, size and batch, and the goals' headline right after the ceiling."""
    names = [w.name for w in workloads.gpu()]
    assert len(set(names)) == len(names)
    assert workloads.gpu()[1] == workloads.HEADLINE
    for model in ("sd15-512", "sd15-768", "sdxl-1024"):
        for batch in (1, 4, 8):
            for kind in ("sample", "lcd", "lora"):
                assert any(name.startswith(f"{kind}-{model}-b{batch}-bfloat16") for name in names)
    assert {w.kind for w in workloads.cpu()} == set(workloads.KINDS)
    only = workloads.chosen("gpu", ["lcd-sd15-768-b16"], "none")
    assert [w.name for w in only] == ["lcd-sd15-768-b16-bfloat16"]


class Told:
    """A worker that answers from a script: seconds of each way, or an error."""

    def __init__(self, name, ways, log):
        self.name, self.seconds, self.log = name, ways, log
        self.ready = {"ways": list(ways), "flops": 6e9, "prepare_s": 1.0}

    def time(self, way, runs):
        self.log.append((self.name, way, runs))
        seconds = self.seconds[way]
        return {"error": "out of memory"} if seconds is None else {"seconds": seconds * runs, "peak_bytes": 2**30}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def measured(workload, torch_ways, found=None, ours=0.25, code="a" * 64):
    log, kept = [], []
    found = {} if found is None else found
    found |= {"workload": dataclasses.asdict(workload), "versions": {"jax": "1"}, "code": code}
    told = {"jax": {"lcm_jax": ours}, "torch": torch_ways}
    measure.measure(
        found,
        workload,
        lambda name: Told(name, told[name], log),
        lambda: kept.append(json.dumps(found)),
        lambda line: None,
    )
    return found, log, kept


def test_pairs_by_turns():
    """The sides alternate and so does who begins; a way that fails is told, the others are measured all the same."""
    found, log, kept = measured(SMALL["lcd"], {"eager": 0.5, "compile": None})
    assert found["torch"]["eager"]["ratios"] == [2.0] * measure.TURNS
    assert found["torch"]["compile"] == {"error": "out of memory", "versions": {"jax": "1"}, "code": "a" * 64}
    assert measure.complete(found)
    turns = [name for name, way, runs in log if runs > 1]
    assert turns[:6] == ["jax", "torch", "torch", "jax", "jax", "torch"] and len(turns) == 2 * measure.TURNS
    assert {runs for _, _, runs in log} == {1, 2, 4}  # a second of work in a turn
    assert not measure.complete(json.loads(kept[1]))  # eager was kept before the other way began


def test_what_was_cut_goes_on():
    found, _, kept = measured(SMALL["lcd"], {"eager": 0.5, "compile": 0.4})
    again, log, _ = measured(SMALL["lcd"], {"eager": 0.5, "compile": 0.4}, json.loads(kept[1]))
    assert not any(way == "eager" for _, way, _ in log)
    assert again["torch"].keys() == found["torch"].keys()
    again, _, _ = measured(SMALL["lcd"], {"eager": 0.5, "compile": None}, json.loads(kept[1]))
    assert again["jax"]["peak_bytes"] == 2**30
    text = report.markdown({"card": "A card", "device": "cpu", "workloads": {"lcd": again}})
    assert "lcd compile failed" in text and "Measured with jax 1." in text


def test_results_of_several_states_of_the_code_are_told():
    _, _, kept = measured(SMALL["lcd"], {"eager": 0.5, "compile": 0.4})
    found, _, _ = measured(SMALL["lcd"], {"eager": 0.5, "compile": 0.4}, json.loads(kept[1]), code="b" * 64)
    assert found["torch"]["eager"]["code"] == "a" * 64 and found["torch"]["compile"]["code"] == "b" * 64
    text = report.markdown({"card": "A card", "device": "cpu", "workloads": {"lcd": found, "old": {}}})
    assert f"{'b' * 12} (lcd); not recorded (old)" in text
    assert len(run.code()) == 64


def test_torchs_best_way_is_the_one_that_comes_nearest_in_its_own_turns():
    """Its seconds are those of other minutes, in which the machine may have been slower."""
    found, _, _ = measured(SMALL["lcd"], {"eager": 0.5, "compile": 0.4})
    found["torch"]["compile"] |= {"seconds": [0.9] * 7, "jax_seconds": [0.6] * 7, "ratio": 1.5}
    (line,) = report.lines({"card": "A card", "device": "cpu", "workloads": {"lcd": found}})
    assert (line.best, line.ours(), line.torch(), line.ratio()) == ("compile", 0.6, 0.9, 1.5)


def test_beginning_anew_has_no_budget(capsys):
    with pytest.raises(SystemExit):
        run.parse(["--device=cpu", "--again", "--budget_s=100"])
    assert "--again begins anew" in capsys.readouterr().err


def test_our_failure_later_on_leaves_what_was_measured():
    _, _, kept = measured(SMALL["lcd"], {"eager": 0.5, "compile": 0.4})
    again, _, _ = measured(SMALL["lcd"], {"eager": 0.5, "compile": 0.4}, json.loads(kept[1]), ours=None)
    assert "error" not in again["jax"] and again["torch"].keys() == {"eager"} and not measure.complete(again)
    failed, _, _ = measured(SMALL["lcd"], {"eager": 0.5}, ours=None)
    assert failed["jax"]["error"] == "out of memory" and measure.complete(failed)


def test_other_versions_are_measured_again():
    """All of it, or the ways that were measured with others; a torch that did not start gets another chance, too."""
    found, _, _ = measured(SMALL["lcd"], {"eager": 0.5, "compile": 0.4})
    assert measure.complete(measure.current(found, {"jax": "1"}))
    other = measure.current(found, {"jax": "2"})
    assert "jax" not in other and not other["torch"] and not measure.complete(other)
    found["torch"]["eager"]["versions"] = {"jax": "0"}
    part = measure.current(found, {"jax": "1"})
    assert part["torch"].keys() == {"compile"}
    assert measure.complete(measured(SMALL["lcd"], {"eager": 0.5, "compile": 0.4}, part)[0])
    assert "error" not in measure.current(found | {"error": "torch: x"}, {"jax": "2"})
    assert "error" in measure.current(found | {"error": "torch: x"}, {"jax": "1"})


def test_sides_that_need_the_card_for_themselves():
    """All of our turns, then all of torch's."""
    found, log, _ = measured(dataclasses.replace(SMALL["lcd"], alone=True), {"eager": 0.5, "compile": None})
    names = [name for name, *_ in log]
    assert names == sorted(names) and found["torch"]["eager"]["ratio"] == 2.0
    assert measure.complete(found) and "error" in found["torch"]["compile"]


def card(device="gpu"):
    """A card on which a product runs at 120 GFLOP/s, and the work at 24 (ours) and 12 (torch)."""
    product, _, _ = measured(Workload("matmul", "none", 8, 1, "bfloat16"), {"eager": 0.05})
    lcd, _, _ = measured(workloads.HEADLINE, {"eager": 0.5, "compile": None})
    draw, _, _ = measured(Workload("sample", "sd15", 512, 1, "bfloat16"), {"eager": 0.5, "compile": 0.3})
    records = {w["workload"]["kind"]: w for w in (product, lcd, draw)}
    return {
        "card": "A card",
        "device": device,
        "workloads": {Workload(**w["workload"]).name: w for w in records.values()},
    }


def test_report():
    text = report.markdown(card())
    rows = text.splitlines()
    assert "Ceiling of bfloat16 products: 0.12 TFLOP/s" in text
    sample, lcd = (next(line for line in rows if line.startswith(f"| {kind}")) for kind in ("sample", "lcd"))
    assert "| 2.00 | 1.20 (1.20 to 1.20) | 1.3: missed | 20 % / 17 % |" in sample and "compile" in sample
    assert "2.00 (2.00 to 2.00) | 1.5: met, 50 % of the ceiling: missed | 20 % / 10 % |" in lcd and "by itself" in lcd
    assert "0.28 hours" in text  # 4,000 steps of a quarter of a second
    assert "compile failed: out of memory" in text
    assert "1.2 over eager: met" in report.markdown(card("cpu"))


def test_report_files(tmp_path):
    """Table, chart and the README's section between its markers."""
    results = tmp_path / "results"
    results.mkdir()
    (results / "a-card.json").write_text(json.dumps(card()))
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(results, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
    assert (tmp_path / "table.md").read_text() in readme and "results/a-card.png" in readme
    assert Image.open(results / "a-card.png").format == "PNG"


def test_spread():
    assert report.spread([1.0]) == 0
    parity.close(report.spread([1.0, 2.0, 3.0]), 0.5)


def test_kernels_of_a_trace(tmp_path):
    """Of a real trace: the product ran once in each run; shares sum to one."""
    a = jax.numpy.ones((256, 256))
    product = jax.jit(lambda a: a @ a)
    found = trace.kernels(str(tmp_path), lambda: product(a), 2)["kernels"]
    parity.close(sum(kernel["share"] for kernel in found), 1.0)
    assert found[0]["calls"] == 1 and found[0]["seconds"] > 0
    assert trace.summed([("a", 1.0), ("b", 3.0), ("a", 1.0)], 2)[0] == {
        "name": "b",
        "calls": 0.5,
        "seconds": 1.5,
        "share": 0.6,
    }


def test_commands(capsys, tmp_path):
    assert run.main(["--device=cpu", "--list", "--only=sample"]) == 0
    assert re.findall(r"^sample-shapes-64-b(\d)", capsys.readouterr().out, re.MULTILINE) == ["4", "1", "8"]
    with pytest.raises(LcmError, match="no such workload"):
        run.main(["--device=cpu", "--only=nothing"])
    assert run.main(["--device=cpu", "--budget_s=1", f"--results={tmp_path}", f"--profiles={tmp_path}"]) == 0
    assert "the same command goes on" in capsys.readouterr().out and not list(tmp_path.glob("*.json"))


@pytest.mark.slow
def test_workers(tmp_path):
    """Real processes of both sides: a product, and our step of the embedded model."""
    work = Workload("matmul", "none", 64, 1, "float32")
    for name in ("jax", "torch"):
        with worker.Worker(name, work, "cpu", time.monotonic() + 600, tmp_path / "log") as one:
            way = one.ready["ways"][0]
            assert one.time(way, 3)["seconds"] > 0
            assert "KeyError" in one.time("no such way", 1)["error"]
    with worker.Worker("jax", SMALL["lcd"], "cpu", time.monotonic() + 900, tmp_path / "log") as one:
        assert one.ready["flops"] > 0 and one.time("lcm_jax", 1)["peak_bytes"] > 0
        found = measure.profile(one, tmp_path / "profile")
    assert found["kernels"] and found["cost"]["model_flops"] == one.ready["flops"]
    assert (tmp_path / "profile" / "cost.txt").read_text()
    with pytest.raises(worker.OutOfTime):
        worker.Worker("torch", work, "cpu", time.monotonic() + 0.01, tmp_path / "log")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "sample"])
def test_our_ways_run(kind):
    made = jax_side.prepare(SMALL[kind])
    made.ways["lcm_jax"](1)
    assert made.finite() and made.flops > 0


@pytest.mark.gpu
def test_compiled_ways_run_on_a_gpu():
    """Every way of torch, graphs too, on the embedded model."""
    for kind in ("unet", "sample", "lcd", "lora"):
        made = torch_side.prepare(dataclasses.replace(SMALL[kind], dtype="bfloat16"))
        for way in made.ways.values():
            way(2)
            assert made.finite()
    assert torch.cuda.is_available()
