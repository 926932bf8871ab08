"""Files from elsewhere: nothing in them runs, damage is noticed, no size is believed, each message is one line."""

import io
import json
import os
import pickle
import random
import tarfile
import time
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

import predict
from datasets.camvid import CamVid
from datasets.folder import Folder
from datasets.gta5 import GTA5
from datasets.statistics import class_counts, read_counts, write_counts
from datasets.voc import VOC
from engine import checkpoint, contents, weights
from engine.build import build
from engine.config import Config, ConfigError
from engine.errors import UserError
from engine.files import read_array, read_json, read_json_lines, read_text
from engine.weights import WeightsError, load_pretrained
from models.prototypes.text import main as text_command
from models.prototypes.text import read_classes, read_names, read_rows, write_rows
from tests.fuzz.files import Run, a_checkpoint, edited, npy, run, saved


def members(data):
    archive = zipfile.ZipFile(io.BytesIO(data))
    return {member.filename: archive.read(member) for member in archive.infolist()}


def packed(files, kind=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name), content, kind)
    return file.getvalue()


def refused(path, data=None, read=weights.read):
    """The message of a file that is refused."""
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(UserError) as error:
        read(path)
    text = str(error.value)
    assert str(path) in text and "\n" not in text and "weights_only" not in text and len(text) < 700
    return text


# --- checksums -------------------------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_file_is_noticed_or_changes_nothing(tmp_path):
    path, state = tmp_path / "a.pt", {"w": torch.arange(40.0)}
    data, found = saved(state), []
    for place in range(0, len(data) * 8, 43):  # 43 is odd: every bit of a byte occurs
        damaged = bytearray(data)
        damaged[place // 8] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            found.append(weights.read(path))
        except WeightsError:
            found.append(None)
    assert all(torch.equal(x["w"], state["w"]) for x in found if x)
    assert 0.3 < found.count(None) / len(found) < 0.9


def test_a_number_in_a_tensor_has_a_checksum_and_the_member_is_named(tmp_path):
    data = saved({"a": torch.zeros(5), "w": torch.full((99,), 7.0)})
    place = data.index(torch.full((99,), 7.0).numpy().tobytes())
    data = data[: place + 40] + b"\x01" + data[place + 41 :]
    text = refused(tmp_path / "a.pt", data)
    assert "is damaged: its member 'archive/data/1' fails its checksum" in text


def test_find_takes_an_older_checkpoint_for_any_flip_in_the_newest(tmp_path, caplog):
    draw = random.Random(0)
    for step in (1, 2):
        checkpoint.save_step(tmp_path, a_checkpoint() | {"step": step}, keep=2)
    path, steps = tmp_path / "step_0000002.pt", []
    data = path.read_bytes()
    for _ in range(20):
        damaged = bytearray(data)
        damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        content = checkpoint.find(Config({"folder": tmp_path, "resume": "auto"}))[1]
        steps.append(content["step"])
        expected = a_checkpoint() | {"step": content["step"]}
        assert content.keys() == expected.keys()
        for part in ("model", "teacher", "prototypes"):
            assert all(torch.equal(content[part][key], x) for key, x in expected[part].items())
    assert {*steps} == {1, 2} and "step_0000002.pt is damaged" in caplog.text


def test_checksums_cost_less_than_reading(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({str(i): torch.zeros(10**6) for i in range(20)}, path)

    def seconds(function, *arguments, **options):
        times = []
        for _ in range(3):
            start = time.process_time()
            function(*arguments, **options)
            times.append(time.process_time() - start)
        return min(times)

    # 0.03 s against 0.04 s here; others need a margin.
    load = seconds(torch.load, path, map_location="cpu", weights_only=True)
    assert seconds(weights.check_archive, path) < 3 * load


def test_files_without_checksums_are_read(tmp_path):
    old = {"_use_new_zipfile_serialization": False}
    (tmp_path / "old.pth").write_bytes(saved({"w": torch.ones(3)}, **old))
    assert torch.equal(weights.read(tmp_path / "old.pth")["w"], torch.ones(3))
    torch.serialization.set_crc32_options(False)
    try:
        (tmp_path / "a.pt").write_bytes(saved({"w": torch.ones(3)}))
    finally:
        torch.serialization.set_crc32_options(True)
    assert torch.equal(weights.read(tmp_path / "a.pt")["w"], torch.ones(3))


# --- sizes -----------------------------------------------------------------------------------------------------------


def test_a_compressed_archive_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **o: pytest.fail("unpacked"))
    files = members(saved({"w": torch.zeros(10**6)}))
    data = packed(files, zipfile.ZIP_DEFLATED)
    assert len(data) < 10**4 and "claims to hold 400" in refused(tmp_path / "a.pt", data)
    files = members(saved({"w": torch.rand(9)}))
    data = packed(files | {"archive/data/0": os.urandom(2000)}, zipfile.ZIP_DEFLATED)
    assert "is compressed, which torch.save never does" in refused(tmp_path / "a.pt", data)


def test_members_that_share_their_bytes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "load", lambda *a, **o: pytest.fail("read"))
    data = bytearray(packed({"a/data.pkl": b"N.", "a/data/0": bytes(2000)}))
    place = data.rindex(b"PK\x01\x02")
    end = data.rindex(b"PK\x05\x06")
    entry, tail = data[place:end], data[end:]
    tail[8:12] = (12).to_bytes(2, "little") * 2
    tail[12:16] = (end - data.index(b"PK\x01\x02") + 10 * len(entry)).to_bytes(4, "little")
    assert "claims to hold 22002" in refused(
        tmp_path / "a.pt", bytes(data[:end]) + bytes(entry) * 10 + bytes(tail)
    )


