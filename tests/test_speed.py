"""experiments/speed: both sides do the same work, interleaved, and the report says what was measured."""

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
from lcm_jax.run.models import load_teacher
from lcm_jax.run.report import build
from lcm_jax.runtime import mesh as mesh_lib

SMALL = {kind: Workload(kind, "shapes", 64, 2, "float32") for kind in ("unet", "sample", "lcd", "lora")}


def torch_flops(workload: Workload) -> float:
    """The eager way's FLOPs by torch's own counter."""
    made = torch_side.prepare(workload)
    with FlopCounterMode(display=False) as counter:
        result = made.ways["eager"]()
    assert made.finite(result) and made.peak_bytes() > 0
    return counter.get_total_flops()


@pytest.mark.slow
def test_sampling_flops_of_both_sides_are_the_same():
    """Text encoder, 4 steps, decoding: counted in the jaxpr, and by torch while it runs."""
    work, scale = SMALL["sample"], side.GUIDANCE_SCALE
    model, size = jax_side._pipeline(work), (work.size, work.size)
    ours = jax_side.sampling_flops(*model, jax_side.SETTINGS, scale, size, work.batch)
    parity.close(torch_flops(SMALL["sample"]), ours, rtol=0.01)


@pytest.mark.parametrize("kind", ["lcd", "lora"])
@pytest.mark.slow
def test_training_flops_of_both_sides_are_the_same(kind):
    """Teacher twice, target, student, its gradient. For adapters the order of products may differ a little."""
    config = side.training_config(SMALL[kind])
    made, _ = build(config, mesh_lib.make_mesh(devices=jax.devices()[:1]))
    parity.close(torch_flops(SMALL[kind]), made.model_flops(), rtol=0.02)


