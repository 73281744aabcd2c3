"""Sources by name: what each takes, and what it says to the rest."""

import io
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from lcm_jax.data import shapes, sources
from lcm_jax.data.sources import open_source
from lcm_jax.errors import LcmError


@pytest.fixture
def data(tmp_path):
    """A folder that two of the sources read."""
    (tmp_path / "a.jpg").write_bytes(b"picture")
    (tmp_path / "a.txt").write_text("caption")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in (("b.jpg", b"other"), ("b.txt", b"caption"), ("b.json", b'{"title": "Title"}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return tmp_path


def test_opens_by_name(data):
    record = open_source("folder", data)[0]
    assert (record.key, record.image, record.captions) == ("a.jpg", b"picture", ("caption",))
    tars = open_source("webdataset", [str(data)], caption_key="title", image_key="jpg", index_dir=data / "index")
    assert tars[0].captions == ("Title",) and len(list((data / "index").iterdir())) == 1
    drawn = open_source("shapes", None, num_examples=5, split="heldout", style="card")
    picture, caption = shapes.example(4, "heldout", style="card")
    assert len(drawn) == 5 and np.array_equal(drawn[4].image, picture) and drawn[4].captions == (caption,)


def test_unknown_name(data):
    with pytest.raises(LcmError, match="'laion'.*--config.data.source.*webdataset, folder, huggingface, tfds, shapes"):
        open_source("laion", data)


@pytest.mark.parametrize("name", sources.SOURCES)
def test_what_a_source_does_not_use_is_refused(name, data):
    values = {
        "path": data,
        "split": "test",
        "image_key": "jpg",
        "caption_key": "title",
        "index_dir": data,
        "num_examples": 3,
        "style": "card",
    }
    unused = values.keys() - sources.KEYWORDS[name]
    assert unused
    for key in unused:
        path = data if "path" in sources.KEYWORDS[name] else None
        keywords = {"path": path} | {key: values[key]}
        with pytest.raises(LcmError, match=f"source '{name}' has no use for --config.data.{key}"):
            open_source(name, **keywords)


@pytest.mark.parametrize("name", [name for name in sources.SOURCES if name != "shapes"])
def test_path_is_needed(name):
    for path in (None, ""):
        with pytest.raises(LcmError, match=f"source '{name}' needs --config.data.path"):
            open_source(name, path)


def test_modules_are_imported_when_asked_for():
    code = (
        "import sys; import lcm_jax.data.sources as s; "
        "print([name for name in sys.modules if name.startswith(s.__name__ + '.')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
