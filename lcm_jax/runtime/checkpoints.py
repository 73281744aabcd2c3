"""Checkpoints of a run: saved in the background, verified by digests, restored strictly; one folder per step.

    checkpoints/<step>/state          the arrays (orbax, OCDBT)
    checkpoints/<step>/extra          JSON: small things that belong to the step
    checkpoints/<step>/metrics.json   metrics of the step, if `save` was given any
    checkpoints/<step>/digests.json   {"files": {"state/manifest.ocdbt": {"bytes": 114, "sha256": "9f86..."}, ...},
                                       "sha256": of "files" as json.dumps writes it}
    checkpoints/<step>.damaged        was found damaged; kept for its owner, never read again
    checkpoints/.<step>.partial       being written; .<step>.partial.begun: this has begun
    checkpoints/.<step>.removed       being removed

The state is stored as a tree of plain dicts, named by its key paths (`params/conv_in/kernel`, `opt_state/0/mu/...`), so
that a checkpoint can be read without the classes that made it. A folder gets its plain number, by one rename, only when
everything is on disk and digested; only then are older ones removed, each by a rename first. A run that is killed at
any moment therefore loses the checkpoint that it was writing and no other; the next run removes the remains.

Orbax keeps no checksum of array bytes: a flipped bit would be restored as a weight. So all files are compared with
their digests first (files that someone added later do not matter). Then names, shapes and dtypes are compared with what
is expected, before any array is read: orbax by itself would cast a dtype silently, and a run that starts again from
fresh weights because a restore failed is worse than one that stops.

With several processes every method is called by all of them, with the same arguments; process 0 digests, verifies and
decides for all.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging as standard_logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from flax.traverse_util import unflatten_dict
from jax.sharding import SingleDeviceSharding

from lcm_jax import files, foreign
from lcm_jax.errors import BadArgument, LcmError
from lcm_jax.runtime import distributed, waiting

METRICS_FILE = "metrics.json"
DIGESTS_FILE = "digests.json"
MOST_LISTED = 8  # differences in an error; a wrong model differs everywhere
_POLL = 1  # seconds between two checks of whether another process has failed
# Files hashed at a time when a folder is verified. Writing uses one thread only, as it runs beside the training.
_THREADS = min(8, os.cpu_count() or 1)
_STEP = re.compile(r"0|[1-9][0-9]{,17}")  # no other spelling of a number, such as 007
# What a killed run leaves; the last is orbax's own name.
_REMAINS = re.compile(r"\.\d+\.(partial|removed)|\.seen-|\d+\.orbax-checkpoint-tmp")


def list_steps(folder: str | os.PathLike[str]) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending; [] if there is no such folder."""
    folder = Path(folder)
    found = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(path.name) for path in found if _STEP.fullmatch(path.name) and path.is_dir())


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
    _check_present(folder, step, list_steps(folder))
    _check_undamaged(folder, step, "state/")
    saved = named_leaves(_saved_shapes(folder, step))
    wanted = {key: leaf for key, leaf in saved.items() if key.startswith(f"{name}/")}
    if not wanted:
        parts = sorted({key.split("/")[0] for key in saved})
        raise LcmError(f"checkpoint {folder / str(step)} has no part {name!r}; it has {', '.join(parts)}")
    item = unflatten_dict({key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in wanted.items()}, "/")
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    with _reading(folder / str(step)) as path:
        tree = ocp.PyTreeCheckpointHandler().restore(
            path / "state", args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True)
        )
    for part in name.split("/"):
        tree = tree[part]
    return tree


class _Save(NamedTuple):
    """A save in the background."""

    step: int
    replaced: list[int]  # steps that are removed after it
    future: futures.Future
    done: distributed.Barrier  # for all processes


def _check_name(folder: Path) -> None:
    """Raises BadArgument if orbax would write to `folder` and read from elsewhere, since it expands its name."""
    if re.search(r"[*?\[\]\\\ud800-\udfff]|(^|/)gs:/", str(folder)):
        problem = "checkpoints cannot be read back from a folder with * ? [ ] \\ gs:/ or no UTF-8 in its name"
        raise BadArgument("workdir", ascii(str(folder.parent)), f"{problem}; choose another")


