"""All experiments whose numbers stand in README, notebooks and docs, in the order in which they are run.

Comparisons of speed with torch (experiments/speed), what is only compiled (experiments/aot), and the page's latency
(experiments/page, which needs a browser) are not among them: each is kept by itself.
"""

import dataclasses

from experiments.ablations.studies import STUDIES

ASSETS = ("lcm_jax/assets/shapes_teacher", "lcm_jax/assets/shapes_scorer")
# What computes the numbers that are trained, sampled and measured. The rest of the package must not change them: loops,
# meshes, files and kernels, whose tests demand the same numbers of them; nor what only refuses, records or prints.
NUMERIC = (
    "lcm_jax/diffusion/*.py",
    "lcm_jax/models/*.py",
    "lcm_jax/distill/*.py",
    "lcm_jax/data/shapes.py",  # images and captions
    "lcm_jax/data/encoding.py",
    "lcm_jax/data/order.py",
    "lcm_jax/data/rows.py",
    "lcm_jax/pretrained/text.py",
    "lcm_jax/pretrained/tokenizer.py",
    "lcm_jax/run/models.py",  # where the student starts
    "lcm_jax/run/data.py",
    "lcm_jax/run/step.py",
    "lcm_jax/sampling/generator.py",
    "lcm_jax/sampling/plan.py",
    "lcm_jax/sampling/programs.py",
    "lcm_jax/sampling/request.py",
    "lcm_jax/metrics/shapes.py",
    "lcm_jax/metrics/measures.py",
    "lcm_jax/metrics/rows.py",
    "lcm_jax/metrics/distances.py",
    "lcm_jax/metrics/intervals.py",
    "lcm_jax/metrics/networks/shapes.py",
    "experiments/stage.py",  # how long, and with which changes, a config is trained
)
LOOP = ("lcm_jax/train.py", "lcm_jax/data/loader.py", "lcm_jax/data/cache.py", "lcm_jax/runtime/telemetry.py")
SHARED = ("experiments/measuring.py", "experiments/embedded.py")
STYLED = ("table.md", "table.json", "grid.png")
STYLE_LORA = ("experiments/shapes_lcm_lora/train_style.py", "experiments/shapes_teacher/loop.py")
TORCH = ("experiments/vs_diffusers/torch_lcd.py", "experiments/vs_diffusers/torch_run.py")
METHODS = ("cost", "figure", "report", "rival")
STUDY_STEPS, TORCH_STEPS = 250, 300  # of training
TEACHER_ROWS = "experiments/shapes_teacher/teacher_rows.json"
# What the workflows depend on besides, which no training does: so they take the demo's LCM.
WORKFLOWS = (
    "lcm_jax/assets/shapes_controlnet/*",
    "lcm_jax/sampling/control.py",
    "lcm_jax/sampling/image*.py",
    "experiments/workflows/cases.py",
)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A command, what it publishes, and what its numbers depend on. Files are patterns below the repository's folder.

    Attributes:
      name: in the records and on the command line.
      module, flags: of `python -m`.
      publishes: files beside the module, which the command writes at its end.
      places: more flags: where its runs are. "{runs}" is a folder for one state of the assets and of the code,
        "{shapes_lcm}" the name, in it, of a run of configs/shapes_lcm.py with the values that this has now.
      configs: whose values it trains by.
      assets: folders of weights.
      code: another state of these files is another run, from its start.
      program: what asks for models and rows, and lays them out, besides the module itself: what has been trained and
        sampled stays when it changes.
    """

    name: str
    module: str
    flags: tuple[str, ...]
    publishes: tuple[str, ...]
    places: tuple[str, ...] = ("--workdir={runs}/{shapes_lcm}",)
    configs: tuple[str, ...] = ("configs/shapes_lcm.py",)
    assets: tuple[str, ...] = ASSETS
    code: tuple[str, ...] = NUMERIC
    program: tuple[str, ...] = SHARED

    @property
    def command(self) -> str:
        """As a user would type it."""
        return " ".join(("python -m", self.module, *self.flags))

    @property
    def asking(self) -> tuple[str, ...]:
        """`program` with the module itself."""
        return (f"{self.module.replace('.', '/')}.py", *self.program)

    @property
    def published(self) -> tuple[str, ...]:
        """`publishes`, from the repository's folder."""
        folder = self.module.rpartition(".")[0].replace(".", "/")
        return tuple(f"{folder}/{name}" for name in self.publishes)


def _teacher(name: str, flags: tuple[str, ...], publishes: tuple[str, ...]) -> Experiment:
    module, places = "experiments.shapes_teacher.teacher_rows", ("--workdir={runs}/teacher_rows",)
    return Experiment(name, module, flags, publishes, places, configs=())


