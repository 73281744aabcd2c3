"""README and docs are true: commands parse, names and links exist, numbers are those of stored results."""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import inspect
import json
import re
import runpy
import sys

import docs_kit
import pytest
import training_processes as runs
from absl import app, flags
from docs_kit import PAGES, ROOT, Command, name_of

import lcm_jax
from experiments import figures
from lcm_jax.cost import chips
from lcm_jax.errors import BadArgument
from lcm_jax.run import config as config_lib
from lcm_jax.run.keys import KEYS
from lcm_jax.sampling.generator import Generator

COMMANDS = [command for path in PAGES for command in docs_kit.commands(path)]
PROGRAMS = sorted({command.module for command in COMMANDS if re.match(r"(lcm_jax|experiments)\.", command.module)})
NO_FLAGS = ("lcm_jax.run.config", "lcm_jax.run.clients", "lcm_jax.run.comfyui")  # they write what docs/ keeps of them
TOOLS = ("pytest", "pip", "venv")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
TEXTS = {name_of(path): path.read_text(encoding="utf-8") for path in PAGES}
DOCS = [name for name in TEXTS if name == "README.md" or name.startswith("docs/")]


class Parsed(Exception):
    """The command line was accepted; of a program that takes a config, with that config."""


@contextlib.contextmanager
def only_parsing():
    """Programs end as soon as their command line is parsed."""
    parse = argparse.ArgumentParser.parse_args

    def parse_args(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    def run(main, argv=None, flags_parser=flags.FLAGS):
        flags_parser(argv or sys.argv)
        raise Parsed(getattr(flags.FLAGS, "config", None))

    with runs.flags_of_one_program(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(app, "run", run)
        patch.chdir(ROOT)
        yield patch


def substituted(arguments: list[str]) -> list[str]:
    """With this repository's examples in place of the reader's own config."""

    def config(found: re.Match) -> str:
        return found[0] if (ROOT / found[1]).is_file() else "--config=configs/shapes_lcm.py"

    words = [word.replace("--config=$CONFIG", "--config=configs/my_sdxl_24gb.py") for word in arguments]
    return [re.sub(r"^--config=((?:configs/)?my_\w+\.py|CONFIG|\.\.\.)$", config, word) for word in words]


def accepted(module: str, arguments: list[str], capsys) -> Parsed:
    with only_parsing() as patch:
        patch.setattr(sys, "argv", [module, *substituted(arguments)])
        try:
            with pytest.raises((Parsed, SystemExit)) as raised:
                runpy.run_module(module, run_name="__main__")
        except ModuleNotFoundError as error:
            pytest.skip(f"{module} needs {error.name}")
    assert raised.type is Parsed, capsys.readouterr().err
    return raised.value


# Programs are run as `python -m` does, though tests have imported some of them.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("module", PROGRAMS)
def test_commands_of_a_program_are_accepted(module, capsys):
    """By its own parser: flags, their values, config files and keys."""
    found = [command for command in COMMANDS if command.module == module]
    assert importlib.util.find_spec(module) is not None
    if module in NO_FLAGS:
        return
    for arguments in {tuple(command.arguments) for command in found if command.arguments or command.in_block}:
        accepted(module, list(arguments), capsys)


# Devices that the commands of a page are for, where no --topology says it.
DEVICES = {"docs/clusters.md": 32, "docs/tpu.md": 16}
STEPS = [
    command
    for command in COMMANDS
    if command.module in ("lcm_jax.train", "lcm_jax.aot") and command.in_block and "..." not in command.words
]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
@pytest.mark.parametrize("command", STEPS, ids=str)
def test_the_runs_of_commands_may_start(command: Command, capsys):
    """The config with the command's values is a valid run, whose batch splits over its devices."""
    (config,) = accepted(command.module, command.arguments, capsys).args
    training = command.module == "lcm_jax.train"
    config_lib.validate(config, models=training, data=training)
    flag = dict(word.removeprefix("--").partition("=")[::2] for word in command.arguments)
    devices = DEVICES.get(command.page, 1)
    if flag.get("topology", "cpu") != "cpu":
        devices = chips.of_topology(flag["topology"])[1]
    if "fit" not in flag:  # which looks for a batch itself
        assert config.data.batch_size % (devices * config.train.accumulation_steps) == 0


@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_wrong_flag_and_a_wrong_key_are_noticed(capsys):
    with pytest.raises(AssertionError, match="--stepz"):
        accepted("lcm_jax.sample", ["--model=a", "--out=b", "--stepz=4"], capsys)
    with pytest.raises(AssertionError, match="learning_rat"):
        accepted("lcm_jax.train", ["--config=configs/shapes_lcm.py", "--config.train.learning_rat=1"], capsys)


def test_there_are_commands_of_every_program_and_other_modules_exist():
    programs = {
        path.stem for path in (ROOT / "lcm_jax").glob("*.py") if 'if __name__ == "__main__"' in path.read_text()
    }
    shown = {module.removeprefix("lcm_jax.") for module in PROGRAMS if module.startswith("lcm_jax.")}
    assert programs <= shown and {"train", "sample", "export"} <= programs
    for command in COMMANDS:
        if command.module and command.module not in PROGRAMS:
            assert command.module.split(".")[0] in TOOLS, command
        if command.module == "pytest":
            for word in command.arguments:
                assert not word.startswith("tests/") or (ROOT / word.partition("::")[0]).is_file(), command


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.words[0] == "make"], ids=str)
def test_targets_and_variables_of_make(command: Command):
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    for word in command.words[1:]:
        name, is_set, _ = word.partition("=")
        assert re.search(rf"\b{name}\b", MAKEFILE) if is_set else name in targets, word