class Checkpoints:
    """The checkpoints of one run; a context manager, which waits for the last save.

    Attributes:
        whole: the newest step that is known to be on disk; None: there is none.

    Args:
        folder: workdir / "checkpoints"; created. The remains of killed runs are removed.
        keep: number of the newest that are kept, 1 or more.
        keep_every: checkpoints whose step it divides are kept for ever; 0: none.
        best: name of a metric; the checkpoint with its lowest value is kept, too. "": none.

    Raises:
        LcmError: `folder` cannot be created, or not all processes see it.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3, keep_every: int = 0, best: str = "") -> None:
        self.folder = Path(folder).absolute()
        _check_name(self.folder)
        self._keep, self._keep_every, self._best = keep, keep_every, best
        if jax.process_count() > 1:
            distributed.check_shared(self.folder)
        # step -> metric; at all times the same on all processes, so that they always take the same branch
        self._steps: dict[int, float | None] = dict(distributed.broadcast_from_first(lambda: tidy(self.folder, best)))
        self.whole = max(self._steps, default=None)
        _without_pages()
        self._saver = ocp.AsyncCheckpointer(
            ocp.CompositeCheckpointHandler(), async_options=ocp.AsyncOptions(timeout_secs=distributed.TIMEOUT)
        )
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint")
        self._pending: _Save | None = None
        self._stuck = False  # threads wait for a process that will not come

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.close()
        except LcmError:
            if kind is None:  # an error that is on its way already matters more
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
        """Begins to save `state`. Returns False, without saving, if that step or a later one is there already.

        Returns once the arrays are copied, so that the caller may donate them; writing and digests go on in the
        background. Waits for the previous save. An error of this one is raised by the next `save`, `wait` or `close`.

        Args:
            step: names the folder.
            state: any pytree of arrays.
            extra: JSON; `extra` returns it.
            metrics: scalars by name; with `best`, its metric must be among them. NaN is never the best.

        Raises:
            LcmError: this save or the previous one failed; `metrics` without the metric that `best` names.
        """
        if metrics is not None and self._best and self._best not in metrics:
            raise LcmError(
                f"config.checkpoint.best = {self._best!r} is not a metric of this run; choose one of "
                f"{', '.join(sorted(metrics))}"
            )
        self.wait()
        if step <= max(self._steps, default=step - 1):
            return False
        leaves = named_leaves(state).items()
        arrays = {name: leaf if isinstance(leaf, jax.Array) else np.asarray(leaf) for name, leaf in leaves}
        values = {name: float(value) for name, value in (metrics or {}).items()}
        partial = self.folder / f".{step}.partial"
        with self._one_error(f"saving checkpoint {step}"):
            if jax.process_index() == 0:
                partial.with_name(f"{partial.name}.begun").touch()  # now, as orbax creates its folder some time later
            self._saver.save(
                partial,
                force=True,
                args=ocp.args.Composite(
                    state=ocp.args.PyTreeSave(unflatten_dict(arrays, "/")), extra=ocp.args.JsonSave(dict(extra or {}))
                ),
            )
        self._steps[step] = values.get(self._best)
        replaced = sorted(self._steps.keys() - kept(self._steps, self._keep, self._keep_every))
        done = distributed.Barrier(f"checkpoint {step}")
        future = self._thread.submit(self._finish, step, partial, values, replaced, done)
        self._pending = _Save(step, replaced, future, done)
        return True

    def _finish(
        self, step: int, partial: Path, metrics: Mapping[str, float], replaced: list[int], done: distributed.Barrier
    ) -> None:
        """In the background: completes the checkpoint once its arrays are written, and only then removes older ones."""
        try:
            self._saver.wait_until_finished()  # of all processes
            if jax.process_index() == 0:
                if metrics:
                    files.write_text(partial / METRICS_FILE, json.dumps(metrics))
                write_digests(partial)
                os.rename(partial, self.folder / str(step))
                partial.with_name(f"{partial.name}.begun").unlink()
                files.sync_folder(self.folder)
                for old in replaced:
                    _remove(self.folder, old)
        except BaseException as error:
            # The others are in orbax's barriers or in the one below; this process would wait there as long as they do.
            done.give_up(self._save_error(f"saving checkpoint {step}", error))
            raise
        done.wait()  # no process may end, or wait in a collective of devices, while process 0 digests

    def check(self) -> None:
        """Raises the error of a save that failed in the background. Never waits, so it can be called at every step.

        One of several processes does not raise here, because the others would begin another step without it: all of
        them are asked to stop (`StopSignal.agreed`), and raise at their next `save` or `wait`.

        Raises:
            LcmError: the last save failed.
        """
        if jax.process_count() == 1 and self._pending is not None and self._pending.future.done():
            self.wait()

    def wait(self) -> None:
        """Returns when everything saved so far is on disk and digested, and what it replaces is removed.

        Raises:
            LcmError: on all processes, if that failed on one of them; nobody waits for the others' part then.
        """
        if self._pending is None:
            return
        (step, replaced, future, done), self._pending = self._pending, None

        def check_others() -> None:
            if not future.done() and (failure := done.given_up()):  # this process's own error takes precedence
                self._stuck = True
                raise LcmError(failure)

        with self._one_error(f"saving checkpoint {step}"):
            try:
                waiting.wait(
                    lambda _: futures.wait([future], _POLL).done,
                    lambda: f"checkpoint {step}, which is being written to {self.folder}",
                    check=check_others,
                )
                future.result()
            except BaseException:
                del self._steps[step]
                raise
        self.whole = step
        for old in replaced:
            del self._steps[old]

    def restore(self, expected: Any, step: int | None = None) -> Any:
        """The state of `step`, or of the newest undamaged checkpoint, in the structure of `expected`.

        Newer checkpoints that are damaged are reported on stderr and renamed to `<step>.damaged`, so that `steps()`
        ends with the one that was restored. If all are damaged, nothing is renamed.

        Args:
            expected: pytree of arrays or ShapeDtypeStructs; a sharding on a leaf says where it goes, other leaves go to
                the first device. Mesh and process count need not be those of the run that saved it.
            step: one of `steps()`; if it is damaged, no other is restored.

        Raises:
            LcmError: there is no checkpoint, or no undamaged one; a folder cannot be read; names, shapes or dtypes
                differ in any way.
        """
        self.wait()
        if step is None:
            step = distributed.broadcast_from_first(lambda: _newest_undamaged(self.folder))
            self._steps = {other: metric for other, metric in self._steps.items() if other <= step}
            self.whole = step
        else:
            _check_present(self.folder, step, self.steps())
            distributed.broadcast_from_first(lambda: _check_undamaged(self.folder, step))
        path = self.folder / str(step)
        different = difference(_saved_shapes(self.folder, step), expected)
        if different:
            raise LcmError(
                f"checkpoint {path} does not fit this run: {different}. Use the config it was made with, "
                "or another workdir"
            )
        default = SingleDeviceSharding(jax.devices()[0])
        target = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or default),
            unflatten_dict(named_leaves(expected), "/"),
        )
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        with _reading(path):
            restored = self._saver.restore(
                path, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(target, restore_args=restore_args))
            ).state
        leaves = named_leaves(restored)
        return jax.tree.unflatten(jax.tree.structure(expected), [leaves[name] for name in named_leaves(expected)])

    def extra(self, step: int | None = None) -> dict[str, Any]:
        """The JSON that was saved with `step` (default: the newest). Raises LcmError if it is missing or damaged."""
        self.wait()
        step = self.latest_step() if step is None else step
        _check_present(self.folder, step, self.steps())
        _check_undamaged(self.folder, step, "extra/")
        with _reading(self.folder / str(step)) as path:
            return ocp.JsonCheckpointHandler().restore(path / "extra", args=ocp.args.JsonRestore())

    def close(self) -> None:
        """Waits and frees threads; the object cannot be used afterwards.

        Threads that wait for a process that failed are left behind; `distributed.exit_code` ends them.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown(wait=not self._stuck)
            if not self._stuck:
                with self._one_error("closing the checkpoints"):
                    self._saver.close()

    @contextlib.contextmanager
    def _one_error(self, doing: str) -> Iterator[None]:
        """Turns whatever orbax raises while it writes into one LcmError; a full disk has many names."""
        try:
            yield
        except LcmError:
            raise
        except Exception as error:
            raise self._save_error(doing, error) from error

    def _save_error(self, doing: str, error: BaseException) -> LcmError:
        return LcmError(
            f"{doing} in {self.folder} failed ({_first_line(error)}); free disk space or choose another "
            "workdir, then give the same command again. Earlier checkpoints are whole"
        )


