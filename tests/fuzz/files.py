"""Damaged and malicious files: each must be read as it was, or refused by a UserError; nothing in it may run.

run(seed=0, count=200)      Counter: ok, UserError, changed, executed, slow, and `traceback <place>`
"""

import io
import os
import pickle
import random
import tempfile
import time
import traceback
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import nn

from datasets import statistics
from engine import checkpoint, files, weights
from engine.errors import UserError
from models.prototypes.text import read_classes, read_rows
from tests.runs import ROOT, leaves

NAMES = ["road", "sky", "car"]
STATE = {"0.weight": torch.arange(12.0).view(3, 4), "0.bias": torch.arange(3.0)}
COUNTS = np.arange(12).reshape(4, 3)


class Run:
    """An object whose pickle runs a command."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def saved(content, **options):
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def a_checkpoint():
    return {
        "format": checkpoint.FORMAT,
        "step": 3,
        "stage": 0,
        "stage_step": 3,
        "model": dict(STATE),
        "teacher": dict(STATE),
        "prototypes": {"centroids.sums": torch.ones(3, 4)},
        "labelers": {},
        "optimizer": {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(3)}},
            "param_groups": [{"lr": 1e-3, "betas": (0.9, 0.999), "params": [0]}],
        },
        "scaler": {},
        "rng": [checkpoint.rng_state()],
        "best": 12.5,
        "seconds": 3.0,
        "config": {"seed": 1, "optimizer": {"lr": 1e-3}, "losses": [{"name": "occl.OCCL"}]},
        "classes": list(NAMES),
        "palette": [[0, 0, 0], [9, 9, 9], [255, 0, 0]],
        "maps": ["target/pseudo_labels"],
    }


def rows():
    return {"vectors": torch.ones(3, 4), "classes": list(NAMES)}


def npy():
    file = io.BytesIO()
    np.save(file, np.ones((3, 4), np.float32))
    return file.getvalue()


def safetensors():
    from safetensors.torch import save

    return save(STATE)


CONTENTS = {
    "checkpoint": a_checkpoint,
    "weights": lambda: {"state_dict": dict(STATE)},
    "rows": rows,
}
FILES = {
    "checkpoint.pt": lambda: saved(a_checkpoint()),
    "weights.pt": lambda: saved(STATE),
    "old.pth": lambda: saved(STATE, _use_new_zipfile_serialization=False),
    "rows.pt": lambda: saved(rows()),
    "weights.safetensors": safetensors,
    "rows.npy": npy,
    "counts.npy": lambda: statistics.encoded(COUNTS, "key"),
    "names.txt": lambda: "\n".join(NAMES).encode(),
    "classes.yaml": lambda: b"road: [road, street]\nsky: sky\n",
    "results.json": lambda: b'{"step": 3, "results": {"toy": {"mIoU": 50.0}}}',
}


def rows_of(path, names):
    try:
        return read_rows(path, names)
    except ValueError as error:
        if type(error) is ValueError:  # as engine/build.py does
            raise UserError(str(error)) from error
        raise


def use(path):
    """All that reads a file of this kind, as a user's command does -> what was read."""
    kind = path.name.split(".")[0]
    if path.suffix in (".pt", ".pth", ".safetensors"):
        content = weights.read(path)
        if kind == "checkpoint":
            checkpoint.load(path, checkpoint.contents.RESUMED)
        elif kind == "rows":
            rows_of(path, None)
        else:
            weights.load_pretrained(nn.Sequential(nn.Linear(4, 3)), str(path), "")
        return content
    return {
        "rows.npy": lambda: rows_of(path, NAMES),
        "counts.npy": lambda: statistics.read_counts(path, "key", COUNTS.shape),
        "names.txt": lambda: rows_of(path.with_name("whole.npy"), str(path)),
        "classes.yaml": lambda: read_classes(str(path)),
        "results.json": lambda: (files.read_json_lines(path), files.read_json(path)),
    }[path.name]()


# --- damage ----------------------------------------------------------------------------------------------------------


def flip(data, draw):
    data = bytearray(data)
    for _ in range(draw.choice([1, 1, 1, 8])):
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(data)


def cut(data, draw):
    return data[: draw.randrange(len(data))]


def overwrite(data, draw):
    start, length = draw.randrange(len(data)), draw.randint(1, 64)
    filling = draw.choice([bytes(length), b"\xff" * length, draw.randbytes(length)])
    return data[:start] + filling + data[start + length :]


def move(data, draw):
    a, b, c = sorted(draw.randrange(len(data)) for _ in range(3))
    return data[:a] + data[b:c] + data[a:b] + data[c:]


def rename(data, draw):
    """Another number where one stands: what headers claim."""
    places = [i for i, byte in enumerate(data[:2000]) if 48 <= byte < 58]
    start = draw.choice(places) if places else 0
    return data[:start] + draw.choice([b"9" * 12, b"-1", b"0", b"nan"]) + data[start + 1 :]


