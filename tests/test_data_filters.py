"""Rules: what they drop, what they report, and the sizes they read."""

import dataclasses
import pickle

import numpy as np
import pytest
from image_kit import encoded
from PIL import Image

from lcm_jax.data import filters
from lcm_jax.data.records import BadRecord, BadRecordError, Record
from lcm_jax.errors import BadArgument, LcmError

NAN = np.nan


@dataclasses.dataclass
class Rows:
    """A source in memory; without `images` if no test reads it."""

    fields: dict
    images: list | None = None
    bad_records: tuple = ()
    notes: tuple = ()
    reads: int = 0

    def __len__(self):
        return len(self.images) if self.images is not None else len(next(iter(self.fields.values())))

    def __getitem__(self, number):
        self.reads += 1
        if self.images[number] is None:
            raise BadRecordError("truncated")
        return Record(f"k{number}", self.images[number], ("c",))

    def field(self, name):
        return np.asarray(self.fields[name], np.float64) if name in self.fields else None

    def where(self, number):
        return "shard", f"k{number}"


def kept(source, *rules, **keys):
    selection, report = filters.apply(source, rules, **keys)
    return selection.numbers.tolist(), report


@pytest.mark.parametrize(
    "text, rule",
    [
        ("side >= 512", filters.Rule("side", ">=", 512)),
        ("  aspect<=2 ", filters.Rule("aspect", "<=", 2)),
        ("pwatermark <= 0.5 or missing", filters.Rule("pwatermark", "<=", 0.5, True)),
        ("json.score > -1e-3  or  missing ", filters.Rule("json.score", ">", -1e-3, True)),
        ("n==3", filters.Rule("n", "==", 3)),
        ("n <= 20230101", filters.Rule("n", "<=", 20230101)),
        ("n < 3", filters.Rule("n", "<", 3)),
    ],
)
def test_parse(text, rule):
    assert filters.parse(text) == rule and filters.parse(str(rule)) == rule


BAD = ["", "side", "side >=", ">= 3", "side = 3", "side != 3", "side >= big", "side >= nan", "side >= 3 or"]
BAD += ["side >= 3 or none", "side >= 3 and aspect < 2", "side => 3"]


@pytest.mark.parametrize("text", BAD)
def test_bad_rules_show_the_grammar(text):
    with pytest.raises(BadArgument, match=r"FIELD OP NUMBER \[or missing\]") as caught:
        filters.parse(text)
    assert str(caught.value).startswith(f"filters={text}: ")


def test_operators_and_missing():
    source = Rows({"a": [1, 2, 3, NAN]})
    rules = {"a <= 2": [0, 1], "a < 2": [0], "a >= 2": [1, 2], "a > 2": [2], "a == 2": [1], "a == 2 or missing": [1, 3]}
    for rule, numbers in (rules | {"a < 9 or missing": [0, 1, 2, 3]}).items():
        assert kept(source, rule)[0] == numbers
    assert filters.apply(source, ())[0] is source


def test_a_record_counts_at_the_first_rule_that_drops_it():
    source = Rows({"a": [1, 5, 5, NAN, 5, 1], "b": [9, 9, NAN, NAN, 1, 1]}, bad_records=(BadRecord("s", "k", "r"),))
    numbers, report = kept(source, "a >= 3", "b >= 5")
    assert numbers == [1]
    assert report == filters.Report(6, 1, ((filters.parse("a >= 3"), 3, 1), (filters.parse("b >= 5"), 2, 1)), 1)
    assert sum(dropped for _, dropped, _ in report.rules) == report.total - report.kept
    assert report.line() == '1 of 6 records, "a >= 3" dropped 3, "b >= 5" dropped 2, 1 more are unusable'


