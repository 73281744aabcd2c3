"""Checkpoints of a run: saved in the background, restored strictly, one folder per step.

    checkpoints/<step>/state    the arrays (orbax, OCDBT)
    checkpoints/<step>/extra    JSON, small things that belong to the step

The state is stored as a tree of plain dicts named by its key paths (`params/conv_in/kernel`, `opt_state/0/mu/...`), so
that a checkpoint can be read without the classes that made it. A folder gets its plain number only when all is on
disk; an interrupted save leaves a folder with another name, which the next run removes.

Restoring compares names, shapes and dtypes with what is expected before any array is read: orbax by itself would cast a
dtype in silence, and a run that restarts from fresh weights because a restore failed is worse than one that stops.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import SingleDeviceSharding

from lcm_jax.errors import LcmError

# Lines of a diff that are printed; a wrong model differs everywhere.
MAX_DIFF = 8


def _named_leaves(tree: Any) -> dict[str, Any]:
    """{"params/conv_in/kernel": leaf}: key paths joined by "/"; works on any pytree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": 1} -> {"a": {"b": 1}}."""
    tree: dict[str, Any] = {}
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def _as_array(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _describe(leaf: Any) -> str:
    """float32[3,4]"""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def tree_diff(saved: Any, expected: Any) -> list[str]:
    """Differences between two trees of arrays (or of things with shape and dtype), one line each, sorted by name."""
    there, here = _named_leaves(saved), _named_leaves(expected)
    lines = []
    for name in sorted(there.keys() | here.keys()):
        if name not in there:
            lines.append(f"{name}: not in the checkpoint, expected {_describe(here[name])}")
        elif name not in here:
            lines.append(f"{name}: {_describe(there[name])} in the checkpoint, not expected")
        elif _describe(there[name]) != _describe(here[name]):
            lines.append(f"{name}: {_describe(there[name])} in the checkpoint, expected {_describe(here[name])}")
    return lines


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _damaged(path: Path, error: BaseException) -> LcmError:
    return LcmError(f"checkpoint {path} cannot be read ({_short(error)}); "
                    "delete that folder to go on from the checkpoint before it")


def list_steps(folder: str | os.PathLike[str]) -> list[int]:
    """Steps of the complete checkpoints in `folder`, ascending; [] if there is no such folder."""
    folder = Path(folder)
    return sorted(int(p.name) for p in folder.iterdir() if p.name.isdigit() and p.is_dir()) if folder.is_dir() else []


def _state_metadata(folder: Path, step: int) -> Any:
    """Tree of things with .shape and .dtype, without reading arrays."""
    path = folder / str(step)
    try:
        tree = ocp.PyTreeCheckpointHandler().metadata(path / "state").tree
        if not jax.tree.leaves(tree):
            raise ValueError("no arrays in it")
        return tree
    except Exception as error:  # orbax raises many kinds for a folder that is not whole
        raise _damaged(path, error) from error


def load_subtree(folder: str | os.PathLike[str], step: int, name: str) -> dict[str, Any]:
    """One part of a saved state ("params", "ema_params") as nested dicts of numpy arrays, without the rest.

    Args:
        folder: the `checkpoints` folder.
        step: one of `list_steps(folder)`.
        name: first level of the state's tree, or several joined by "/".

    Raises:
        LcmError: no such checkpoint, no such part, or a folder that cannot be read.
    """
    folder = Path(folder).absolute()
    steps = list_steps(folder)
    if step not in steps:
        raise LcmError(f"no checkpoint of step {step} in {folder}; present: {', '.join(map(str, steps)) or 'none'}")
    saved = _named_leaves(_state_metadata(folder, step))
    wanted = {key: leaf for key, leaf in saved.items() if key.startswith(f"{name}/")}
    if not wanted:
        parts = sorted({key.split("/")[0] for key in saved})
        raise LcmError(f"checkpoint {folder / str(step)} has no part {name!r}; it has {', '.join(parts)}")
    item = _nest({key: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for key, leaf in wanted.items()})
    restore_args = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    try:
        tree = ocp.PyTreeCheckpointHandler().restore(
            folder / str(step) / "state",
            args=ocp.args.PyTreeRestore(item=item, restore_args=restore_args, partial_restore=True))
    except Exception as error:
        raise _damaged(folder / str(step), error) from error
    for part in name.split("/"):
        tree = tree[part]
    return tree


class Checkpoints:
    """The checkpoints of one run; a context manager, which waits for the last save.

    Args:
        folder: workdir / "checkpoints"; created.
        keep: how many of the newest stay.
    """

    def __init__(self, folder: str | os.PathLike[str], keep: int = 3) -> None:
        self.folder = Path(folder).absolute()
        policies = ocp.checkpoint_managers
        self._manager = ocp.CheckpointManager(self.folder, options=ocp.CheckpointManagerOptions(
            save_decision_policy=policies.FixedIntervalPolicy(1),  # the loop decides when
            preservation_policy=policies.LatestN(keep),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        ))

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            self.close()
        except LcmError:
            if kind is None:  # an error already on its way matters more
                raise

    def steps(self) -> list[int]:
        """Steps on disk, ascending."""
        return sorted(self._manager.all_steps())

    def latest_step(self) -> int | None:
        """Newest step, None if there is no checkpoint."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, extra: Mapping[str, Any] | None = None) -> bool:
        """Begins to save `state` (any pytree of arrays) and `extra` (JSON). False if the step is there already.

        Returns once the arrays are copied, so that the caller may donate them; an error of the writing shows up at the
        next `save`, `wait` or `close`, as LcmError.
        """
        if step in self.steps():
            return False
        tree = _nest({name: _as_array(leaf) for name, leaf in _named_leaves(state).items()})
        with self._readable_errors(f"saving checkpoint {step}"):
            return self._manager.save(step, args=ocp.args.Composite(
                state=ocp.args.PyTreeSave(tree), extra=ocp.args.JsonSave(dict(extra or {}))))

    def restore(self, expected: Any, step: int | None = None) -> Any:
        """The state of `step` (default: the newest) in the structure of `expected`.

        Args:
            expected: pytree of arrays or ShapeDtypeStructs; a sharding on a leaf says where it goes, others go to the
                first device.
            step: one of `steps()`.

        Raises:
            LcmError: nothing to restore, a folder that cannot be read, or any difference of names, shapes or dtypes.
        """
        step = self._existing(step)
        path = self.folder / str(step)
        diff = tree_diff(_state_metadata(self.folder, step), expected)
        if diff:
            more = f"; and {len(diff) - MAX_DIFF} more" if len(diff) > MAX_DIFF else ""
            raise LcmError(f"checkpoint {path} does not fit this run: {'; '.join(diff[:MAX_DIFF])}{more}. "
                           "Use the config it was made with, or another workdir")
        default = SingleDeviceSharding(jax.devices()[0])
        target = _nest({name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                                   sharding=getattr(leaf, "sharding", None) or default)
                        for name, leaf in _named_leaves(expected).items()})
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.PyTreeRestore(
                target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)))).state
        except Exception as error:
            raise _damaged(path, error) from error
        leaves = _named_leaves(restored)
        return jax.tree.unflatten(jax.tree.structure(expected), [leaves[name] for name in _named_leaves(expected)])

    def extra(self, step: int | None = None) -> dict[str, Any]:
        """The JSON that was saved with `step` (default: the newest)."""
        step = self._existing(step)
        try:
            return self._manager.restore(step, args=ocp.args.Composite(extra=ocp.args.JsonRestore())).extra
        except Exception as error:
            raise _damaged(self.folder / str(step), error) from error

    def wait(self) -> None:
        """Returns when everything saved so far is on disk."""
        with self._readable_errors("saving a checkpoint"):
            self._manager.wait_until_finished()
            self._manager.check_for_errors()

    def close(self) -> None:
        """Waits and frees threads. The object is of no use afterwards."""
        try:
            self.wait()
        finally:
            with self._readable_errors("closing the checkpoints"):
                self._manager.close()

    def _existing(self, step: int | None) -> int:
        steps = self.steps()
        step = steps[-1] if step is None and steps else step
        if step not in steps:
            raise LcmError(f"no checkpoint{'' if step is None else f' of step {step}'} in {self.folder}; "
                           f"present: {', '.join(map(str, steps)) or 'none'}")
        return step

    @contextlib.contextmanager
    def _readable_errors(self, doing: str) -> Iterator[None]:
        """Turns whatever orbax raises while it writes into one LcmError; a full disk has many names."""
        try:
            yield
        except LcmError:
            raise
        except Exception as error:
            raise LcmError(f"{doing} in {self.folder} failed ({_short(error)}); free disk space or choose another "
                           "workdir, then give the same command again. Earlier checkpoints are whole") from error