def claiming(count, stride=1):
    """A file whose tensor of 10 numbers has `count` of them, by its pickle."""
    files = members(saved({"a": torch.arange(10.0)}))
    number = b"J" + count.to_bytes(4, "little")
    pickled = files["archive/data.pkl"]
    shape = b"K\x0a\x85q\x08K\x01\x85"
    assert shape in pickled and b"K\x0atq\x07Q" in pickled
    pickled = pickled.replace(shape, number + b"\x85q\x08K" + bytes([stride]) + b"\x85")
    if stride:
        pickled = pickled.replace(b"K\x0atq\x07Q", number + b"tq\x07Q")
    return packed(files | {"archive/data.pkl": pickled})


def test_a_tensor_larger_than_what_is_stored_of_it_is_refused(tmp_path):
    text = refused(tmp_path / "a.pt", claiming(2**28, stride=0))
    assert "holds 40 bytes of a tensor (268435456,) of 1073741824 bytes" in text
    for count in (11, 2**28):
        refused(tmp_path / "a.pt", claiming(count))
    (tmp_path / "a.pt").write_bytes(claiming(10))
    assert torch.equal(weights.read(tmp_path / "a.pt")["a"], torch.arange(10.0))


def test_views_and_tied_tensors_are_read(tmp_path):
    whole = torch.arange(12.0)
    state = {"a": whole[:6].view(2, 3).T, "b": whole[3:], "c": whole, "d": torch.zeros(0, 5)}
    (tmp_path / "a.pt").write_bytes(saved(state))
    assert all(torch.equal(x, state[key]) for key, x in weights.read(tmp_path / "a.pt").items())


def test_a_tensor_without_its_numbers_is_refused(tmp_path):
    data = saved({"a": [{"w": torch.empty(10**12, device="meta")}]})
    assert "holds a tensor without its numbers" in refused(tmp_path / "a.pt", data)