def _without_pages() -> None:
    """What fails in the background is raised by `wait`, in one line; pages of orbax and tensorstore are dropped."""
    loggers = logging.get_absl_logger(), standard_logging.getLogger("asyncio")
    if _is_no_page in loggers[0].filters:
        return
    for logger in loggers:
        logger.addFilter(_is_no_page)
    before = sys.unraisablehook

    def hook(found: Any) -> None:
        if str(found.exc_value) != "Event loop is closed":  # for each array of a save that failed
            before(found)

    sys.unraisablehook = hook


def _is_no_page(record: standard_logging.LogRecord) -> bool:
    of_save = "orbax" in record.pathname or "exception was never retrieved" in record.getMessage()
    return record.levelno < standard_logging.ERROR or not of_save


def kept(steps: Mapping[int, float | None], keep: int, keep_every: int = 0) -> set[int]:
    """Of {step: metric or None}: the newest `keep`, those that `keep_every` divides, and the one of the lowest metric.

    Of equal metrics the newest counts; None and NaN are not metrics. `keep_every` 0: none.
    """
    values = {step: value for step, value in steps.items() if value is not None and not math.isnan(value)}
    best = [min(values, key=lambda step: (values[step], -step))] if values else []
    return {*sorted(steps)[-keep:], *(step for step in steps if keep_every and step % keep_every == 0), *best}


