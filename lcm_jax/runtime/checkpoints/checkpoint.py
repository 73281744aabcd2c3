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
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from lcm_jax import files
from lcm_jax.data import waiting
from lcm_jax.errors import LcmError
from lcm_jax.runtime import trees
from lcm_jax.runtime.checkpoints import checkpoint_folder as on_disk
from lcm_jax.runtime.checkpoints import digests
from lcm_jax.runtime.checkpoints.checkpoint_folder import list_steps
from lcm_jax.runtime.processes import agreement

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
        raise on_disk.unreadable(path, error) from error


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
    on_disk.check_present(folder, step, list_steps(folder))
    on_disk.check_whole(folder, step, "state/")
    saved = trees.named_leaves(_state_metadata(folder, step))
    wanted = {key: leaf for key, leaf in saved.items() if key.startswith(f"{name}/")}
    if not wanted:
        parts = sorted({key.split("/")[0] for key in saved})
        raise LcmError(f"checkpoint {folder / str(step)} has no part {name!r}; it has {', '.join(parts)}")
    item = trees.nest({key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in wanted.items()})
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    try:
        tree = ocp.PyTreeCheckpointHandler().restore(
            folder / str(step) / "state",
            args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True),
        )
    except Exception as error:
        raise on_disk.unreadable(folder / str(step), error) from error
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
        found = agreement.decided_by_first(lambda: on_disk.tidy(self.folder, best))
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
        tree = trees.nest({name: _as_array(leaf) for name, leaf in trees.named_leaves(state).items()})
        values = {name: float(value) for name, value in (metrics or {}).items()}
        partial = self.folder / f".{step}.partial"
        with self._readable_errors(f"saving checkpoint {step}"):
            if jax.process_index() == 0:
                on_disk.begun(self.folder, step).touch()  # now, while orbax makes its folder some time later
            self._saver.save(
                partial,
                force=True,
                args=ocp.args.Composite(state=ocp.args.PyTreeSave(tree), extra=ocp.args.JsonSave(dict(extra or {}))),
            )
        self._steps[step] = values.get(self._best)
        doomed = sorted(self._steps.keys() - on_disk.kept(self._steps, self._keep, self._keep_every))
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
            step = agreement.decided_by_first(lambda: on_disk.newest_whole(self.folder))
            self._steps = {other: metric for other, metric in self._steps.items() if other <= step}
            self.whole = step
        else:
            on_disk.check_present(self.folder, step, self.steps())
            agreement.decided_by_first(lambda: on_disk.check_whole(self.folder, step))
        path = self.folder / str(step)
        different = trees.difference(_state_metadata(self.folder, step), expected)
        if different:
            raise LcmError(
                f"checkpoint {path} does not fit this run: {different}. Use the config it was made with, "
                "or another workdir"
            )
        default = SingleDeviceSharding(jax.devices()[0])
        target = trees.nest(
            {
                name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=getattr(leaf, "sharding", None) or default)
                for name, leaf in trees.named_leaves(expected).items()
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
            raise on_disk.unreadable(path, error) from error
        leaves = trees.named_leaves(restored)
        return jax.tree.unflatten(jax.tree.structure(expected), [leaves[name] for name in trees.named_leaves(expected)])

    def extra(self, step: int | None = None) -> dict[str, Any]:
        """The JSON that was saved with `step` (default: the newest). Raises LcmError where it is damaged."""
        self.wait()
        step = self.latest_step() if step is None else step
        on_disk.check_present(self.folder, step, self.steps())
        on_disk.check_whole(self.folder, step, "extra/")
        path = self.folder / str(step)
        try:
            return ocp.JsonCheckpointHandler().restore(path / "extra", args=ocp.args.JsonRestore())
        except Exception as error:
            raise on_disk.unreadable(path, error) from error

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
                    files.write_text(partial / on_disk.METRICS_FILE, json.dumps(metrics))
                digests.write(partial)
                os.rename(partial, self.folder / str(step))
                on_disk.begun(self.folder, step).unlink()
                files.sync_folder(self.folder)
                for old in doomed:
                    on_disk.remove(self.folder, old)
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
            f"{doing} in {self.folder} failed ({on_disk.short(error)}); free disk space or choose another "
            "workdir, then give the same command again. Earlier checkpoints are whole"
        )