def test_a_damaged_sparse_tensor_does_not_spoil_the_next_file(tmp_path):
    """PyTorch keeps what it has still to validate in a global list."""
    files = members(saved({"a": torch.eye(2).to_sparse()}))
    files["archive/data/0"] = b"\xff" * len(files["archive/data/0"])  # the indices
    for name in ("a.pt", "b.pt"):
        assert "_rebuild_sparse_tensor" in refused(tmp_path / name, packed(files))
        (tmp_path / "good.pt").write_bytes(saved({"w": torch.ones(3)}))
        assert torch.equal(weights.read(tmp_path / "good.pt")["w"], torch.ones(3))


def test_lists_that_repeat_each_other_are_refused_and_shared_ones_read(tmp_path):
    laughs, cycle = [0] * 10, []
    for _ in range(30):
        laughs = [laughs] * 10
    cycle.extend([cycle, cycle])
    deep = []
    for _ in range(300):
        deep = [deep]
    for value in (laughs, cycle, deep):
        assert "lists within lists" in refused(tmp_path / "a.pt", saved({"a": value}))
    shared = [1, 2]
    (tmp_path / "a.pt").write_bytes(saved({"a": [shared] * 100}))
    assert weights.read(tmp_path / "a.pt") == {"a": [shared] * 100}


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_cannot_ask_for_bytes(tmp_path, monkeypatch, zipped):
    monkeypatch.setattr(torch, "load", lambda *a, **o: pytest.fail("unpickled"))
    bomb = b"\x80\x02cbuiltins\nbytearray\n\x8a\x05" + (2**34).to_bytes(5, "little") + b"\x85R."
    data = packed({"a/data.pkl": bomb, "a/version": b"3\n"}) if zipped else bomb
    assert "bytearray" in refused(tmp_path / "a.pt", data)


@pytest.mark.parametrize("header", [10**12, 10**6, 0])
def test_a_safetensors_header_longer_than_the_file_is_refused(tmp_path, header):
    data = header.to_bytes(8, "little") + b'{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,12]}}'
    assert "is incomplete or not a safetensors file" in refused(tmp_path / "a.safetensors", data)


def test_safetensors_offsets_beyond_the_file_are_refused(tmp_path):
    from safetensors.torch import save

    data = save({"a": torch.ones(3)})
    for old, new in ((b"[0,12]", b"[0,99]"), (b"[3]", b"[9]"), (b'"F32"', b'"XYZ"')):
        assert "not a safetensors file" in refused(
            tmp_path / "a.safetensors", data.replace(old, new)
        )


# --- code and formats ------------------------------------------------------------------------------------------------


def forms(content):
    pickles = {f"pickle{p}": pickle.dumps(content, p) for p in range(6)}
    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as file:
        for name in ("pickle", "storages", "tensors"):
            entry = tarfile.TarInfo(name)
            entry.size = len(pickles["pickle2"])
            file.addfile(entry, io.BytesIO(pickles["pickle2"]))
    old = saved(content, _use_new_zipfile_serialization=False)
    return pickles | {"tar": tar.getvalue(), "zip": saved(content), "old": old}


@pytest.mark.parametrize("form", [*forms(1)])
def test_nothing_in_a_file_runs_whatever_its_format(tmp_path, form):
    marker = tmp_path / "executed"
    text = refused(tmp_path / "a.pt", forms({"a": Run(f"touch {marker}")})[form])
    assert not marker.exists()
    assert "is not loaded, since unpickling can run any code" in text or form == "pickle0"
    if form in ("zip", "old", "pickle2"):
        assert "system" in text and "torch.save(model.state_dict(), NEW_PATH)" in text


def test_what_a_file_says_is_shown_in_one_short_line(tmp_path):
    state = {f"evil\n\x1b[31m{i}": torch.zeros(1) for i in range(9)}
    (tmp_path / "a.pt").write_bytes(saved(state))
    with pytest.raises(WeightsError) as error:
        load_pretrained(nn.Linear(1, 1), str(tmp_path / "a.pt"), "")
    assert str(error.value).isprintable() and "9 unexpected" in str(error.value)