def test_extras_and_files_that_are_installed(monkeypatch):
    given = {}
    monkeypatch.setattr("setuptools.setup", given.update)
    runpy.run_path(str(ROOT / "setup.py"))
    for command in COMMANDS:
        if command.words[0] == "pip":
            for extras in re.findall(r"(?:\.|lcm_jax)\[([\w,-]+)\]", command.text):
                assert set(extras.split(",")) <= set(given["extras_require"]), command


FLAG_PAGES = "sampling prompts workflows presets training data export evaluation scaling faq gpu".split()


def test_flags_in_the_text_are_those_of_a_program():
    """On pages that speak of no other program's."""
    known: set[str] = set()
    for module in ("sample", "evaluate", "export", "app"):
        parser = importlib.import_module(f"lcm_jax.{module}").parser()
        known |= {option for action in parser._actions for option in action.option_strings}
    source = "".join(
        (ROOT / "lcm_jax" / f"{name}.py").read_text() for name in ("train", "aot", "precompute", "inspect")
    )
    source += (ROOT / "lcm_jax" / "runtime" / "distributed.py").read_text()
    known |= {f"--{name}" for name in re.findall(r'DEFINE_\w+\(\s*"(\w+)"', source)} | {"--help", "--config"}
    known |= {f"--no-{option[2:]}" for option in known}
    for page in FLAG_PAGES:
        for span in docs_kit.spans(TEXTS[f"docs/{page}.md"]):
            if re.match(r"--[a-z]", span):
                for flag in re.findall(r"(?<!\S)(--[a-z_]+)", span):
                    assert flag in known, (page, span)


def test_keys_in_the_text_are_those_of_the_config():
    names = {key.name for key in KEYS}
    sections = "|".join(sorted({name.partition(".")[0] for name in names if "." in name}))
    key = re.compile(rf"(?:--config\.|config\.)?((?:{sections})\.(?!py\b|json|md\b|jsonl)[a-z_]+)(?:\s*=.*)?")
    found = 0
    for page in DOCS:
        for span in docs_kit.spans(TEXTS[page]):
            if match := key.fullmatch(" ".join(span.split())):
                found += 1
                assert match[1] in names, (page, span)
    assert found > 50


@pytest.mark.parametrize("page", TEXTS)
def test_links_lead_somewhere(page):
    for target in docs_kit.links(ROOT / page):
        path, _, anchor = target.partition("#")
        there = (ROOT / page).parent / path if path else ROOT / page
        assert there.exists(), target
        if anchor:
            assert anchor in docs_kit.anchors(there), target


TOP = "lcm_jax|experiments|configs|tests|docs|notebooks"


@pytest.mark.parametrize("page", TEXTS)
def test_files_in_the_text_are_there(page):
    """Paths from the repository's root; and dotted names of functions, where they have a room, a module and a name."""
    for span in docs_kit.spans(TEXTS[page]):
        if re.fullmatch(rf"(?:{TOP})/[\w./*-]+", span):
            assert list(ROOT.glob(span.rstrip("/"))), span


@pytest.mark.parametrize("page", DOCS)
def test_code_in_python_is_of_this_package(page):
    """It compiles; what it imports of lcm_jax exists, and calls of a model's methods have their arguments."""
    for language, code in docs_kit.blocks(TEXTS[page]):
        if language != "python":
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lcm_jax"):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name) or importlib.util.find_spec(f"{node.module}.{alias.name}"), code
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name):
                called = ast.unparse(node.func)
                if called.startswith("lcm_jax."):
                    of = getattr(lcm_jax, called.partition(".")[2])
                elif "def " not in code and (called == "model" or called.startswith("model.")):
                    of = getattr(Generator, called.partition(".")[2] or "__call__")
                else:
                    continue
                first = [None] if called.startswith("model") else []
                inspect.signature(of).bind(*first, *node.args, **{word.arg: None for word in node.keywords})