def test_side_and_aspect_from_fields():
    fields = {"original_width": [512, 2048, 600, 300, NAN, 1e300], "original_height": [512, 512, 1200, 900, 600, 600]}
    source = Rows(fields, [None] * 6)
    keys = dict(width_key="original_width", height_key="original_height")
    assert kept(source, "side >= 512", **keys)[0] == [0, 1, 2]
    assert kept(source, "aspect <= 2", **keys)[0] == [0, 2]
    assert kept(source, "side >= 512 or missing", **keys)[0] == [0, 1, 2, 4, 5]
    assert kept(source, "side >= 512", "aspect <= 2", **keys)[1].rules[0][1:] == (3, 2)
    expected = [[512, 512], [512, 2048], [1200, 600], [900, 300], [0, 0], [0, 0]]
    got = filters.sizes(source, **keys)
    assert got.dtype == np.int32 and got.tolist() == expected
    source = Rows(fields, [None, None, None, None, image(30, 20), None], reads=0)
    assert filters.sizes(source, **keys).tolist() == [*expected[:4], [30, 20], [0, 0]]
    assert source.reads == 2, "of those alone that lack a field"


def image(height, width, form="JPEG", orientation=None):
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    return encoded(Image.new("RGB", (width, height)), form, exif=exif)


def test_sizes_from_image_headers():
    contents = [
        image(20, 30),
        image(20, 30, orientation=6),
        image(7, 9, "PNG"),
        image(7, 9, "PNG", 8),
        image(5, 6, "WEBP", 3),
        image(30, 20)[:60],
        b"not an image",
        None,
        np.zeros((4, 2, 3), np.uint8),
    ]
    source = Rows({}, contents)
    sizes = filters.sizes(source).tolist()
    assert sizes == [[20, 30], [30, 20], [7, 9], [9, 7], [5, 6], [0, 0], [0, 0], [0, 0], [4, 2]]
    numbers, report = kept(source, "side >= 5", "aspect <= 1.4")
    assert numbers == [2, 3, 4] and report.rules[0][1:] == (4, 3) and report.rules[1][1:] == (2, 0)


def test_headers_are_read_only_when_a_rule_needs_them():
    source = Rows({"a": [1, 2], "width": [600, 600], "height": [700, 100]}, [b"", b""])
    kept(source, "a >= 1", "side >= 100", "aspect < 9")
    assert source.reads == 0
    source = Rows({"a": [1, 2], "width": [600, 600]}, [image(8, 8)] * 2)
    kept(source, "a >= 1")
    assert source.reads == 0
    kept(source, "side >= 1", "aspect < 9")
    assert source.reads == 2, "one look at each serves both"


def test_a_field_that_no_record_has():
    source = Rows({"a": [1, 2]})
    words = "filters=pwatermark <= 0.5: no record has a number 'pwatermark'; .*or missing"
    with pytest.raises(BadArgument, match=words):
        filters.apply(source, ["pwatermark <= 0.5"])
    assert kept(source, "pwatermark <= 0.5 or missing")[0] == [0, 1]


def test_nothing_left_shows_one_record_and_why():
    source = Rows({"a": [1, 2], "b": [3, NAN]})
    words = r'"a >= 2" dropped 1, "b >= 0" dropped 1.*shard: k0: a is 1, which "a >= 2" drops'
    with pytest.raises(BadArgument, match="^filters=a >= 2, b >= 0: of 2 records none is left: " + words):
        filters.apply(source, ["a >= 2", "b >= 0"])
    with pytest.raises(BadArgument, match="shard: k0: has no c"):
        filters.apply(Rows({"c": [NAN]}), ["c >= 0"])
    with pytest.raises(LcmError, match="no records; the first of 1 unusable ones: s: k: broken"):
        filters.apply(Rows({}, [], (BadRecord("s", "k", "broken"),)), [])


def test_the_selection_is_a_source():
    bad = (BadRecord("s", "k", "r"),)
    source = Rows({"a": [1, 2, 3, 4], "b": [NAN, NAN, 1, 2]}, [b"0", b"1", None, b"3"], bad)
    selection, _ = filters.apply(source, ["a > 1"])
    selection, _ = filters.apply(pickle.loads(pickle.dumps(selection)), ["a < 4"])
    assert len(selection) == 2 and selection.bad_records == bad
    assert selection[0] == Record("k1", b"1", ("c",)) and selection.where(1) == ("shard", "k2")
    with pytest.raises(BadRecordError, match="truncated"):
        selection[1]
    np.testing.assert_array_equal(selection.field("a"), [2, 3])
    np.testing.assert_array_equal(selection.field("b"), [NAN, 1])
    assert selection.field("c") is None
    assert filters.apply(source, ["a < 3"])[0].field("b") is None, "no record of these has it"
