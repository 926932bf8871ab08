"""export.py: the file's labels are the checkpoint's, for pictures of any size, or no file is written."""

import json
import logging
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import export
from engine.errors import UserError
from models.backbones.resnet import ResNet
from predict import load
from tests.runs import TINY, train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder with a checkpoint of one training step and three pictures."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, "train.iters=1", "eval.pictures=0", "model.channels_last=true", config=TINY)
    (folder / "in").mkdir()
    for number, size in enumerate(((48, 32, 3), (65, 50, 3), (40, 91, 3))):
        pixels = np.random.default_rng(number).integers(0, 255, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "in" / f"{number}.png")
    return folder


def test_a_file_labels_as_the_checkpoint_does_bit_for_bit(run, tmp_path, capsys, recwarn):
    out = tmp_path / "model.pt2"
    export.main([str(run / "best.pt"), str(out), str(run / "in"), "device=cpu"])
    said = capsys.readouterr().out
    assert "100.0000% of the labels in 3 pictures are the checkpoint's" in said
    assert f"{out}: {out.stat().st_size / 2**20:.1f} MiB" in said and " s a picture" in said
    assert not [
        w for w in recwarn if "complete tensor" in str(w.message)
    ]  # nothing a reader can do
    model, about = load(run / "best.pt"), {"about.json": ""}
    program = torch.export.load(out, extra_files=about)
    about = json.loads(about["about.json"])
    assert about == {"classes": model.classes, "palette": model.palette}
    picture = np.random.default_rng(9).integers(0, 255, (2, 77, 53, 3), dtype=np.uint8)
    labels, logits = program.module()(torch.from_numpy(picture))
    assert labels.dtype == torch.uint8 and logits.shape[:2] == (2, 11)
    assert all(np.array_equal(*pair) for pair in zip(labels.numpy(), model(picture)))
    vectors = model.network.classifier.means()  # of cbp.CBP
    kernel = program.state_dict["network.classifier.weight"]
    assert torch.equal(kernel, vectors[:, :, None, None]) and "components" not in str(program.graph)


@pytest.mark.parametrize("name", ["vit.ViT", "swin.Swin"])
def test_transformers_are_exported(name, tmp_path, capsys):
    small = {
        "vit.ViT": "size: t, taps: [0, 1]",
        "swin.Swin": "width: 32, depths: [1, 1, 2, 1]",
    }[name]
    model = f"backbone: {{name: {name}, {small}, weights: none}}, classifier: {{name: cbp.CBP}}"
    model += ", decoder: {name: segformer_mlp.SegFormerMLP, width: 16}"
    options = (f"model={{{model}}}", "train.iters=1", "eval.pictures=0", "losses.occl.weight=0")
    train(tmp_path / "run", *options)
    for number, size in enumerate(((48, 64), (65, 51), (48, 64))):
        pixels = np.random.default_rng(number).integers(0, 255, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    arguments = [str(tmp_path / "run" / "best.pt"), str(tmp_path / "model.pt2")]
    arguments += [str(tmp_path / "*.png"), *(["size=48x64"] if name == "swin.Swin" else [])]
    export.main(arguments)
    count = 2 if name == "swin.Swin" else 3
    assert f"100.0000% of the labels in {count} pictures" in capsys.readouterr().out


def test_no_file_is_written_whose_labels_are_others(run, tmp_path, monkeypatch):
    class Other(export.PlainConvolution):
        def __init__(self, vectors):
            super().__init__(vectors.roll(1, 0))

    monkeypatch.setattr(export, "PlainConvolution", Other)
    out = tmp_path / "model.pt2"
    with pytest.raises(UserError, match=r"model.pt2 is not written: \d+ of 8426 labels in 3 pic"):
        export.main([str(run / "best.pt"), str(out), str(run / "in")])
    assert not [*tmp_path.iterdir()]


def test_a_picture_that_cannot_be_read_is_skipped_and_none_left_is_said_first(run, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("engine"), "propagate", True)
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "bad.jpg").write_bytes(b"no picture")
    arguments = [str(run / "best.pt"), str(tmp_path / "model.pt2"), str(tmp_path / "in")]
    with monkeypatch.context() as patch:
        patch.setattr(export, "load", None)  # not even asked
        with pytest.raises(UserError, match="none of the 1 pictures could be read"):
            export.main(arguments)
    shutil.copy(next((run / "in").iterdir()), tmp_path / "in")
    caplog.clear()
    export.main(arguments)
    assert (tmp_path / "model.pt2").is_file() and "skipped: cannot read the image" in caplog.text


def test_what_cannot_be_exported_is_one_sentence(run, tmp_path, monkeypatch):
    arguments = [str(run / "best.pt"), str(tmp_path / "model.pt2"), str(run / "in")]
    for option in ("eval.mode=slide", "eval.flip=true", "eval.scales=[0.5]", "eval.short_side=64"):
        with pytest.raises(UserError, match=r"one view of the whole picture: add eval\.mode=whole"):
            export.main([*arguments, option])
    for size in ("12", "0x5", "64x48x3", "ax5"):
        with pytest.raises(UserError, match=rf"size={size} must be HEIGHTxWIDTH"):
            export.main([*arguments, f"size={size}"])
    with pytest.raises(UserError, match=r"in has no picture of 64x48"):
        export.main([*arguments, "size=64x48"])
    with monkeypatch.context() as patch:
        patch.setattr(ResNet, "any_size", False)
        with pytest.raises(UserError, match=r"a file of ResNet is for pictures of one size: add"):
            export.main(arguments)
    with pytest.raises(UserError, match=r"model\.tflite must end in \.pt2 or \.onnx"):
        export.main([arguments[0], "model.tflite", arguments[2]])
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(
        UserError, match="needs three packages: pip install onnx onnxscript onnxrun"
    ):
        export.main([arguments[0], str(tmp_path / "model.onnx"), arguments[2]])
    assert not [*tmp_path.iterdir()]


def test_an_onnx_file_agrees_with_the_checkpoint(run, tmp_path, capsys):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    export.main([str(run / "best.pt"), str(tmp_path / "model.onnx"), str(run / "in")])
    assert "% of the labels in 3 pictures are the checkpoint's" in capsys.readouterr().out