@pytest.mark.parametrize(
    "content",
    [torch.zeros(3), [1, 2], {"state_dict": {"weight": 3}}, {3: torch.zeros(1)}, {"net": {}}],
)
def test_weights_must_be_tensors_by_name(tmp_path, content):
    def load(path):
        load_pretrained(nn.Linear(1, 1), str(path), "")

    text = refused(tmp_path / "a.pt", saved(content), load)
    assert "holds no weights but a" in text or "must hold tensors by name, and" in text


# --- the content of a checkpoint -------------------------------------------------------------------------------------

WRONG = {
    "config": [5, "seed: 1", None, []],
    "classes": ["road", ["road", 3, "sky"], [], ["a", "a", "b"], ["a", "b"]],
    "palette": [[[0, 0]] * 3, [[0, 0, 256]] * 3, [[0, 0, 0.5]] * 3, "red", [[0, 0, 0]], torch.zeros(3, 3)],
    "model": [[1], {"w": 3}, {3: torch.zeros(1)}, torch.zeros(2)],
    "teacher": [None, {"network.w": [1.0]}],
    "step": ["3", 3.5, -1, True, torch.tensor(3)],
    "stage": [-1, "main", None, 1, 10**30],
    "stage_step": [0.5, 1001, True, "3", None],
    "best": ["high", float("nan"), None],
    "seconds": [[1], float("inf")],
    "rng": [{}, [{}], [torch.zeros(4)], [{"torch": torch.zeros(8, dtype=torch.uint8)}], [{"torch": 3}]],
    "optimizer": [{}, {"state": {}, "param_groups": 3}, {"state": [], "param_groups": [{}]}, None],
    "scaler": [3],
    "prototypes": [{"centroids": 3}],
    "labelers": [[1]],
    "data": [[], {"train": 5}, {"train": []}, {"train": [3, 4]}, {3: [3, "a"]}],
    "maps": ["target/x", ["x"], ["target/../../x"], ["target/a/b"], ["other/x"], [3], ["target/.."]],
}  # fmt: skip


@pytest.mark.parametrize("key", [*WRONG])
def test_a_checkpoint_whose_key_is_of_another_kind_is_refused_by_its_name(tmp_path, key):
    for value in WRONG[key]:
        text = refused(tmp_path / "a.pt", saved(a_checkpoint() | {key: value}), checkpoint.load)
        assert "is not a checkpoint of this project: '" in text
        assert f"'{key}' must be" in text or (key == "palette" and "'classes'" in text)


@pytest.mark.parametrize("version", ["1", 2, None, True, torch.ones(3)])
def test_a_checkpoint_has_a_version(tmp_path, version):
    data = saved(a_checkpoint() | {"format": version})
    assert "(format 1)" in refused(tmp_path / "a.pt", data, checkpoint.load)


def test_a_checkpoint_without_what_evaluation_or_a_resumed_run_needs_says_what_is_missing(tmp_path):
    content = a_checkpoint()
    del content["classes"], content["config"]
    text = refused(tmp_path / "a.pt", saved(content), checkpoint.load)
    assert "not a checkpoint of this project: it lacks config, classes" in text
    for key in ("stage_step", "maps", "labelers"):
        path = tmp_path / f"without_{key}.pt"
        path.write_bytes(saved({k: v for k, v in a_checkpoint().items() if k != key}))
        with pytest.raises(WeightsError, match=f"cannot be resumed from: it lacks {key};"):
            checkpoint.load(path, contents.RESUMED)
    checkpoint.save_light(tmp_path / "best.pt", a_checkpoint())
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 3

    def resume(path):
        checkpoint.find(Config({"folder": tmp_path / "none", "resume": str(path)}))

    text = refused(tmp_path / "best.pt", read=resume)
    assert "cannot be resumed from: it lacks optimizer, scaler, rng; take a step_<n>.pt" in text


