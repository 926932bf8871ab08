"""Every command of README.md and docs/, with its outcome; it takes long, so CI does not run it.

    python -m tests.commands              all of them, at most 60 seconds each
    python -m tests.commands 20 export    those with this text, at most 20 seconds each

A command runs as it is written, in a temporary copy of the tree. CHECKPOINT, PICTURES and what else
stands for a file of the reader becomes a network that has learnt nothing, and drawn pictures. What
runs longer gets SIGTERM, as from a scheduler, and must end with 0.

    ran       to its end
    started   and was stopped
    slow      it was still importing at the limit
    built     something is not here: the words were checked, network and losses built
    checked   the same, and there is no configuration to build
    FAILED    with the last line that it wrote
"""

import glob
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import cv2
import torch

from datasets.toy import Toy
from engine.config import load
from engine.files import write_picture
from losses.build import build_losses
from models.build import build_segmentor
from tests.runs import ROOT, TINY, TINY_UDA, train
from tests.test_readme import PAGES, blocks, commands, wrong_commands

INSTALLS = ("venv", "pip")


def copy_tree(folder):
    """The tree in another folder, as links, with what stands for the reader's files."""
    for path in ROOT.iterdir():
        if path.name not in ("runs", ".git", "configs"):
            (folder / path.name).symlink_to(path)
    shutil.copytree(ROOT / "configs", folder / "configs")
    mine = next(b for b in blocks("yaml", PAGES["docs/data.md"]) if "configs/mine.yaml" in b)
    (folder / "configs" / "mine.yaml").write_text(mine)
    drawn = [Toy(size=[96, 128], length=2)[i]["image"].permute(1, 2, 0).numpy() for i in range(2)]
    video = cv2.VideoWriter(str(folder / "film.mp4"), 0x7634706D, 5, (128, 96))  # "mp4v"
    for i, picture in enumerate(drawn):
        for name in (f"PICTURES/{i}.png", f"photos/{i}.jpg", "LARGE.tif"):
            (folder / name).parent.mkdir(exist_ok=True)
            write_picture(folder / name, picture)
        video.write(picture)
    video.release()
    quick = ("train.iters=1", "eval.pictures=0", "data.val.length=1", "data.test.toy.length=1")
    train(folder / "runs" / "untrained", *quick, "uda.compare=false", config=TINY_UDA)
    shutil.copy(folder / "runs" / "untrained" / "best.pt", folder / "CHECKPOINT")
    shutil.copy(TINY, folder / "configs" / "CONFIG")


def stand_in(words, folder):
    """The words of a command with files of the reader replaced; checkpoints that it names are made."""
    made = []
    for word in words:
        key, _, file = word.rpartition("=")  # model.init=runs/... too
        if re.search(r"^runs/.*\.pt$", file):
            path = folder / file.replace("*", "a")
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / "CHECKPOINT", path)
            word = f"{key}={path.relative_to(folder)}" if key else str(path.relative_to(folder))
        found = sorted(glob.glob(word, root_dir=folder)) if word.startswith("runs/") else []
        made += found or ([] if word == "..." else [word.replace("CONFIG", "configs/CONFIG")])
    return made


def lacking(words, folder):
    """What a command needs that is not here; "" for nothing."""
    text = " ".join(words)
    if "PATH" in text or "HOST" in text:
        return "the reader's data or weights"
    if "--nproc_per_node=8" in text and torch.cuda.device_count() < 8:
        return "eight GPUs"
    if ".onnx" in text and not importlib.util.find_spec("onnx"):
        return "the package onnx"
    if "pretrained=openai" in text or ("benchmarks.reproduce" in text and "table" not in text):
        return "weights"
    if cfg := configuration(words, folder):
        specs = [cfg.data.train, cfg.data.target, cfg.data.val, *cfg.data.test.values()]
        specs = [s for spec in specs for s in (spec if isinstance(spec, list) else [spec])]
        roots = {spec.get("root", cfg.data.root) for spec in specs if spec["name"] != "none"}
        if missing := [root for root in roots if root and not (folder / root).is_dir()]:
            return f"the data {missing[0]}"
        if cfg.model.backbone.get("weights", "imagenet") in ("imagenet", "pretrained"):
            return "the backbone's weights"
    return ""


def configuration(words, folder):
    """What a training command or datasets.check reads, None for another command."""
    place = next((i for i, w in enumerate(words) if w.startswith("configs/")), None)
    if place is None or "benchmarks" in words[place]:
        return None
    return load(folder / words[place], [w for w in words[place + 1 :] if "=" in w])


def built(words, folder):
    """Check a command without running it -> "built" or "checked"; an error where that fails."""
    cfg = configuration(words, folder)
    if not cfg:
        return "checked"
    classes = [str(number) for number in range(19)]
    with torch.device("meta"):
        network = build_segmentor(cfg.model, classes, pretrained=False)
    context = {"num_classes": 19, "in_channels": network.decoder.channels, "classes": classes}
    build_losses(cfg.losses, seed=0, counts=None, **context)
    return "built"


def outcome(words, folder, seconds):
    """Run a command, or check it -> its outcome and what there is to say."""
    if wrong := wrong_commands("```bash\n" + " ".join(f"'{word}'" for word in words) + "\n```"):
        return "FAILED", wrong[0]
    words = stand_in(words, folder)
    if missing := lacking(words, folder):
        try:
            return built(words, folder), f"not here: {missing}"
        except Exception as error:  # whatever it is, the list goes on
            return "FAILED", f"{type(error).__name__}: {error}"
    python = [sys.executable if word == "python" else word for word in words]
    process = subprocess.Popen(
        python, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, stopped = process.communicate(timeout=seconds)[0], False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGTERM)
        said, stopped = process.communicate()[0], True
    if stopped and process.returncode == -signal.SIGTERM:
        return "slow", "give it more seconds"
    lines = [line for line in re.split(r"[\r\n]+", said) if line.strip()]
    # Before its first step a script leaves at once, with the signal's code.
    if process.returncode not in ((0, 128 + signal.SIGTERM) if stopped else (0,)):
        return "FAILED", lines[-1] if lines else f"code {process.returncode}"
    return ("started" if stopped else "ran"), ""


def main(seconds="60", part=""):
    failed, told = 0, {}
    os.environ["PYTHONPATH"] = str(ROOT)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        copy_tree(folder)
        for page, text in PAGES.items():
            for words in commands(text):
                line = " ".join(words)
                if part not in line or line in told or {*INSTALLS} & {*words}:
                    continue
                told[line], note = outcome(words, folder, float(seconds))
                failed += told[line] == "FAILED"
                print(f"{told[line]:8} {page:26} {line}{note and f'   ({note})'}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