# Method: equations and functions.

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXTS["docs/method.md"].split("\n")
    if re.match(r"\|.*\|.*\| `\w+\.\w+\.\w+`", line)
]


def functions(cell: str) -> list[tuple[object, str]]:
    """(function, source of its module) of each dotted name."""
    found = []
    for name in re.findall(r"`([\w.]+)`", cell):
        module, _, attribute = f"lcm_jax.{name}".rpartition(".")
        module = importlib.import_module(module)
        found.append((getattr(module, attribute), " ".join(inspect.getsource(module).split())))
    return found


def test_equations_have_functions_whose_modules_cite_them():
    assert len(ROWS) > 20
    for _, cited, names in ROWS:
        for function, source in functions(names):
            assert callable(function)
            author, _, where = cited.partition(", ")
            for part in re.findall(r"[A-Z][\w-]+(?: et al\. | & [A-Z]\w+ )\d{4}", author):
                assert part in source, (cited, names)
            number = re.search(r"(equations?|algorithm|section) [\d.]+(?: to \d+)?", where)
            assert not number or number[0] in source.lower(), (cited, names)


def test_cited_equations_have_a_row():
    """Those of diffusion and distill: the other way."""
    cited = {}
    for _, source, names in ROWS:
        for name in re.findall(r"`([\w.]+)`", names):
            cited.setdefault(name.rpartition(".")[0], set()).update(
                re.findall(r"(?:equation|algorithm|section)s? [\d.]+\d|(?:equation|algorithm)s? \d+", source)
            )
    for path in sorted((ROOT / "lcm_jax").glob("di*/*.py")):
        module = f"{path.parent.name}.{path.stem}"
        text = " ".join(path.read_text().split()).lower()
        for found in re.findall(r"(?:equations?|algorithm|section) \d+(?:\.\d+)?", text):
            assert found in {one.lower() for one in cited.get(module, ())}, (module, found)


# Numbers.


def rows_of(page: str, heading: str) -> list[list[str]]:
    """Cells of the first table after a text."""
    table = re.search(r"(?:^\|.*\n)+", TEXTS[page][TEXTS[page].index(heading) :], re.MULTILINE)[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().split("\n")][2:]


def results(path: str) -> dict:
    return json.loads((ROOT / path).read_text())


def test_readme_is_short():
    text = TEXTS["README.md"]
    assert len(text.splitlines()) <= 150 and len(text.split()) <= 1100


METHODS = {"teacher": ("DDIM", 2), "teacher without guidance": ("DDIM", 1), "LCM": ("LCM", 2)}


def test_results_in_the_readme_are_the_stored_ones():
    stored = results("experiments/shapes_lcm/table.json")["rows"]
    rows = rows_of("README.md", "## Results")
    assert len(rows) == 7
    for name, steps, evaluations, accuracy, frechet, coverage in rows:
        method, scale = METHODS[name]
        (row,) = (
            one for one in stored if (one["method"], one["steps"], one["guidance_scale"]) == (method, int(steps), scale)
        )
        assert int(evaluations) == row["evaluations"]
        assert accuracy == f"{100 * row['accuracy']:.1f} %" and coverage == f"{row['coverage']:.3f}"
        assert abs(float(frechet) - row["frechet"]) <= 0.51


SPEED = {
    "embedded model, 4 steps, one image": "sample-shapes-64-b1-float32",
    "its training step, batch 8": "lcd-shapes-64-b8-float32",
    "one pass of SD 1.5's UNet at 512 pixels": "unet-sd15-512-b1-float32",
}


def test_speed_in_the_readme_is_the_stored_one():
    stored = results("experiments/speed/results/amd-epyc-2-cores.json")["workloads"]
    rows = rows_of("README.md", "its time over ours")
    assert {row[0] for row in rows} == set(SPEED)
    for name, eager, compiled in rows:
        ways = stored[SPEED[name]]["torch"]
        assert eager == f"{ways['eager']['ratio']:.2f}" and compiled == f"{ways['compile']['ratio']:.2f}"


def report(name: str) -> dict:
    return results(f"experiments/aot/rows/{name}.json")["report"]


