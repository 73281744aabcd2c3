"""The process of a row that is loaded and sampled: first `ours`, then `theirs`, which then has the whole device.

python -m experiments.acceptance.check CASE --out=DIR     CASE: the fields of `cases.Case` as JSON
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from experiments.acceptance import cases
from lcm_jax.ending import exit_code
from lcm_jax.errors import LcmError

SIDES = ("experiments.acceptance.ours", "experiments.acceptance.theirs")


def arguments() -> tuple[cases.Case, Path]:
    """The row and the folder of the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("case")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    return cases.of_json(json.loads(args.case), "the row"), args.out


def main() -> int:
    """Raises LcmError: something is not as it should be, once all of it has been looked at."""
    case, out = arguments()
    cases.keep(out, case.name, {})
    alone = case.refuses or case.without_diffusers or not case.steps
    for side in SIDES[: 1 if alone else 2]:
        if code := subprocess.run([sys.executable, "-m", side, *sys.argv[1:]]).returncode:
            if code < 0:
                raise LcmError(f"signal {-code} ended it; 9 is usually that of too little host memory")
            return code
    found = json.loads(cases.path_of(out, case.name).read_text())
    if case.without_diffusers:
        found["diffusers"] = {"skipped": case.without_diffusers}
        cases.keep(out, case.name, found)
    wrong = list(found.get("wrong", ()))
    if not found.get("diffusers", {}).get("same", True):
        images = found["diffusers"]["images"]
        listed = ", ".join(f"{one['largest']} of 255 in {one['steps']} steps ({one['share']:.2%})" for one in images)
        wrong.append(f"images differ from diffusers' by {listed}")
    if wrong:
        raise LcmError("; ".join(wrong))
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main, left="the row is begun anew by the same command"))