def _demo(name: str, config: str, suffix: str) -> Experiment:
    flags = *(f"--config={config}",) * bool(suffix), "--thorough", "--publish"
    publishes = tuple(name.format(suffix) for name in ("table{}.md", "table{}.json", "grid{}.png", "metrics{}.jsonl"))
    places, program = (f"--workdir={{runs}}/{{shapes_lcm{suffix}}}",), (*SHARED, TEACHER_ROWS)
    return Experiment(name, "experiments.shapes_lcm.demo", flags, publishes, places, (config,), program=program)


def _ablation(study: str) -> Experiment:
    return Experiment(
        f"ablation-{study}",
        "experiments.ablations.run",
        (f"--study={study}", f"--steps={STUDY_STEPS}", "--count=512", "--publish"),
        (f"{study}.md", f"{study}.json", f"{study}.png"),
        (f"--workdir={{runs}}/{{shapes_lcm}}-{STUDY_STEPS}-steps",),  # shared by all studies
        program=(*SHARED, "experiments/ablations/studies.py", "experiments/ablations/figure.py"),
    )


LISTED = (
    # The scan drops all other tables of teacher_rows.json, so it is the second that publishes that file.
    _teacher("teacher", ("--scan", "--thorough"), ("guidance.md", "guidance.png")),
    _teacher("teacher-for-demo", (), ("teacher_rows.json",)),
    _demo("demo", "configs/shapes_lcm.py", ""),
    _demo("demo-long", "configs/shapes_lcm_long.py", "_long"),
    Experiment(
        "table1",
        "experiments.table1.run",
        ("--publish",),
        ("result.md", "plot.png", "evaluations.png", "table.json"),
        program=(*SHARED, "experiments/table1/figure.py", "experiments/table1/paper.py"),
    ),
    *map(_ablation, STUDIES),
    Experiment(
        "lcm-lora",
        "experiments.shapes_lcm_lora.run",
        ("--publish",),
        (*STYLED, "style_metrics.jsonl", "lcm_metrics.jsonl"),
        ("--workdir={runs}/{shapes_lcm_lora}",),
        ("configs/shapes_lcm_lora.py",),
        code=(*NUMERIC, *STYLE_LORA),
    ),
    Experiment(
        "lcf",
        "experiments.shapes_lcf.run",
        ("--count=2000", "--publish"),
        (*STYLED, "lcf_metrics.jsonl", "mix_metrics.jsonl"),
        ("--workdir={runs}/{shapes_lcf}", "--lcm={runs}/{shapes_lcm}"),
        ("configs/shapes_lcm.py", "configs/shapes_lcf.py"),
    ),
    Experiment(
        "torch",
        "experiments.vs_diffusers.run",
        ("--seeds=3", f"--steps={TORCH_STEPS}", "--publish"),
        ("table.md", "table.json", "curves.png"),
        (f"--workdir={{runs}}/{{shapes_lcm}}-{TORCH_STEPS}-steps",),
        code=(*NUMERIC, *TORCH, "experiments/vs_diffusers/draws.py"),
        program=(*SHARED, "experiments/vs_diffusers/compare.py"),
    ),
    Experiment(
        "methods",
        "experiments.methods.run",
        ("--publish",),
        ("table.md", "table.json", "figure.png"),
        ("--workdir={runs}/{shapes_pcm}-{shapes_lcm_lora}",),
        ("configs/shapes_lcm.py", "configs/shapes_pcm.py", "configs/shapes_lcm_lora.py"),
        code=(*NUMERIC, *STYLE_LORA, "experiments/methods/arms.py", "experiments/methods/latents.py"),
        program=(*SHARED, TEACHER_ROWS, *(f"experiments/methods/{name}.py" for name in METHODS)),
    ),
    Experiment(
        "data-loop",
        "experiments.data_speed.training",
        ("--steps=60", "--out=experiments/data_speed/training.json"),
        ("training.json",),
        places=(),
        code=(*NUMERIC, *LOOP),
        program=("experiments/data_speed/images.py",),
    ),
    Experiment(
        "data-images",
        "experiments.data_speed.images",
        ("--count=64", "--out=experiments/data_speed/images.json"),
        ("images.json",),
        places=(),
        configs=(),
        assets=(),
        code=("lcm_jax/data/images.py",),
        program=(),
    ),
    Experiment(
        "workflows",
        "experiments.workflows.run",
        ("--publish",),
        ("table.md", "table.json", "image_to_image.png", "inpainting.png", "controlnet.png"),
        program=(*SHARED, TEACHER_ROWS, *WORKFLOWS),
    ),
    Experiment(
        "workflows-latency",
        "experiments.workflows.latency",
        ("--publish",),
        ("latency.md", "latency.json"),
        program=(
            *WORKFLOWS,
            "experiments/workflows/*_side.py",
            "experiments/workflows/workloads.py",
            "experiments/speed/measure.py",
        ),
    ),
    Experiment(
        "overhead",
        "experiments.overhead.run",
        (),
        ("overhead.json", "table.md"),
        places=(),
        code=(*NUMERIC, *LOOP),
        program=(),
    ),
)
