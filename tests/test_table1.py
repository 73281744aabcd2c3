"""Table 1: its layout, which rows it has, and what is refused before any training."""

import dataclasses

import pytest
from PIL import Image

from experiments import embedded, measuring, results
from experiments.table1 import run
from lcm_jax import evaluate
from lcm_jax.errors import LcmError
from lcm_jax.metrics import table

COMPARISON = {
    "seed": 0,
    "pictures": 8,
    "prompts": {"from": "x", "sha256": "0" * 64},
    "height": 64,
    "width": 64,
    "metrics": {},
}
SETTINGS = {
    "program": {"dtype": "float32", "negative_prompt": "", "tiled": False, "batch_size": 8, "device": "cpu"},
    "sampling": {"spacing": "trailing"},
}


def row(sampler: str, steps: int, scale: float, accuracy: float, distance: float) -> table.Row:
    values = {"caption_accuracy": accuracy, "shapes_frechet": distance, "endpoint_error": 0.5 if steps == 1 else None}
    model = "student" if sampler == "lcm" else "teacher"
    return table.Row(model, sampler, steps, scale, steps, values, 1.0, (1.0, 1.0), 1, 0.0, COMPARISON, SETTINGS)


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_result():
    """Methods and steps stand as in the paper, the best is bold, the paper's numbers follow."""
    rows = [
        row(sampler, steps, scale, 0.1 * number + 0.01 * steps + 0.001 * scale, 10 * number + steps + scale)
        for number, sampler in enumerate(run.METHODS, 1)
        for steps in (8, 1, 4, 2)
        for scale in (7.5, 3.0, run.UNGUIDED)
        if (sampler, scale) != ("lcm", run.UNGUIDED)
    ]
    text = run.result(rows)
    high = [cells(line) for line in text.split("Guidance scale 7.5:")[1].splitlines() if line.startswith("| ")][:5]
    assert high[0][1:5] == [f"caption accuracy, {n} step{'s' * (n > 1)}" for n in (1, 2, 4, 8)]
    assert [line[0] for line in high[1:]] == ["DDIM", "DPM-Solver", "DPM-Solver++", "LCM"]
    assert high[2][1:] == ["21.8%", "22.8%", "24.8%", "28.8%", "28.50", "29.50", "31.50", "35.50"]
    assert high[4][1:5] == ["**41.8%**", "**42.8%**", "**44.8%**", "**48.8%**"]  # more is better
    assert high[1][5:] == ["**18.50**", "**19.50**", "**21.50**", "**25.50**"]  # less is
    unguided = text.split("no guidance")[1].split("Guidance scale")[0]
    assert [cells(line)[0] for line in unguided.splitlines() if line.startswith("| ")][1:] == [*run.BASELINES.values()]
    papers = [cells(line) for line in text.split("The paper's")[1].splitlines() if line.startswith("| ")]
    assert papers[-1][:5] == ["LCM", "**35.36**", "**13.31**", "**11.10**", "**11.84**"] and len(papers) == 6
    assert papers[3][8] == "**29.55**"  # the paper's solvers have caught up


def test_intervals_in_the_papers_layout_and_in_the_embedded_models_tables():
    """Those of coverage are of the set that coverage is taken from; rows that were stored before have none."""
    ends = {"caption_accuracy": (0.4, 0.6), "coverage_distance": (0.1, 0.2), "collapsed": (0.0, 0.1)}
    one = dataclasses.replace(row("ddim", 1, 3.0, 0.5, 9.0), intervals=ends)
    rows = [one, *(row("ddim", n, 3.0, 0.4, 9.5) for n in (2, 4, 8))]
    assert "| DDIM | **50.0% (40.0 to 60.0)** | **40.0%** |" in run.result(rows)
    values = {**one.values, "coverage_distance": 0.15, "collapsed": 0.05}
    first, last = (embedded.as_dict(dataclasses.replace(one, values=values, intervals=i)) for i in (ends, {}))
    assert first["intervals"] == {"accuracy": (0.4, 0.6), "coverage": (0.1, 0.2), "collapsed": (0.0, 0.1)}
    assert embedded._merged([first, last])["intervals"] == {"accuracy": (0.4, 0.6)}
    assert embedded._merged([last, first])["intervals"] == {"coverage": (0.1, 0.2), "collapsed": (0.0, 0.1)}
    del last["intervals"]
    text = results.table_of(embedded.COLUMNS, [first, last])
    assert "| 50.0% (40.0 to 60.0) | 9.00 | 0.150 (0.100 to 0.200) | 5.0% (0.0 to 10.0) |" in text
    assert "| 50.0% | 9.00 | 0.150 | 5.0% |" in text
    assert results.noted("Of 8.", [first, last]).startswith("Of 8. In brackets") and results.noted("", [last]) == ""
    both = embedded._of_both({"frechet": 1.0, "intervals": {"frechet": (0, 2)}}, {"frechet": 3.0, "intervals": {}})
    assert both.pop("intervals") == {"frechet": (0, 2), "to_style": (0, 2)}
    assert both == {"frechet": 1.0, "to_style": 1.0, "to_plain": 3.0}