@pytest.mark.parametrize(
    "configuration, message",
    [({"model": 5}, "model must be a mapping"), ({"optimzer": {}}, "unknown key 'optimzer'"),
     ({"eval": {"flip": 3}}, "eval.flip must be true or false"), ({3: 4}, "unknown key '3'")],
)  # fmt: skip
def test_the_configuration_of_a_checkpoint_is_checked_like_that_of_a_file(
    tmp_path, configuration, message
):
    (tmp_path / "a.pt").write_bytes(saved(a_checkpoint() | {"config": configuration}))
    with pytest.raises(ConfigError, match=rf"the configuration in .*a\.pt: {message}"):
        checkpoint.load(tmp_path / "a.pt")


def test_predict_refuses_edited_checkpoints_in_one_line(tmp_path):
    pictures = tmp_path / "in"
    pictures.mkdir()
    (pictures / "a.png").touch()

    def label(path):
        predict.main([str(path), str(pictures), str(tmp_path / "out")])

    for key in ("config", "classes", "palette", "model", "step", "stage"):
        refused(tmp_path / "a.pt", saved(a_checkpoint() | {key: WRONG[key][0]}), label)


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


def archive():
    file = io.BytesIO()
    np.savez(file, a=np.ones(3))
    return file.getvalue()


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


def test_the_lists_of_data_sets_may_begin_with_a_byte_order_mark(tmp_path):
    lists = {
        CamVid: ("lists/mine.txt", {"images/a.jpg", "labels/a.png"}, "mine", {}),
        GTA5: ("lists/mine.txt", {"images/a.png", "labels/a.png"}, "mine", {}),
        VOC: ("ImageSets/Segmentation/mine.txt", {"JPEGImages/a.jpg", "SegmentationClass/a.png"}, "mine", {}),
        Folder: ("lists/mine.txt", {"images/a.jpg", "labels/a.png"}, "mine",
                 {"classes": ["x"], "list": "lists/{split}.txt", "image_dir": "images", "label_dir": "labels"}),
    }  # fmt: skip
    for cls, (listing, files, split, options) in lists.items():
        root = tmp_path / cls.__name__
        for name in [listing, *files]:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        (root / listing).write_bytes(b"\xef\xbb\xbfa\r\n")
        assert len(cls(root=root, split=split, **options)) == 1, cls
        (root / listing).write_bytes("a\n".encode("utf-16"))
        with pytest.raises(UserError, match=r"mine\.txt is not text in UTF-8 but in UTF-16"):
            cls(root=root, split=split, **options)


@pytest.mark.parametrize(
    "text, message",
    [("a: {b: c}", "list of names"), ("just text", "list of names"), ("[a, [b]]", "list of names"),
     ("a: []", "list of names"), ("", "list of names"), ("a: [b", "is not valid YAML"),
     ("[" * 400, "is not valid YAML")],
)  # fmt: skip
def test_a_file_of_classes_that_holds_something_else_is_refused(tmp_path, text, message):
    path = tmp_path / "classes.yaml"
    assert message in refused(path, text.encode(), lambda path: read_classes(str(path)))


@pytest.mark.parametrize(
    "argument",
    ["model=[a]", "out={a: b}", "templates={a: b}", "templates=[[a]]", "classes={a: {b: c}}"],
)
def test_an_argument_of_another_kind_is_one_line(tmp_path, argument):
    with pytest.raises(UserError, match=r"^[^\n]*must be [^\n]*$"):
        text_command([f"out={tmp_path}/a.pt", "classes=camvid", argument])


def test_rows_whose_names_are_no_names_are_refused_and_a_failed_write_leaves_nothing(tmp_path):
    for classes in (3, "abc", [1, 2, 3], None):
        data = saved({"vectors": torch.ones(3, 4), "classes": classes})
        with pytest.raises(ValueError, match=r"`classes` must be a list of names"):
            (tmp_path / "a.pt").write_bytes(data)
            read_rows(tmp_path / "a.pt", None)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        write_rows(tmp_path / "folder", torch.ones(3, 4), ["a", "b", "c"])
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "folder"}