def tidy(folder: Path, best: str = "") -> list[tuple[int, float | None]]:
    """Creates the folder and removes the remains of killed runs; (step, its metric `best`) of each checkpoint.

    Raises:
        LcmError: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LcmError(f"{folder} cannot be created ({error.strerror}); choose another workdir") from error
    for path in list(folder.iterdir()):
        if _REMAINS.match(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return [(step, _metric(folder, step, best)) for step in list_steps(folder)]


def _metric(folder: Path, step: int, best: str) -> float | None:
    path = folder / str(step) / METRICS_FILE
    if not best or not path.exists():
        return None
    try:
        value = foreign.read_json(path).get(best)
        return None if value is None else float(value)
    except (OSError, TypeError, ValueError, OverflowError) as error:
        _warn(f"{path} cannot be read ({_first_line(error)}); that checkpoint does not count as the best")
        return None


def _remove(folder: Path, step: int) -> None:
    removed = folder / f".{step}.removed"
    with contextlib.suppress(FileNotFoundError):  # its owner was quicker
        os.rename(folder / str(step), removed)  # first, so that a part of it is never taken for a checkpoint
    shutil.rmtree(removed, ignore_errors=True)  # a reader may hold a file open (NFS); the next run removes it then


def _newest_undamaged(folder: Path) -> int:
    """The newest undamaged step. Damaged ones that are newer are reported on stderr and renamed.

    Raises:
        LcmError: there is no checkpoint, a file cannot be read, or all are damaged; then nothing is renamed.
    """
    steps, damage = list_steps(folder), {}
    _check_present(folder, max(steps, default=None), steps)
    for step in reversed(steps):
        found = find_damage(folder, step)
        if not found:
            break
        damage[step] = found
    else:
        listed = "; ".join(f"{step}: {found}" for step, found in damage.items())
        raise LcmError(
            f"every checkpoint in {folder} is damaged ({listed}); bring back a copy, or start again in another workdir"
        )
    for bad, found in damage.items():
        path = folder / str(bad)
        names = (path.with_name(f"{bad}.damaged{n or ''}") for n in itertools.count())
        renamed = next(name for name in names if not name.exists())
        os.rename(path, renamed)
        _warn(f"checkpoint {path} is DAMAGED: {found}. It is renamed to {renamed.name}; resuming from step {step}")
    return step


def _check_present(folder: Path, step: int | None, steps: list[int]) -> None:
    if step not in steps:
        wanted, present = "" if step is None else f" of step {step}", ", ".join(map(str, steps)) or "none"
        raise LcmError(f"no checkpoint{wanted} in {folder}; present: {present}")


def _check_undamaged(folder: Path, step: int, under: str = "") -> None:
    """Raises LcmError if a checkpoint, or its part `under`, is damaged or cannot be read."""
    damage = find_damage(folder, step, under)
    if damage:
        others = ", ".join(str(other) for other in list_steps(folder) if other != step) or "none"
        raise LcmError(f"checkpoint {folder / str(step)} is damaged: {damage}; use another step: {others}")


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[Path]:
    """Turns whatever is raised while a checkpoint is read, which may be undamaged, into one LcmError."""
    try:
        yield path
    except Exception as error:
        raise LcmError(
            f"checkpoint {path} cannot be read ({_first_line(error)}); try again, or move that folder elsewhere to "
            "resume from the checkpoint before it"
        ) from error


def _first_line(error: BaseException) -> str:
    """An error of orbax, which can have pages, on one line."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _warn(line: str) -> None:
    print(f"WARNING: {line}", file=sys.stderr, flush=True)