def test_modelled_memory_in_the_readme_is_that_of_the_rows():
    for name in ("config-my_sd15_24gb", "config-my_sdxl_24gb", "config-sd15_lcm", "sd15-v5e-16", "sdxl-a100-80"):
        assert f"{report(name)['memory']['needed'] / 2**30:.1f}" in TEXTS["README.md"], name
    for name in ("sd15_lora-rtx4090", "sdxl_lora-rtx4090"):
        assert f"{report(name)['memory']['needed'] / 2**30:.1f} GiB" in TEXTS["docs/faq.md"], name


def test_modelled_steps_are_those_of_the_rows():
    rows = rows_of("docs/training.md", "| step of | card")
    assert len(rows) == 7
    for name, card, images, memory, seconds, steps, minutes in rows:
        config = re.match(r"`(\w+)`", name)[1]
        found = report(f"config-{config}")
        length = runpy.run_path(str(ROOT / "configs" / f"{config}.py"))["get_config"]().train.steps
        times = [found["seconds"][which] for which in ("roofline", "serial")]
        assert card == found["chip"]["name"] and images == f"{found['images_per_device']:g}" and steps == f"{length:,}"
        assert memory == " of ".join(f"{found['memory'][which] / 2**30:.1f}" for which in ("needed", "available"))
        assert seconds == " to ".join(f"{one:.2f}" for one in times)
        assert minutes == " to ".join(f"{one * length / 60:.0f}" for one in times)


def test_figures(tmp_path):
    """The drawing is what the code draws; the others are there, from rows that are there, and shown on a page."""
    shown = " ".join(TEXTS.values())
    for name, (file, _) in figures.FIGURES.items():
        assert (ROOT / "docs" / "figures" / file).stat().st_size > 1000 and f"figures/{file}" in shown, name
    assert (ROOT / "docs" / "figures" / "batch.svg").read_text() == figures.batch()
    for name in [*figures.MEMORY, *(row for rows in figures.CHIPS.values() for row in rows)]:
        assert figures.read_row(name), name
    with pytest.raises(BadArgument, match="only=moon: choose of batch, memory"):
        figures.main(["--only=moon", f"--out={tmp_path}"])


def test_tpus_have_the_rows_numbers():
    rows = rows_of("docs/tpu.md", "| on 16 chips")
    assert len(rows) == 6
    for name, images, memory, speed, best, serial in rows:
        model, chip = "sdxl" if "SDXL" in name else "sd15", re.search(r"v\d\w", name)[0]
        found = report(f"{model}-{chip}-16")
        assert images == f"{found['images_per_device']:g}" and speed == f"{found['images_per_second_per_device']:.1f}"
        assert memory == f"{found['memory']['needed'] / 2**30:.1f} of {found['chip']['hbm_bytes'] / 2**30:.1f}"
        assert [best, serial] == [f"{100 * found[key]:.0f} %" for key in ("utilisation", "serial_utilisation")]


def test_the_worked_roofline_is_that_of_its_row():
    text, found, other = TEXTS["docs/scaling.md"], report("sd15-v5e-16"), report("sd15-v6e-16")
    chip, seconds = found["chip"], found["seconds"]
    each = found["model_flops"] / found["images_per_device"]
    total, moved = found["flops"]["total"], found["bytes"]["total"]
    said = [
        f"F = {each / 6 / 1e12:.2f} TFLOP",
        f"6 F = {each / 1e12:.2f} TFLOP",
        f"T_flops = {found['model_flops'] / 1e12:.1f}e12 / {chip['peak_flops'] / 1e12:.0f}e12 = ",
        f"= {1e3 * found['model_flops'] / chip['peak_flops']:.0f} ms",
        f"T_hbm = {moved / 1e9:.1f}e9 / {chip['hbm_bandwidth'] / 1e9:.0f}e9 = {1e3 * seconds['hbm']:.0f} ms",
        f"T_links = {found['link_bytes'] / 1e9:.2f}e9 / {chip['link_bandwidth'] / 1e9:.0f}e9 = "
        f"{1e3 * seconds['links']:.0f} ms",
        f"{total / moved:.0f} FLOPs a byte",
        f"= {chip['peak_flops'] / chip['hbm_bandwidth']:.0f}: to the right",
        f"= {found['images_per_second_per_device']:.1f} images/s",
        f"it takes {1e3 * seconds['serial']:.0f} ms: utilisation {100 * found['serial_utilisation']:.0f} %",
        f"ridge is {other['chip']['peak_flops'] / other['chip']['hbm_bandwidth']:.0f}",
        f"{other['flops']['total'] / other['bytes']['total']:.0f} FLOPs a byte",
        f"memory at {1e3 * other['seconds']['hbm']:.0f} ms",
        f"utilisation cannot exceed {100 * other['utilisation']:.0f} %",
    ]
    for one in said:
        assert one in " ".join(text.split()), one