def test_json_that_a_crash_has_cut(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('{"step": 1}\n{"step": 2}\n5\n{"step": 3, "loss')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
    for text in (path.read_text(), '{"a": ', "1" * 5000, "[" * 10**5):
        assert "is incomplete or damaged" in refused(path, text.encode(), read_json)
    path.write_text(json.dumps({"a": [1]}))
    assert read_json(path) == {"a": [1]}
    assert "there is no file" in refused(tmp_path / "none.json", read=read_json)


COUNTS = np.arange(12).reshape(4, 3)


def other_file(array):
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


BAD_CACHES = {
    "plain": lambda data: other_file(COUNTS),
    "negative": lambda data: other_file(-COUNTS),
    "float": lambda data: other_file(COUNTS * np.nan),
    "shape": lambda data: other_file(COUNTS.T),
    "objects": lambda data: other_file(np.array([Run("false")], object)),
    "zip": lambda data: archive(),
    "cut": lambda data: data[:-1],
    "empty": lambda data: b"",
    "giant": lambda data: data.replace(b"(4, 3)", b"(4, 10**12)"),
    "flip": lambda data: data[:140] + bytes([data[140] ^ 1]) + data[141:],
}


@pytest.mark.parametrize("kind", [*BAD_CACHES])
def test_a_damaged_cache_of_counts_is_ignored_with_a_warning(tmp_path, caplog, kind):
    path = tmp_path / "new" / "a.npy"
    write_counts(path, "key", COUNTS)
    assert np.array_equal(read_counts(path, "key", (4, 3)), COUNTS)
    assert np.array_equal(np.load(path), COUNTS) and not caplog.text
    path.write_bytes(BAD_CACHES[kind](path.read_bytes()))
    assert read_counts(path, "key", (4, 3)) is None
    assert "damaged or of another data set" in caplog.text and "counted again" in caplog.text


def test_counts_of_another_data_set_are_not_taken(tmp_path, caplog):
    """A cache file that was copied over another."""
    write_counts(tmp_path / "a.npy", "one", COUNTS)
    assert read_counts(tmp_path / "a.npy", "other", (4, 3)) is None
    assert read_counts(tmp_path / "a.npy", "one", (3, 4)) is None
    assert caplog.text.count("of another data set") == 2
    assert read_counts(tmp_path / "none.npy", "one", (4, 3)) is None
    assert caplog.text.count("of another data set") == 2


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    from datasets.toy import Toy

    (tmp_path / "file").touch()
    data = Toy(domain="real", length=2, size=[24, 32])
    assert class_counts(data, tmp_path / "file" / "cache").sum() == 2 * 24 * 32
    assert "could not write" in caplog.text and "counts again" in caplog.text


# --- random damage ---------------------------------------------------------------------------------------------------


def test_random_damage_is_read_or_refused_in_one_line():
    found = run(seed=0, count=100)
    assert {*found} == {"ok", "UserError"} and min(found.values()) > 10


def test_an_edit_changes_something():
    draw = random.Random(0)
    before = saved(a_checkpoint())
    assert sum(saved(edited(a_checkpoint(), draw)) != before for _ in range(20)) > 17


@pytest.mark.parametrize("library", ["timm", "open_clip"])
def test_weights_that_cannot_be_downloaded_are_one_line_that_says_what_to_do(
    tmp_path, monkeypatch, library
):
    def offline(*arguments, **options):
        raise {"timm": OSError, "open_clip": RuntimeError}[library]("no network\nat all")

    monkeypatch.setattr(pytest.importorskip(library), "create_model", offline)
    with pytest.raises(UserError, match=r"^[^\n]*no network[^\n]*(weights|pretrained)=PATH[^\n]*$"):
        if library == "timm":
            build("models.backbones", {"name": "timm.Timm", "model": "resnet18.a1_in1k"})
        else:
            text_command([f"out={tmp_path}/a.pt", "classes=camvid"])
