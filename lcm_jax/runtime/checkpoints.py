"""Checkpoints of a run: saved in the background, digested, verified, restored strictly; one folder per step.

    checkpoints/<step>/state          the arrays (orbax, OCDBT)
    checkpoints/<step>/extra          JSON, small things that belong to the step
    checkpoints/<step>/metrics.json   what the step was worth, where it was told
    checkpoints/<step>/digests.json   runtime/checkpoints/digests.py
    checkpoints/<step>.damaged        was found damaged; kept for its owner, never read again
    checkpoints/.<step>.partial       being written

The state is stored as a tree of plain dicts named by its key paths (`params/conv_in/kernel`, `opt_state/0/mu/...`), so
that a checkpoint can be read without the classes that made it. A folder gets its plain number only when all is on disk
and digested, by one rename; only then older ones go, each by a rename first. So a run that is killed anywhere loses the
checkpoint it was writing and no other, and the next run removes what was left lying.

Orbax keeps no checksum of array bytes: a flipped bit would be restored as a weight. So all files are compared with
their digests first. Names, shapes and dtypes are then compared with what is expected before any array is read: orbax by
itself would cast a dtype in silence, and a run that restarts from fresh weights because a restore failed is worse than
one that stops.

On several processes every method is called by all of them, with the same arguments; the first one digests, verifies and
decides for all.

The folder `checkpoints/`: which steps it holds, which of them are whole, which may go. Files only, no arrays.

On several processes the functions that change something are for the first one.

A digest of every file of a folder, written last: what is read is what was written, or it is said which file is not.

    digests.json    {"files": {"state/manifest.ocdbt": {"bytes": 114, "sha256": "9f86..."}, ...},
                     "sha256": that of "files" as json.dumps writes it}

Only the files that are listed are looked at; one that someone or a file system (.nfs...) put beside them later is not.

Trees of arrays by names: `params/conv_in/kernel`; and how two of them differ, in words.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent import futures
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from lcm_jax import files
from lcm_jax.errors import LcmError
from lcm_jax.runtime import distributed as agreement
from lcm_jax.runtime import waiting

_LOOK = 1  # seconds between two looks at whether another process has failed


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _state_metadata(folder: Path, step: int) -> Any:
    """Tree of things with .shape and .dtype, without reading arrays."""
    path = folder / str(step)
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree
        if not jax.tree.leaves(tree):
            raise ValueError("no arrays in it")
        return tree
    except Exception as error:  # orbax raises many kinds for a folder that is not whole
        raise unreadable(path, error) from error


def load_subtree(folder: str | os.PathLike[str], step: int, name: str) -> dict[str, Any]:
    """One part of a saved state ("params", "ema_params") as nested dicts of numpy arrays, without the rest.

    Args:
        folder: the `checkpoints` folder.
        step: one of `list_steps(folder)`.
        name: first level of the state's tree, or several joined by "/".

    Raises:
        LcmError: no such checkpoint, no such part, or a folder that is damaged or cannot be read.
    """
    folder = Path(folder).absolute()
    check_present(folder, step, list_steps(folder))
    check_whole(folder, step, "state/")
    saved = named_leaves(_state_metadata(folder, step))
    wanted = {key: leaf for key, leaf in saved.items() if key.startswith(f"{name}/")}
    if not wanted:
        parts = sorted({key.split("/")[0] for key in saved})
        raise LcmError(f"checkpoint {folder / str(step)} has no part {name!r}; it has {', '.join(parts)}")
    item = nest({key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in wanted.items()})
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    try:
        tree = ocp.PyTreeCheckpointHandler().restore(
            folder / str(step) / "state",
            args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True),
        )
    except Exception as error:
        raise unreadable(folder / str(step), error) from error
    for part in name.split("/"):
        tree = tree[part]
    return tree


class Checkpoints:
    """The checkpoints of one run; a context manager, which waits for the last save.

    Attributes:
        whole: the newest step that is known to be on disk; None: there is none.

    Args:
        folder: workdir / "checkpoints"; created. What killed runs left there is removed.
        keep: how many of the newest stay, 1 or more.
        keep_every: checkpoints of steps that it divides stay for ever; 0: none.
        best: name of a metric; the checkpoint where it was lowest stays, too. "": none.

    Raises:
        LcmError: `folder` cannot be made, or not all processes see it.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3, keep_every: int = 0, best: str = "") -> None:
        self.folder = Path(folder).absolute()
        self._keep, self._keep_every, self._best = keep, keep_every, best
        if jax.process_count() > 1:
            agreement.check_shared(self.folder)
        # step -> metric; the same on all processes at all times, so that they always take the same way
        found = agreement.decided_by_first(lambda: tidy(self.folder, best))
        self._steps: dict[int, float | None] = {step: metric for step, metric in found}
        self.whole = max(self._steps, default=None)
        self._saver = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), async_options=ocp.AsyncOptions(timeout_secs=agreement.TIMEOUT)
        )
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        # step, those that go after it, what is under way, key under which the processes tell of it
        self._pending: tuple[int, list[int], futures.Future, str] | None = None
        self._stuck = False  # threads wait for a process that does not come

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.close()
        except LcmError:
            if kind is None:  # an error already on its way matters more
                raise

    def steps(self) -> list[int]:
        """Steps on disk, ascending, and the one that is being saved."""
        return sorted(self._steps)

    def latest_step(self) -> int | None:
        """Newest of `steps()`, None if there is no checkpoint."""
        return max(self._steps, default=None)

    def save(
        self, step: int, state: Any, extra: Mapping[str, Any] | None = None, metrics: Mapping[str, Any] | None = None
    ) -> bool:
        """Begins to save `state` (any pytree of arrays). False if that step or a later one is there already.

        Returns once the arrays are copied, so that the caller may donate them; writing and digests go on in the
        background. It waits for a save before it; an error of that one shows up at the next `save`, `wait` or `close`.

        Args:
            step: names the folder.
            state: any pytree of arrays.
            extra: JSON, comes back from `extra`.
            metrics: scalars by name; with `best`, its metric must be among them. NaN is never the best.

        Raises:
            LcmError: this or the save before failed; `metrics` without the metric that `best` names.
        """
        if metrics is not None and self._best and self._best not in metrics:
            raise LcmError(
                f"config.checkpoint.best = {self._best!r} is no metric of this run; choose one of "
                f"{', '.join(sorted(metrics))}"
            )
        self.wait()
        if step <= max(self._steps, default=step - 1):
            return False
        tree = nest({name: _as_array(leaf) for name, leaf in named_leaves(state).items()})
        values = {name: float(value) for name, value in (metrics or {}).items()}
        partial = self.folder / f".{step}.partial"
        with self._readable_errors(f"saving checkpoint {step}"):
            if jax.process_index() == 0:
                begun(self.folder, step).touch()  # now, while orbax makes its folder some time later
            self._saver.save(
                partial,
                force=True,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree), extra=ocp.args.JsonSave(dict(extra or {}))),
            )
        self._steps[step] = values.get(self._best)
        doomed = sorted(self._steps.keys() - kept(self._steps, self._keep, self._keep_every))
        key = agreement.barrier(f"checkpoint {step}")
        self._pending = step, doomed, self._thread.submit(self._finish, step, partial, values, doomed, key), key
        return True

    def check(self) -> None:
        """Raises the error of a save that failed in the background; for every step of a loop, it waits for nothing.

        One of several processes does not raise here, where the others would begin another step without it: all of them
        are asked to stop (`StopSignal.agreed`), and raise where they save or wait after that.

        Raises:
            LcmError: the last save failed.
        """
        if jax.process_count() == 1 and self._pending is not None and self._pending[2].done():
            self.wait()

    def restore(self, expected: Any, step: int | None = None) -> Any:
        """The state of `step`, or of the newest undamaged checkpoint, in the structure of `expected`.

        Newer ones that are damaged are named on stderr and put aside (`<step>.damaged`): `steps()` ends with the one
        that was restored. Where all are damaged nothing is touched.

        Args:
            expected: pytree of arrays or ShapeDtypeStructs; a sharding on a leaf says where it goes, others go to the
                first device. Mesh and process count need not be those of the saving run.
            step: one of `steps()`; if it is damaged, no other is taken.

        Raises:
            LcmError: nothing to restore, nothing undamaged, a folder that cannot be read, or any difference of names,
                shapes or dtypes.
        """
        self.wait()
        if step is None:
            step = agreement.decided_by_first(lambda: newest_whole(self.folder))
            self._steps = {other: metric for other, metric in self._steps.items() if other <= step}
            self.whole = step
        else:
            check_present(self.folder, step, self.steps())
            agreement.decided_by_first(lambda: check_whole(self.folder, step))
        path = self.folder / str(step)
        different = difference(_state_metadata(self.folder, step), expected)
        if different:
            raise LcmError(
                f"checkpoint {path} does not fit this run: {different}. Use the config it was made with, "
                "or another workdir"
            )
        default = SingleDeviceSharding(jax.devices()[0])
        target = nest(
            {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)
                for name, leaf in named_leaves(expected).items()
            }
        )
        try:
            restored = self._saver.restore(
                path,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeRestore(
                        target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
                    )
                ),
            ).state
        except Exception as error:
            raise unreadable(path, error) from error
        leaves = named_leaves(restored)
        return jax.tree.unflatten(jax.tree.structure(expected), [leaves[name] for name in named_leaves(expected)])

    def extra(self, step: int | None = None) -> dict[str, Any]:
        """The JSON that was saved with `step` (default: the newest). Raises LcmError where it is damaged."""
        self.wait()
        step = self.latest_step() if step is None else step
        check_present(self.folder, step, self.steps())
        check_whole(self.folder, step, "extra/")
        path = self.folder / str(step)
        try:
            return ocp.JsonCheckpointHandler().restore(path / "extra", args=ocp.args.JsonRestore())
        except Exception as error:
            raise unreadable(path, error) from error

    def wait(self) -> None:
        """Returns when everything saved so far is on disk and digested, and what it replaces is gone.

        Raises:
            LcmError: on all processes, where that failed on one of them; the others' part is never waited for then.
        """
        if self._pending is None:
            return
        (step, doomed, future, key), self._pending = self._pending, None
        with self._readable_errors(f"saving checkpoint {step}"):
            try:
                waiting.wait(
                    lambda _: futures.wait([future], _LOOK).done,
                    lambda: f"checkpoint {step}, which is being written to {self.folder}",
                    check=lambda: future.done() or self._check_others(key),
                )  # its own error goes first
                future.result()
            except BaseException:
                del self._steps[step]
                raise
        self.whole = step
        for old in doomed:
            del self._steps[old]

    def close(self) -> None:
        """Waits and frees threads. The object is of no use afterwards.

        Threads that wait for a process that failed are left to themselves; `distributed.exit_code` ends them.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown(wait=not self._stuck)
            if not self._stuck:
                with self._readable_errors("closing the checkpoints"):
                    self._saver.close()

    def _check_others(self, key: str) -> None:
        if said := agreement.given_up(key):
            self._stuck = True
            raise LcmError(said)

    def _finish(self, step: int, partial: Path, metrics: Mapping[str, float], doomed: list[int], key: str) -> None:
        """In the background: from written arrays to a complete checkpoint, and only then away with older ones."""
        try:
            self._saver.wait_until_finished()  # of all processes
            if jax.process_index() == 0:
                if metrics:
                    files.write_text(partial / METRICS_FILE, json.dumps(metrics))
                write(partial)
                os.rename(partial, self.folder / str(step))
                begun(self.folder, step).unlink()
                files.sync_folder(self.folder)
                for old in doomed:
                    remove(self.folder, old)
        except BaseException as error:
            # The others are in orbax's barriers or in the one below, where this process would wait as long as they.
            agreement.give_up(key, self._readable(f"saving checkpoint {step}", error))
            raise
        agreement.wait_for_all(key)  # nobody leaves, or waits in a collective, while process 0 digests

    @contextlib.contextmanager
    def _readable_errors(self, doing: str) -> Iterator[None]:
        """Turns whatever orbax raises while it writes into one LcmError; a full disk has many names."""
        try:
            yield
        except LcmError:
            raise
        except Exception as error:
            raise self._readable(doing, error) from error

    def _readable(self, doing: str, error: BaseException) -> LcmError:
        return LcmError(
            f"{doing} in {self.folder} failed ({short(error)}); free disk space or choose another "
            "workdir, then give the same command again. Earlier checkpoints are whole"
        )


METRICS_FILE = "metrics.json"
# What a killed run leaves; the last is what orbax alone named so.
_LEFT_OVER = re.compile(r"\.\d+\.(partial|removed)|\.seen-|\d+\.orbax-checkpoint-tmp")


def short(error: BaseException) -> str:
    """An error of orbax, which can have pages, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def unreadable(path: Path, error: BaseException) -> LcmError:
    """The checkpoint `path` may be whole, but reading it failed."""
    return LcmError(
        f"checkpoint {path} cannot be read ({short(error)}); try again, or move that folder elsewhere "
        "to go on from the checkpoint before it"
    )