def write_digests(folder: Path) -> None:
    """Syncs all files under `folder` to the disk, then writes digests.json for them."""
    entries = {}
    for parent, _, names in sorted(os.walk(folder)):
        for name in sorted(names):
            path = Path(parent, name)
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
            entries[path.relative_to(folder).as_posix()] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        files.sync_folder(Path(parent))
    with files.new_file(folder / DIGESTS_FILE) as partial:
        partial.write_text(json.dumps({"files": entries, "sha256": _sha256_of_entries(entries)}, indent=1) + "\n")


def find_damage(folder: Path, step: int, under: str = "") -> str | None:
    """The first damage to the checkpoint of `step`, or to its files whose names begin with `under`; None: undamaged.

    Raises:
        LcmError: a file exists but cannot be read, so nothing can be said about its contents.
    """
    with _reading(folder / str(step)) as path:
        try:
            content = foreign.json_object((path / DIGESTS_FILE).read_bytes(), DIGESTS_FILE)
            entries = content["files"]
            if content["sha256"] != _sha256_of_entries(entries):
                raise ValueError
        except FileNotFoundError:
            return f"{DIGESTS_FILE} is missing"
        except (ValueError, KeyError, TypeError):
            return f"{DIGESTS_FILE} is not what was written"
        expected = {name: entry for name, entry in entries.items() if name.startswith(under)}
        if not expected:
            return f"{DIGESTS_FILE} lists no file{f' of {under}' if under else ''}"
        for name, entry in expected.items():  # before anything is hashed: cheap, and a better message
            file, size = path / name, entry["bytes"]
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes, {size} were written"
        with futures.ThreadPoolExecutor(_THREADS) as pool:
            found = pool.map(lambda name: _sha256(path / name), expected)
            for (name, entry), actual in zip(expected.items(), found, strict=True):
                if actual != entry["sha256"]:
                    return f"the content of {name} is not what was written"
        return None


def _sha256_of_entries(entries: dict) -> str:
    return hashlib.sha256(json.dumps(entries).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def named_leaves(tree: Any) -> dict[str, Any]:
    """{"params/conv_in/kernel": leaf} of any pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def difference(saved: Any, expected: Any) -> str:
    """Names, shapes and dtypes in which two trees differ, on one line; "" if they do not."""
    there, here = ({name: _describe(x) for name, x in named_leaves(tree).items()} for tree in (saved, expected))
    lines = [
        f"{name}: {there.get(name, 'not')} in the checkpoint, "
        + (f"expected {here[name]}" if name in here else "not expected")
        for name in sorted(there.keys() | here.keys())
        if there.get(name) != here.get(name)
    ]
    more = [f"and {len(lines) - MOST_LISTED} more"] if len(lines) > MOST_LISTED else []
    return "; ".join(lines[:MOST_LISTED] + more)


def _describe(leaf: Any) -> str:
    """float32[3,4]"""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _saved_shapes(folder: Path, step: int) -> Any:
    """The saved tree with leaves that have .shape and .dtype, without reading arrays."""
    with _reading(folder / str(step)) as path:
        tree = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree
        if not jax.tree.leaves(tree):
            raise ValueError("it holds no arrays")
        return tree