def test_random_weights():
    """A signal keeps its size."""
    shapes = {
        "conv": {"kernel": jax.ShapeDtypeStruct((3, 3, 64, 32), np.float32)},
        "norm": {"scale": jax.ShapeDtypeStruct((8,), np.float32), "bias": jax.ShapeDtypeStruct((8,), np.float32)},
    }
    found = jax_side.random_weights(shapes)
    parity.close(found["conv"]["kernel"].std(), (3 * 3 * 64) ** -0.5, rtol=0.05)
    assert (found["norm"]["scale"] == 1).all() and (found["norm"]["bias"] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sd15", "sdxl"])
def test_training_config(model):
    """Published models need no weights; the frozen ones are held in the compute dtype."""
    config = side.training_config(Workload("lcd", model, 512, 4, "bfloat16", "block"))
    assert (config.model.teacher_dtype, config.train.remat, config.data.batch_size) == ("bfloat16", "block", 4)
    teacher, _ = load_teacher(config, weights=False)
    assert teacher.unet.block_out_channels[0] == 320 and teacher.is_xl == (model == "sdxl")


class Scripted:
    """A worker that answers from a script: seconds of each way; None: it fails."""

    def __init__(self, name, ways, log):
        self.name, self.seconds, self.log = name, ways, log
        self.ready = {"ways": list(ways), "flops": 6e9, "prepare_s": 1.0}

    def time(self, way, runs):
        self.log.append((self.name, way, runs))
        if self.seconds[way] is None:
            raise worker.Failed("out of memory")
        return {"seconds": self.seconds[way] * runs, "peak_bytes": 2**30}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass


def measured(workload, torch_ways, found=None, ours=0.25, code="a" * 64):
    """The record, the log of (side, way, runs), and the record at each time that it was kept."""
    log, kept = [], []
    found = {} if found is None else found
    found |= {"workload": dataclasses.asdict(workload), "versions": {"jax": "1"}, "code": code}
    script = {"jax": {"lcm_jax": ours}, "torch": torch_ways}

    def start(name):
        if script[name] is None:
            raise worker.Failed("No module named 'torch'")
        return Scripted(name, script[name], log)

    measure.measure(
        found,
        workload,
        start,
        lambda: kept.append(json.dumps(found)),
        lambda line: None,
    )
    return found, log, kept


def test_turns_are_interleaved():
    """The sides alternate, and so does the one that begins; a way that fails is recorded, the others are measured."""
    found, log, kept = measured(SMALL["lcd"], {"eager": 0.5, "compile": None})
    assert found["torch"]["eager"]["ratios"] == [2.0] * measure.TURNS
    assert found["torch"]["compile"] == {"error": "out of memory", "versions": {"jax": "1"}, "code": "a" * 64}
    assert measure.complete(found)
    turns = [name for name, way, runs in log if runs > 1]
    assert turns[:6] == ["jax", "torch", "torch", "jax", "jax", "torch"] and len(turns) == 2 * measure.TURNS
    assert {runs for _, _, runs in log} == {1, 2, 4}  # a second of work in a turn
    assert not measure.complete(json.loads(kept[1]))  # eager was kept before the other way began


def test_workloads_that_need_the_whole_card():
    """All of our turns come first, then torch's; what is there is not measured again."""
    alone = dataclasses.replace(SMALL["lcd"], alone=True)
    found, log, kept = measured(alone, {"eager": 0.5, "compile": None})
    names = [name for name, *_ in log]
    assert names == sorted(names) and found["torch"]["eager"]["ratio"] == 2.0
    assert measure.complete(found) and "error" in found["torch"]["compile"]
    again, log, _ = measured(alone, {"eager": 0.5, "compile": None}, json.loads(kept[0]))
    assert {name for name, *_ in log} == {"torch"} and again["torch"]["eager"]["ratio"] == 2.0


def test_a_cut_measurement_is_resumed():
    """Ways keep the versions of packages and code with which they were measured; our later failure drops nothing."""
    found, _, kept = measured(SMALL["lcd"], {"eager": 0.5, "compile": 0.4})
    again, log, _ = measured(SMALL["lcd"], {"eager": 0.5, "compile": None}, json.loads(kept[1]), code="b" * 64)
    assert not any(way == "eager" for _, way, _ in log)
    assert again["torch"].keys() == found["torch"].keys() and again["jax"]["peak_bytes"] == 2**30
    assert [again["torch"][way]["code"][0] for way in ("eager", "compile")] == ["a", "b"]
    text = report.markdown({"card": "A card", "device": "cpu", "workloads": {"lcd": again, "old": {}}})
    assert "lcd compile failed" in text and "Measured with jax 1." in text
    assert f"{'b' * 12} (lcd); not recorded (old)" in text

    again, _, _ = measured(SMALL["lcd"], {"eager": 0.5, "compile": 0.4}, json.loads(kept[1]), ours=None)
    assert "error" not in again["jax"] and again["torch"].keys() == {"eager"} and not measure.complete(again)
    failed, _, _ = measured(SMALL["lcd"], {"eager": 0.5}, ours=None)
    assert failed["jax"]["error"] == "out of memory" and measure.complete(failed)


def test_our_side_is_measured_without_torch():
    """Where it is not installed; with it, both are measured again, as versions then differ."""
    for workload in (SMALL["lcd"], dataclasses.replace(SMALL["lcd"], alone=True)):
        found, log, _ = measured(workload, None)
        assert found["error"] == "torch: No module named 'torch'" and found["jax"]["seconds"] == [0.25] * measure.TURNS
        assert measure.complete(found) and len(log) == 3 + measure.TURNS
        found = measure.current(found, {"jax": "1", "torch": "2"})
        assert "jax" not in found and "error" not in found


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


def test_best_way_of_torch():
    """The one with the least ratio: the seconds of two ways are of different minutes, when the machine was slower."""
    found, _, _ = measured(SMALL["lcd"], {"eager": 0.5, "compile": 0.4})
    found["torch"]["compile"] |= {"seconds": [0.9] * 7, "jax_seconds": [0.6] * 7, "ratio": 1.5}
    (line,) = report.lines({"card": "A card", "device": "cpu", "workloads": {"lcd": found}})
    assert (line.best, line.ours(), line.torch(), line.ratio()) == ("compile", 0.6, 0.9, 1.5)


def card(device="gpu"):
    """A card on which a product runs at 120 GFLOP/s, and the work at 24 (ours) and 12 (torch)."""
    product, _, _ = measured(Workload("matmul", "none", 8, 1, "bfloat16"), {"eager": 0.05})
    lcd, _, _ = measured(workloads.HEADLINE, {"eager": 0.5, "compile": None})
    sample, _, _ = measured(Workload("sample", "sd15", 512, 1, "bfloat16"), {"eager": 0.5, "compile": 0.3})
    records = {Workload(**one["workload"]).name: one for one in (product, lcd, sample)}
    return {"card": "A card", "device": device, "workloads": records}


def test_report(tmp_path):
    """Of a card's record; table, chart, and the README's section between its markers."""
    text = report.markdown(card())
    rows = text.splitlines()
    assert "Ceiling of bfloat16 products: 0.12 TFLOP/s" in text
    sample, lcd = (next(line for line in rows if line.startswith(f"| {kind}")) for kind in ("sample", "lcd"))
    assert "| 2.00 | 1.20 (1.20 to 1.20) | 1.3: missed | 20 % / 17 % |" in sample and "compile" in sample
    assert "2.00 (2.00 to 2.00) | 1.5: met, 50 % of the ceiling: missed | 20 % / 10 % |" in lcd and "(alone)" in lcd
    assert "0.28 hours" in text  # 4,000 steps of a quarter of a second
    assert "compile failed: out of memory" in text
    assert "1.2 over eager: met" in report.markdown(card("cpu"))

    results = tmp_path / "results"
    results.mkdir()
    (results / "a-card.json").write_text(json.dumps(card()))
    (tmp_path / "README.md").write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    report.write(results, tmp_path)
    readme = (tmp_path / "README.md").read_text()
    assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old" not in readme
    assert (tmp_path / "table.md").read_text() in readme and text in readme and "results/a-card.png" in readme
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
    """--list in the list's order, wrong flags, and a budget that is used up."""
    assert run.main(["--device=cpu", "--list", "--only=sample"]) == 0
    assert re.findall(r"^sample-shapes-64-b(\d)", capsys.readouterr().out, re.MULTILINE) == ["4", "1", "8"]
    only = workloads.chosen("gpu", ["lcd-sd15-768-b16"], "none")
    assert [w.name for w in only] == ["lcd-sd15-768-b16-bfloat16"]
    with pytest.raises(LcmError, match="no such workload"):
        run.main(["--device=cpu", "--only=nothing"])
    narrow = workloads.chosen("cpu", ["sample-sd15"], narrow=True)
    assert [w.name for w in narrow] == ["sample-sd15-64-b1-bfloat16-narrow"]  # all sizes are one
    with pytest.raises(SystemExit):
        run.parse(["--device=cpu", "--again", "--budget_s=100"])
    assert "--again starts over" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run.parse(["--device=cpu", "--config=configs/sdxl_lcm.py"])
    assert "--config is for --profile" in capsys.readouterr().err
    assert run.main(["--device=cpu", "--budget_s=1", f"--results={tmp_path}", f"--profiles={tmp_path}"]) == 0
    assert "the same command resumes" in capsys.readouterr().out and not list(tmp_path.glob("*.json"))


@pytest.mark.slow
def test_workers(tmp_path):
    """Real processes of both sides: a product; a way that fails, a process that dies, and the deadline."""
    work = Workload("matmul", "none", 64, 1, "float32")
    for name in ("jax", "torch"):
        with worker.Worker(name, work, "cpu", time.monotonic() + 600, tmp_path / "log") as one:
            (way,) = one.ready["ways"]
            assert one.time(way, 3)["seconds"] > 0 and one.ready["flops"] in (None, 2 * 64**3)
            with pytest.raises(worker.Failed, match="KeyError"):
                one.time("no such way", 1)
            if name == "jax":
                one._process.kill()
                with pytest.raises(worker.Failed, match="the process ended, code -9"):
                    one.time(way, 1)
    assert "no such way" in (tmp_path / "log").read_text()
    with pytest.raises(worker.OutOfTime):
        worker.Worker("torch", work, "cpu", time.monotonic() + 0.01, tmp_path / "log")


@pytest.mark.slow
def test_profile(tmp_path):
    """Our step of the embedded model, in its process."""
    with worker.Worker("jax", SMALL["lcd"], "cpu", time.monotonic() + 900, tmp_path / "log") as one:
        assert one.ready["flops"] > 0 and one.time("lcm_jax", 1)["peak_bytes"] > 0
        facts, found = (one.ask({"do": what, "folder": str(tmp_path)}) for what in ("facts", "profile"))
    assert found["kernels"] and facts["cost"]["model_flops"] == one.ready["flops"]
    assert (tmp_path / "cost.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["unet", "sample"])
def test_our_ways_run(kind):
    made = jax_side.prepare(SMALL[kind])
    assert made.finite(made.ways["lcm_jax"]()) and made.flops > 0


@pytest.mark.gpu
def test_compiled_ways_run_on_a_gpu():
    """Every way of torch, graphs too, on the embedded model."""
    for kind in ("unet", "sample", "lcd", "lora"):
        made = torch_side.prepare(dataclasses.replace(SMALL[kind], dtype="bfloat16"))
        for way in made.ways.values():
            way()
            assert made.finite(way())
    assert torch.cuda.is_available()
