"""Files that other programs wrote: refused in one line, before memory is taken for what they declare."""

import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest

from lcm_jax import foreign
from lcm_jax.errors import LcmError


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"1" * 5000 + b"}", "digits"),
        (b'{"a": 1', "not valid JSON"),
        (b"\xff{}", "not valid JSON"),
        (b"[]", "holds a list"),
        (b"null", "holds a NoneType"),
        (b"", "not valid JSON"),
    ],
)
def test_json_that_is_none(tmp_path, content, why):
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(LcmError, match=rf"config.json .*{why}.*; copy or download it again") as caught:
        foreign.read_json(path)
    assert len(str(caught.value).splitlines()) == 1


def test_what_may_be_absent_is_no_broken_link(tmp_path):
    path = tmp_path / "config.json"
    assert foreign.read_optional(path) == {}
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(LcmError, match="config.json is missing"):
        foreign.read_optional(path)


def test_a_message_has_a_bounded_length():
    text = str(LcmError(f"the name {'x' * 10**6} is wrong; use another"))
    assert len(text) < 5000 and text.startswith("the name xxx") and text.endswith("x is wrong; use another")


def test_json_as_programs_on_windows_write_it(tmp_path):
    path = tmp_path / "config.json"
    path.write_bytes("\ufeff{}".encode())
    assert foreign.read_json(path) == {}


def test_a_pipe_instead_of_a_json_file_is_not_waited_for(tmp_path):
    path = tmp_path / "config.json"
    os.mkfifo(path)
    with pytest.raises(LcmError, match="no regular file"):
        foreign.read_json(path)
    with pytest.raises(LcmError, match=f"^{tmp_path} is a folder, not a file; restore it$"):
        foreign.read_json(tmp_path, "restore it")


@pytest.mark.parametrize("error", [RuntimeError("a\nb"), NotImplementedError(), SyntaxError("x", ("f", 1, 1, "x"))])
def test_whatever_a_parser_raises_names_the_file(tmp_path, error):
    path = tmp_path / "x"
    path.write_bytes(b"12")
    with pytest.raises(LcmError, match=r"x \(2 bytes\) cannot be read as a thing: .+; remove it") as caught:
        with foreign.reading(path, "a thing", "remove it"):
            raise error
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "error", [MemoryError(), LcmError("/a/x: bad"), FileNotFoundError(2, "no", "/b"), SystemExit()]
)
def test_errors_that_say_enough_pass(error):
    with pytest.raises(type(error)) as caught, foreign.reading(Path("/a/x"), "a thing"):
        raise error
    assert caught.value is error


def test_npz_reads_what_numpy_writes(tmp_path):
    path = tmp_path / "a.npz"
    arrays = {
        "a": np.arange(6.0).reshape(2, 3),
        "b": np.array("name"),
        "c": np.asfortranarray(np.eye(3)),
        "d": np.zeros(0),
    }
    for save in (np.savez, np.savez_compressed):
        save(path, **arrays)
        found = foreign.read_npz(path, 10_000)
        assert found.keys() == arrays.keys()
        assert all(np.array_equal(found[key], arrays[key]) and found[key].dtype == arrays[key].dtype for key in arrays)


def _npy(shape, content=b""):
    header = str({"descr": "<f8", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
    return b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header + content


@pytest.mark.parametrize(
    "member", [_npy((10**12,)), _npy((-1, -2), bytes(16)), _npy((2**40, 2**40)), _npy((1,), bytes(7)), b"\x93NUMPY\7\0"]
)
def test_npz_declares_more_than_it_holds(tmp_path, member):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", member)
    with pytest.raises(LcmError, match=r"a\.npz .*cannot be read"), foreign.reading(path, "an .npz"):
        foreign.read_npz(path, 10_000)


def test_a_zip_bomb_is_not_inflated(tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, a=np.zeros(10_000_000))
    tracemalloc.start()
    with pytest.raises(LcmError, match="declare 80000"), foreign.reading(path, "an .npz"):
        foreign.read_npz(path, 1_000_000)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(("offset", "value"), [(8, 1), (10, 99)])  # of a central entry: encrypted; an unknown method
def test_zips_that_zipfile_cannot_open(tmp_path, offset, value):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros(3))
    content = bytearray(path.read_bytes())
    content[content.find(b"PK\1\2") + offset] = value
    path.write_bytes(content)
    with pytest.raises(LcmError, match="cannot be read"), foreign.reading(path, "an .npz"):
        foreign.read_npz(path, 10_000)


def test_a_json_object_has_its_place_in_the_error():
    assert foreign.json_object(json.dumps({"a": 1}), "header") == {"a": 1}
    with pytest.raises(LcmError, match="^the header of x is not valid JSON"):
        foreign.json_object("{", "the header of x")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_denser_methods_than_numpys_are_refused(tmp_path, method):
    path = tmp_path / "a.npz"
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("a.npy", _npy((1_000_000,), bytes(8_000_000)))
    with pytest.raises(LcmError, match="compressed by method"), foreign.reading(path, "an .npz"):
        foreign.read_npz(path, 2**40)


@pytest.mark.parametrize("field", [20, 24])  # of a central entry: its size in the file, its own size
def test_a_member_declares_more_than_it_can_have(tmp_path, field):
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros(3))
    content = bytearray(path.read_bytes())
    entry = content.find(b"PK\1\2")
    content[entry + field : entry + field + 4] = (2**31).to_bytes(4, "little")
    path.write_bytes(content)
    with pytest.raises(LcmError, match="declares .*2147483648.* cannot be in a file"), foreign.reading(path, "an .npz"):
        foreign.read_npz(path, 2**40)
