"""Sources by name: what each takes, and what it refuses."""

import multiprocessing
import pickle
import subprocess
import sys

import data_kit
import numpy as np
import pytest

from lcm_jax.data import shapes, sources
from lcm_jax.data.sources import open_source
from lcm_jax.errors import BadArgument, LcmError, flags_named


@pytest.fixture
def data(tmp_path):
    """A folder that two of the sources read."""
    (tmp_path / "a.jpg").write_bytes(b"image")
    (tmp_path / "a.txt").write_text("caption")
    entries = [("b.jpg", b"other"), ("b.txt", b"caption"), ("b.json", b'{"title": "Title"}')]
    data_kit.write_tar(tmp_path / "a.tar", entries)
    return tmp_path


def test_opens_by_name(data):
    record = open_source("folder", data)[0]
    assert (record.key, record.image, record.captions) == ("a.jpg", b"image", ("caption",))
    tars = open_source("webdataset", [str(data)], caption_key="title", image_key="jpg", index_dir=data / "index")
    assert tars[0].captions == ("Title",) and len(list((data / "index").iterdir())) == 1
    rendered = open_source("shapes", None, num_examples=5, split="heldout", style="card")
    image, caption = shapes.example(4, "heldout", style="card")
    assert len(rendered) == 5 and np.array_equal(rendered[4].image, image) and rendered[4].captions == (caption,)


def test_wrong_values_name_the_argument_and_at_the_edge_the_flag(data):
    with pytest.raises(BadArgument, match="^source=laion: .*webdataset, folder, huggingface, tfds, shapes$"):
        open_source("laion", data)
    with pytest.raises(BadArgument, match="^split=test: the shapes set has train, heldout$") as caught:
        open_source("shapes", None, split="test")
    again = pickle.loads(pickle.dumps(caught.value))  # as from a worker process
    assert (again.name, again.value, str(again)) == ("split", "test", str(caught.value))
    for options, words in (({"style": "oil"}, "style=oil: .* plain, card"), ({"num_examples": 0}, "num_examples=0: ")):
        with pytest.raises(BadArgument, match=f"^{words}"):
            open_source("shapes", None, **options)
    with pytest.raises(LcmError, match="^--config.data.path=.*/nowhere: not a folder$") as caught:
        with flags_named("--config.data."):
            open_source("folder", data / "nowhere")
    assert not isinstance(caught.value, BadArgument)


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
        with pytest.raises(BadArgument, match=f"^{key}={values[key]}: the source '{name}' does not use it"):
            open_source(name, **keywords)
    if "path" in sources.KEYWORDS[name]:
        for path in (None, ""):
            with pytest.raises(BadArgument, match=f"^path={path or ''}.*the source '{name}' needs one"):
                open_source(name, path)


def _read(sources):
    return [[(source[i], source.where(i)) for i in range(len(source))] for source in sources]


def test_every_source_reads_the_same_in_another_process(tmp_path):
    found = data_kit.records(4)
    opened = [open_source(name, write(tmp_path / name, found)) for name, write in data_kit.WRITERS.items()]
    here = _read(opened)  # opens their files
    for records in here:
        read = [(record.image, record.captions, record.fields) for record, _ in records]
        numbers = [{name: r[name] for name in ("width", "height", "pwatermark")} for r in found]
        assert read == [(r["image"], (r["text"],), fields) for r, fields in zip(found, numbers, strict=True)]
    for source in opened:
        np.testing.assert_array_equal(source.field("width"), [r["width"] for r in found])
    assert len(pickle.dumps(opened)) < 20_000, "no images, no data"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert pool.apply(_read, (opened,)) == here


def test_modules_are_imported_when_they_are_opened():
    code = (
        "import sys; import lcm_jax.data.sources as s; "
        "print([name for name in sys.modules if name.startswith(s.__name__ + '.')])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"