def repacked(data, draw):
    """A zip with right checksums and wrong members: exchanged, missing, damaged, renamed or compressed."""
    try:
        archive = zipfile.ZipFile(io.BytesIO(data))
    except zipfile.BadZipFile:
        return flip(data, draw)
    members = [[member.filename, archive.read(member)] for member in archive.infolist()]
    a, b = draw.sample(members, 2)
    pickled = members[0]
    how = draw.randrange(6)
    if how == 0:
        a[1], b[1] = b[1], a[1]
    elif how == 1:
        members.remove(a)
    elif how == 2:
        a[1] = flip(a[1], draw)
    elif how == 3:
        a[0] = f"{a[0]}.gone"
    else:
        pickled[1] = draw.choice([flip, overwrite, move, cut])(pickled[1], draw)
    file = io.BytesIO()
    kind = draw.choice([zipfile.ZIP_STORED] * 5 + [zipfile.ZIP_DEFLATED])
    with zipfile.ZipFile(file, "w", kind) as out:
        for name, content in members:
            out.writestr(zipfile.ZipInfo(name), content, kind)
    return file.getvalue()


def odd(draw):
    deep = []
    for _ in range(draw.choice([3, 30, 200])):
        deep = [deep] * draw.choice([1, 3])
    cycle = []
    cycle.append(cycle)
    values = [
        None,
        -1,
        10**30,
        0.5,
        float("nan"),
        True,
        "",
        "../../x",
        "x\n" * 500,
        b"x",
        (),
        [],
        {},
    ]
    values += [[None], {"a": 1}, {1: 2}, deep, cycle, {"name": 3}, [[1, 2]], [[1, 2, 999]]]
    values += [torch.zeros(()), torch.zeros(3, dtype=torch.uint8), torch.ones(1).expand(10**11)]
    values += [torch.eye(2).to_sparse(), torch.empty(10**12, device="meta"), torch.zeros(0, 5)]
    return draw.choice(values)


def edited(content, draw):
    """A content in which a key at some depth has another value, another name, or is gone."""
    place = content
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        if not isinstance(place[key], (dict, list)) or not place[key] or draw.random() < 0.5:
            break
        place = place[key]
    how = draw.random()
    if how < 0.75:
        place[key] = odd(draw)
    elif how < 0.9 or isinstance(place, list):
        del place[key]
    else:
        place[draw.choice([3, "other", "module.x", None])] = place.pop(key)
    return content


def evil(content, draw, marker):
    """A content with an object that runs a command when it is unpickled, in one of the formats."""
    content = edited(content, draw)
    content[draw.choice([*content, "evil"])] = Run(f"touch {marker}")
    return draw.choice(
        [
            lambda: saved(content),
            lambda: saved(content, _use_new_zipfile_serialization=False),
            lambda: pickle.dumps(content, draw.randrange(6)),
        ]
    )()


def case(draw, folder, marker):
    """A damaged file -> its path, and what it held before, None where it was made with other content."""
    if draw.random() < 0.4:
        name = draw.choice([*CONTENTS])
        content, path = CONTENTS[name](), folder / f"{name}.pt"
        if draw.random() < 0.3:
            path.write_bytes(evil(content, draw, marker))
        else:
            path.write_bytes(saved(edited(content, draw)))
        return path, None
    path = folder / draw.choice([*FILES])
    data = FILES[path.name]()
    path.write_bytes(data)
    before = use(path)
    how = draw.choice([flip, flip, cut, overwrite, move, rename, repacked])
    path.write_bytes(how(data, draw))
    # Only zip archives and the counts have checksums.
    return path, before if how is flip and (data[:2] == b"PK" or "counts" in path.name) else None


# --- running ---------------------------------------------------------------------------------------------------------


def same(a, b):
    a, b = leaves(a), leaves(b)
    return a.keys() == b.keys() and all(
        np.array_equal(x, y)
        if isinstance(x, np.ndarray)
        else torch.equal(x, y)
        if torch.is_tensor(x)
        else x == y
        for x, y in ((a[key], b[key]) for key in a)
    )


def place(error):
    """Where in this project an error came from."""
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(str(ROOT))
    ]
    inner = [f for f in frames if "fuzz" not in f.filename] or frames
    return f"{Path(inner[-1].filename).relative_to(ROOT)}:{inner[-1].lineno} {type(error).__name__}"


def run(seed, count=200):
    """Read `count` damaged files -> how it ended, and how often."""
    draw, found = random.Random(seed), Counter()
    with tempfile.TemporaryDirectory() as folder:
        folder, marker = Path(folder), Path(folder) / "executed"
        (folder / "whole.npy").write_bytes(npy())
        for _ in range(count):
            path, before = case(draw, folder, marker)
            start = time.monotonic()
            try:
                after = use(path)
                changed = before is not None and after is not None and not same(before, after)
                found["changed" if changed else "ok"] += 1
            except UserError as error:
                found["UserError"] += 1
                found["several lines"] += "\n" in str(error) or len(str(error)) > 1000
                found["unsafe advice"] += "weights_only" in str(error)
            except Exception as error:
                found[f"traceback {place(error)}"] += 1
            found["slow"] += time.monotonic() - start > 5
            found["executed"] += marker.exists()
            marker.unlink(missing_ok=True)
    return +found