def list_steps(folder: str | os.PathLike[str]) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending; [] if there is no such folder."""
    folder = Path(folder)
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir()) if folder.is_dir() else []


def find_damage(folder: Path, step: int, under: str = "") -> str | None:
    """What is wrong with the checkpoint of `step`, or with its part `under`, in words; None: it is as it was written.

    Raises:
      LcmError: a file of it cannot be read.
    """
    path = folder / str(step)
    try:
        return damage_in(path, under)
    except OSError as error:
        raise unreadable(path, error) from error


def _say(line: str) -> None:
    print(f"WARNING: {line}", file=sys.stderr, flush=True)


def check_present(folder: Path, step: int | None, steps: list[int]) -> None:
    """Raises LcmError unless `step` is among `steps`."""
    if step not in steps:
        wanted = "" if step is None else f" of step {step}"
        raise LcmError(f"no checkpoint{wanted} in {folder}; present: {_list(steps)}")


def check_whole(folder: Path, step: int, under: str = "") -> None:
    """Raises LcmError where a checkpoint, or its part `under`, is damaged or cannot be read."""
    damage = find_damage(folder, step, under)
    if damage:
        others = [other for other in list_steps(folder) if other != step]
        raise LcmError(f"checkpoint {folder / str(step)} is damaged: {damage}; use another step: {_list(others)}")


def _list(steps: list[int]) -> str:
    return ", ".join(map(str, steps)) or "none"


def kept(steps: Mapping[int, float | None], keep: int, keep_every: int = 0) -> set[int]:
    """Of {step: metric or None}: the newest `keep`, those that `keep_every` divides, and the one of the lowest metric.

    Of equal metrics the newest counts; None and NaN are no metric. `keep_every` 0: none.
    """
    values = {step: value for step, value in steps.items() if value is not None and not math.isnan(value)}
    best = [min(values, key=lambda step: (values[step], -step))] if values else []
    return {*sorted(steps)[-keep:], *(step for step in steps if keep_every and step % keep_every == 0), *best}


def tidy(folder: Path, best: str = "") -> list[tuple[int, float | None]]:
    """Makes the folder, removes what killed runs left; (step, its metric `best`) of the checkpoints there.

    Raises:
      LcmError: the folder cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LcmError(f"{folder} cannot be made ({error.strerror}); choose another workdir") from error
    for path in list(folder.iterdir()):
        if _LEFT_OVER.match(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [(step, _metric(folder, step, best)) for step in list_steps(folder)]


def _metric(folder: Path, step: int, best: str) -> float | None:
    path = folder / str(step) / METRICS_FILE
    if not best or not path.exists():
        return None
    try:
        return json.loads(path.read_bytes()).get(best)
    except (OSError, ValueError, AttributeError) as error:
        _say(f"{path} cannot be read ({short(error)}); that checkpoint does not count as the best")
        return None


def begun(folder: Path, step: int) -> Path:
    """A mark that the checkpoint of `step` is being written; removed when it is there, or by the next run."""
    return folder / f".{step}.partial.begun"


def remove(folder: Path, step: int) -> None:
    """Away with a checkpoint; its number goes first, so that nobody takes half of it for whole."""
    aside = folder / f".{step}.removed"
    with contextlib.suppress(FileNotFoundError):  # its owner was quicker
        os.rename(folder / str(step), aside)
    shutil.rmtree(aside, ignore_errors=True)  # a reader may hold a file open (NFS); the next run removes it then


def newest_whole(folder: Path) -> int:
    """The newest undamaged step. Damaged ones that are newer are named on stderr and put aside.

    Raises:
      LcmError: there is no checkpoint, a file cannot be read, or all are damaged; then nothing is touched.
    """
    steps, damage = list_steps(folder), {}
    check_present(folder, max(steps, default=None), steps)
    for step in reversed(steps):
        found = find_damage(folder, step)
        if not found:
            break
        damage[step] = found
    else:
        listed = "; ".join(f"{step}: {found}" for step, found in damage.items())
        raise LcmError(
            f"every checkpoint in {folder} is damaged ({listed}); bring back a copy, or choose "
            "another workdir to begin anew"
        )
    for bad, found in damage.items():
        path = folder / str(bad)
        names = (path.with_name(f"{bad}.damaged{n or ''}") for n in itertools.count())
        aside = next(name for name in names if not name.exists())
        os.rename(path, aside)
        _say(f"checkpoint {path} is DAMAGED: {found}. It is {aside.name} now; going on from step {step}")
    return step


FILE = "digests.json"
# Files hashed at a time when a folder is verified. Writing takes one thread only: it runs beside the training.
THREADS = min(8, os.cpu_count() or 1)


def write(folder: Path) -> None:
    """Makes all files under `folder` last on the disk, and then digests.json of them."""
    entries = {}
    for place, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            path = Path(place, name)
            entries[path.relative_to(folder).as_posix()] = _entry(path)
        files.sync_folder(Path(place))
    with files.new_file(folder / FILE) as partial:
        partial.write_text(json.dumps({"files": entries, "sha256": _of_entries(entries)}, indent=1) + "\n")


def damage_in(folder: Path, under: str = "") -> str | None:
    """What is wrong with the files of `folder` whose names begin with `under`: the first problem in words, else None.

    Raises:
      OSError: a file is there and cannot be read, which is no word on what it holds.
    """
    try:
        content = json.loads((folder / FILE).read_bytes())
        entries = content["files"]
        if content["sha256"] != _of_entries(entries):
            raise ValueError
    except FileNotFoundError:
        return f"{FILE} is missing"
    except (ValueError, KeyError, TypeError):
        return f"{FILE} is not as it was written"
    expected = {name: entry for name, entry in entries.items() if name.startswith(under)}
    if not expected:
        return f"{FILE} lists no file{f' of {under}' if under else ''}"
    for name, entry in expected.items():  # cheap, and tells more: before anything is hashed
        path, size = folder / name, entry["bytes"]
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size} bytes, {size} were written"
    with ThreadPoolExecutor(THREADS) as pool:
        found = pool.map(lambda name: _sha256(folder / name), expected)
        for (name, entry), actual in zip(expected.items(), found, strict=True):
            if actual != entry["sha256"]:
                return f"the content of {name} is not what was written"
    return None


def _entry(path: Path) -> dict[str, int | str]:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _of_entries(entries: dict) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


# Differences that are listed; a wrong model differs everywhere.
MOST_LISTED = 8


def named_leaves(tree: Any) -> dict[str, Any]:
    """{"params/conv_in/kernel": leaf}: key paths joined by "/"; works on any pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": 1} -> {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def difference(saved: Any, expected: Any) -> str:
    """Names, shapes and dtypes (of anything that has them) wherein two trees differ, on one line; "" if they do not."""
    there, here = named_leaves(saved), named_leaves(expected)
    lines = []
    for name in sorted(there.keys() | here.keys()):
        if name not in there:
            lines.append(f"{name}: not in the checkpoint, expected {_describe(here[name])}")
        elif name not in here:
            lines.append(f"{name}: {_describe(there[name])} in the checkpoint, not expected")
        elif _describe(there[name]) != _describe(here[name]):
            lines.append(f"{name}: {_describe(there[name])} in the checkpoint, expected {_describe(here[name])}")
    more = [f"and {len(lines) - MOST_LISTED} more"] if len(lines) > MOST_LISTED else []
    return "; ".join(lines[:MOST_LISTED] + more)


def _describe(leaf: Any) -> str:
    """float32[3,4]"""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"
