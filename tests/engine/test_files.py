"""Files from elsewhere: no size is believed, damage is noticed, each message is one line."""

import errno
import io
import json
import os
import random

import numpy as np
import pytest
import torch

from engine.errors import UserError
from engine.files import (
    inside,
    read_array,
    read_json,
    read_json_lines,
    read_text,
    replacing,
    tidy,
    write,
    write_picture,
)
from models.prototypes.text import read_classes, read_names, read_rows
from tests.engine.damaged import archive, refused
from tests.fuzz.files import a_checkpoint, edited, npy, run, saved

# --- arrays, texts, caches -------------------------------------------------------------------------------------------


def test_arrays_are_read_as_numpy_writes_them(tmp_path):
    path, values = tmp_path / "a.npy", np.arange(6.0).reshape(2, 3)
    for array in (values, np.asfortranarray(values), values.astype(">f4"), np.zeros((0, 4)),
                  np.float32(3), np.arange(5), values.astype(np.float16)):  # fmt: skip
        np.save(path, array)
        found = read_array(path)
        assert np.array_equal(found, array) and found.shape == array.shape
        assert found.dtype == array.dtype.newbyteorder("=")
    assert torch.from_numpy(read_array(path)).sum() == 15


def objects():
    file = io.BytesIO()
    np.save(file, np.array([{"a": 1}, None], object), allow_pickle=True)
    return file.getvalue()


BAD_ARRAYS = {
    "objects": (objects, "one array of numbers"),
    "zip": (archive, "one array of numbers"),
    "cut": (lambda: npy()[:-1], "claims 48 bytes of numbers, and it holds 47"),
    "longer": (lambda: npy() + b"x", "claims 48 bytes of numbers, and it holds 49"),
    "giant": (lambda: npy().replace(b"(3, 4)", b"(999999999, 999)"), "claims 3995999996004 bytes"),
    "negative": (lambda: npy().replace(b"(3, 4)", b"(3, -4)"), "one array of numbers"),
    "text": (lambda: b"1 2 3", "one array of numbers"),
    "empty": (lambda: b"", "one array of numbers"),
    "complex": (lambda: npy().replace(b"<f4", b"<c8"), "one array of numbers"),
    "code": (lambda: npy().replace(b"(3, 4)", b"f(3, 4)"), "one array of numbers"),
}


@pytest.mark.parametrize("kind", [*BAD_ARRAYS])
def test_an_array_that_is_none_or_claims_another_size_is_refused(tmp_path, kind):
    make, message = BAD_ARRAYS[kind]
    assert message in refused(tmp_path / "a.npy", make(), read_array)
    refused(tmp_path / "a.npy", read=lambda path: read_rows(path, ["a", "b", "c"]))


ENCODED = {
    "utf-8": "straße\nmüll\n",
    "utf-8-sig": "straße\nmüll\n",
    "utf-16": None,
    "utf-16-le": None,
    "latin-1": None,
}


@pytest.mark.parametrize("encoding", [*ENCODED])
def test_texts_are_utf_8_and_another_encoding_is_named(tmp_path, encoding):
    path = tmp_path / "names.txt"
    path.write_bytes("straße\nmüll\n".encode(encoding))
    if ENCODED[encoding]:
        assert read_text(path) == ENCODED[encoding]
        assert read_names(path) == ["straße", "müll"]
        assert read_classes(str(path)) == {"straße": ["straße"], "müll": ["müll"]}
    else:
        expected = "in UTF-16: save it as UTF-8" if "16" in encoding else r"Latin-1 (line 1)"
        for read in (read_text, read_names, lambda path: read_classes(str(path))):
            assert expected in refused(path, read=read)


def test_json_that_a_crash_has_cut(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"step": 1}\n{"step": 2}\n5\n{"step": 3, "loss')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    for text in (path.read_text(), '{"a": ', "1" * 5000, "[" * 10**5):
        assert "is incomplete or damaged" in refused(path, text.encode(), read_json)
    path.write_text(json.dumps({"a": [1]}))
    assert read_json(path) == {"a": [1]}
    assert "there is no file" in refused(tmp_path / "none.json", read=read_json)


# --- random damage ---------------------------------------------------------------------------------------------------


def test_random_damage_is_read_or_refused_in_one_line():
    found = run(seed=0, count=100)
    assert {*found} == {"ok", "UserError"} and min(found.values()) > 10


def test_an_edit_changes_something():
    draw = random.Random(0)
    before = saved(a_checkpoint())
    assert sum(saved(edited(a_checkpoint(), draw)) != before for _ in range(20)) > 17


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "a" / "b.txt"
    write(path, "ä")
    for error, raised in ((KeyboardInterrupt, KeyboardInterrupt), (ValueError, ValueError)):
        with pytest.raises(raised), replacing(path) as temporary:
            temporary.write_text("half")
            raise error
    with pytest.raises(UserError, match=r"could not write .*b\.txt: No space left on device"):
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text("utf-8") == "ä" and [*path.parent.iterdir()] == [path]
    with pytest.raises(UserError, match=r"could not write .*c\.png"):
        write_picture(path / "c.png", torch.zeros(2, 2, 3, dtype=torch.uint8).numpy())


def test_only_what_killed_processes_have_left_is_removed(tmp_path):
    with replacing(tmp_path / "b.csv") as temporary:
        temporary.write_text("half")
        (tmp_path / ".a.999999999.tmp.csv").write_text("of no process")
        tidy(tmp_path)
        assert [*tmp_path.iterdir()] == [temporary]
    assert (tmp_path / "b.csv").read_text() == "half"


def test_a_name_stays_inside_its_folder(tmp_path):
    assert inside(tmp_path, "a/b") == tmp_path / "a" / "b"
    (tmp_path / "link").symlink_to("/")
    for name in ("link", "link/etc", "", "..", "/etc"):
        with pytest.raises(UserError, match="leads out of the folder"):
            inside(tmp_path, name)