def test_evaluated(tmp_path, monkeypatch):
    """The folder's table may hold other scales, steps and spacings; metrics that some rows lack are left out."""
    wanted = [row(sampler, n, 3.0, 0.5, 9.0) for sampler in run.METHODS for n in (1, 2, 4, 8)]
    leading = {**SETTINGS, "sampling": {"spacing": "leading"}}
    others = [
        row("ddim", 50, 3.0, 0.9, 1.0),
        row("ddim", 4, 5.0, 0.9, 1.0),
        dataclasses.replace(row("ddim", 4, 3.0, 0.99, 99.0), settings=leading),
    ]
    wanted[0] = dataclasses.replace(wanted[0], values={**wanted[0].values, "fid": 3.0})
    table.write(tmp_path, [*wanted, *others])
    monkeypatch.setattr(evaluate, "main", lambda flags: 0)
    shared = ["--source=shapes", f"--out={tmp_path}"]
    found = measuring.evaluated(
        [*shared, "--model=shapes", "--name=teacher", measuring.rows_flag(",".join(run.BASELINES), (3.0,))]
    )
    found += measuring.evaluated([*shared, "--model=EXPORT", "--name=student", measuring.rows_flag("lcm", (3.0,))])
    assert found == wanted
    text = run.result(found)
    assert "99.0" not in text and "FID, 1 step" not in text.split("The paper's")[0]
    monkeypatch.setattr(evaluate, "main", lambda flags: 2)
    with pytest.raises(SystemExit) as stopped:
        measuring.evaluated([*shared, "--model=EXPORT", "--row=lcm:1:3"])
    assert stopped.value.code == 2


def test_recorded_rows():
    """Only for sizes that were measured; fewer images than a Frechet distance needs are refused."""
    methods = [one["method"] for one in embedded.recorded_rows(embedded.DEMO)]
    assert methods[:3] == ["renders", "VAE reconstructions", "one render of each caption"]
    assert set(methods[3:]) == {"DDIM", "DPM-Solver++(2M)"}
    with pytest.raises(LcmError, match=r"teacher rows are recorded for .*, not for 100x1; give --full"):
        embedded.recorded_rows(((100, 1),))
    with pytest.raises(LcmError, match="--count=64: .* at least 65"):
        embedded.check_count(64)


def test_what_a_metric_lacks_is_reported_before_any_training(monkeypatch, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a fox\n")
    torn = tmp_path / "torn.pth"
    torn.write_bytes(b"no weights")
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "0.png")
    monkeypatch.setattr(run.stage, "made", lambda *args: pytest.fail("trained"))
    for metric, wrong in (
        (f"--metric=fid:{torn} --reference={folder}", "torn.pth"),
        (f"--metric=shapes --reference={folder}", "no --metric compares with images"),
        ("--metric=shapes --height=32 --width=32", "scorer reads images of 64 x 64, these are 32"),
        ("--metric=shapes", "not a caption of the shapes set"),
    ):
        monkeypatch.setattr("sys.argv", ["run", "--no-plot", f"--evaluate=--prompts={prompts} {metric}"])
        with pytest.raises(LcmError, match=wrong):
            run.main()
