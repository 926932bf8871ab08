"""Maps that a stage stores before its first step: written whole, read back with the image's geometry, found again."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from datasets.base import DataError
from datasets.toy import Toy
from datasets.transforms import Augment
from engine import distributed, prepare
from engine.errors import UserError
from engine.prepare import Preparation
from models.backbones.resnet import ResNet
from models.classifiers.linear import Linear
from models.decoders.fcn import FCN
from models.segmentor import Segmentor


def network():
    backbone = ResNet(depth=18, stages=3, weights="none")
    decoder = FCN(in_channels=backbone.channels, width=8)
    return Segmentor(backbone, decoder, Linear(in_channels=decoder.channels, num_classes=11))


def preparation(folder, augment=None, **options):
    source = Toy(domain="synthetic", length=3, size=[32, 48], augment=augment)
    target = Toy(domain="real", length=2, size=[32, 48], labels=False, augment=augment)
    parts = network(), source, target, {}, folder, torch.device("cpu"), contextlib.nullcontext()
    return Preparation(*parts, **options)


def shade(index, image, label):
    return (image[0].mean(0) * 255).byte()


def test_a_stored_map_comes_back_with_the_geometry_of_its_image(tmp_path):
    made = preparation(tmp_path / "maps", Augment(crop=[24, 40], scale=[1.0, 1.0], flip=0.5))
    made.store("shade", made.source, shade, {"rule": "brightness"})
    source = made.training["source"]
    for sample in range(4):
        item = source[sample % 3, sample]
        grey = (item["image"].float() / 255).mean(0)
        assert ((grey * 255).byte().int() - item["extra"]["shade"].int()).abs().max() <= 1
    assert made.training["target"].extra == {} and made.source.extra == {}
    settings = json.loads((tmp_path / "maps" / "source" / "shade" / "settings.json").read_text())
    assert (
        settings["rule"] == "brightness"
        and settings["images"] == 3
        and settings["classes"][0] == "Sky"
    )


def test_labels_are_stored_as_palette_pictures(tmp_path):
    made = preparation(tmp_path / "maps")
    ids = torch.full((32, 48), 4).index_fill(0, torch.arange(3), 255)
    made.store("pseudo_labels", made.target, lambda *_: ids, {}, palette=True)
    path = next((tmp_path / "maps" / "target" / "pseudo_labels").rglob("*.png"))
    with Image.open(path) as picture:
        assert picture.mode == "P" and tuple(picture.getpalette()[12:15]) == tuple(Toy.PALETTE[4])
        assert np.unique(picture).tolist() == [4, 255]
        colours = np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)
        assert {*map(tuple, colours.tolist())} == {(0, 0, 0), tuple(Toy.PALETTE[4])}


def test_the_network_labels_in_eval_mode_and_the_target_has_no_labels(tmp_path):
    made = preparation(tmp_path)
    assert not made.network.training
    before = {k: v.clone() for k, v in made.network.state_dict().items()}
    for _, image, label in made.images(made.target):
        assert (
            (label == 255).all()
            and image.shape == (1, 3, 32, 48)
            and not made.segment(image).logits.requires_grad
        )
    assert all(torch.equal(before[k], v) for k, v in made.network.state_dict().items())


def test_each_process_makes_its_share(tmp_path, monkeypatch):
    made, seen = preparation(tmp_path), []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    for rank in range(2):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        seen.append([index for index, *_ in made.images(made.source)])
    assert seen == [[0, 2], [1]]


def test_maps_appear_as_a_whole_or_not_at_all(tmp_path):
    made = preparation(tmp_path / "maps")

    def fail(index, image, label):
        if index == 1:
            raise KeyboardInterrupt
        return shade(index, image, label)

    with pytest.raises(KeyboardInterrupt):
        made.store("shade", made.source, fail, {})
    assert (
        not (tmp_path / "maps" / "source" / "shade").exists()
        and made.training["source"].extra == {}
    )
    made.store("shade", made.source, shade, {})  # again, over what was left
    assert not list((tmp_path / "maps").rglob("*partial*"))
    assert len(list((tmp_path / "maps" / "source" / "shade").rglob("*.png"))) == 3


def test_only_maps_are_replaced(tmp_path):
    made, root = preparation(tmp_path / "maps"), tmp_path / "maps" / "source"

    def store():
        made.store("shade", made.source, shade, {})
        return sorted(path.name for path in (root / "shade").rglob("*"))

    (root / "shade").mkdir(parents=True)  # empty
    names = store()
    assert names == store() and "settings.json" in names
    (root / "shade" / "settings.json").unlink()
    (root / "shade" / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match=r"source/shade holds no maps .* is not replaced"):
        store()
    (root / "shade").rename(root / "shade.partial")
    with pytest.raises(UserError, match=r"shade\.partial holds no maps"):
        store()
    (root / "shade.partial").rename(tmp_path / "mine")
    (root / "shade").write_text("a file")
    with pytest.raises(UserError, match="holds no maps"):
        store()
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["../thesis", "{tmp_path}/thesis", "a/../../thesis", ".", "link"])
def test_maps_are_written_nowhere_else(tmp_path, name):
    made, thesis = preparation(tmp_path / "maps"), tmp_path / "maps" / "thesis"
    for folder in (thesis, tmp_path / "thesis", tmp_path / "maps" / "source"):
        folder.mkdir(parents=True)
        (folder / "settings.json").write_text("{}")
    (tmp_path / "maps" / "source" / "link").symlink_to(thesis)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError, match="leads out of the folder"):
        made.store(name.format(tmp_path=tmp_path), made.source, shade, {})
    assert sorted(tmp_path.rglob("*")) == before


def test_an_interrupted_stage_finds_its_maps_or_says_that_they_are_gone(tmp_path):
    first = preparation(tmp_path / "maps")
    first.store("shade", first.source, shade, {})
    second = preparation(tmp_path / "maps")
    second.attach(first.stored())
    assert first.stored() == second.stored() == ["maps/source/shade"]
    second.attach(["source/shade"])  # as older checkpoints name it
    assert first.stored() == second.stored()
    assert torch.equal(
        first.training["source"][1]["extra"]["shade"],
        second.training["source"][1]["extra"]["shade"],
    )
    with pytest.raises(UserError, match=r"maps .*pseudo_labels of the interrupted stage are gone"):
        second.attach(["target/pseudo_labels"])


def test_later_stages_read_maps_that_are_made_of_the_same(tmp_path, monkeypatch):
    one = network()
    monkeypatch.setitem(globals(), "network", lambda: one)

    def stage(folder, made_of=("a", 1), **options):
        made = preparation(tmp_path / folder, **options)
        found = made.reuse("shade", made.source, made_of)
        if not found:
            made.store("shade", made.source, shade, {}, made_of=made_of)
        return found, made.stored()

    assert stage("2_first") == (False, ["2_first/source/shade"])
    assert stage("10_third") == (True, ["2_first/source/shade"])
    assert not (tmp_path / "10_third").exists()  # no second copy
    files = sorted(tmp_path.rglob("*"))
    assert stage("1_before") == (False, ["1_before/source/shade"])  # not of a later stage
    shutil.rmtree(tmp_path / "1_before")
    others = [{"short_sides": (24, 0)}, {"shown": ["colours"]}, {"made_of": ("a", 2)}]
    for number, options in enumerate(others):
        name = f"{3 + number}_other"
        assert stage(name, **options) == (False, [f"{name}/source/shade"])
        assert stage("9_last", **options) == (True, [f"{name}/source/shade"])
    assert files == [path for path in sorted(tmp_path.rglob("*")) if path in files]
    again = preparation(tmp_path / "10_third")  # a run that goes on there
    again.attach(["2_first/source/shade"])
    assert "shade" in again.training["source"][1]["extra"]
    shutil.rmtree(tmp_path / "2_first")
    with pytest.raises(UserError, match="2_first/source/shade of the interrupted stage are gone"):
        again.attach(["2_first/source/shade"])


def test_a_map_that_is_lost_while_training_is_named(tmp_path):
    made = preparation(tmp_path / "maps")
    made.store("shade", made.source, shade, {})
    next((tmp_path / "maps" / "source" / "shade").rglob("*.png")).unlink()
    with pytest.raises(DataError, match="shade"):
        [made.training["source"][i] for i in range(3)]


def test_a_backbone_for_maps_is_frozen(tmp_path):
    encoder = preparation(tmp_path).backbone(
        {"name": "resnet.ResNet", "depth": 18, "weights": "none"}
    )
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    assert prepare.KINDS == ("source", "target")


def test_pictures_have_the_size_of_the_evaluation_and_maps_that_of_the_file(tmp_path):
    made = preparation(tmp_path / "maps", short_sides=(24, 16))
    sizes = {
        kind: [(image.shape[-2:], label.shape[-2:]) for _, image, label in made.images(dataset)]
        for kind, dataset in (("source", made.source), ("target", made.target))
    }
    assert {*sizes["source"]} == {((24, 36), (32, 48))}
    assert {*sizes["target"]} == {((16, 24), (32, 48))}
    made.store("shade", made.target, shade, {})
    image = next(made.images(made.target))[1]
    item = made.training["target"][0]
    assert item["extra"]["shade"].shape == item["image"].shape[-2:] == (32, 48)
    assert torch.equal(item["extra"]["shade"][::2, ::2], shade(0, image, None))


def test_source_pictures_have_the_style_that_the_student_sees(tmp_path, monkeypatch):
    seen = []

    def style(source, target):
        seen.append((source, target))
        return 0.5 * source

    made = preparation(tmp_path, style=style, seed=3)
    plain = preparation(tmp_path)
    pairs = [*zip(made.images(made.source), plain.images(plain.source))]
    for (index, image, _), (_, original, _) in pairs:
        source, target = seen[index]
        assert torch.equal(image, 0.5 * original) and torch.equal(source, original)
        partners = [image for _, image, _ in plain.images(plain.target)]
        assert torch.equal(target, partners[made.partners[index]])
    assert len(pairs) == len(seen) == 3
    for (_, image, _), (_, original, _) in zip(
        made.images(made.target), plain.images(plain.target)
    ):
        assert torch.equal(image, original)
    monkeypatch.setattr(distributed, "world_size", lambda: 2)  # each pair stays what it was
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    ((index, image, _),) = made.images(made.source)
    assert (
        index == 1 and torch.equal(seen[-1][1], seen[1][1]) and torch.equal(image, pairs[1][0][1])
    )


def test_source_pictures_go_through_the_stem_of_the_source(tmp_path):
    made = preparation(tmp_path)
    backbone = ResNet(depth=18, stages=3, weights="none", stem="per_domain")
    made.network.backbone = backbone.eval()
    image = next(made.images(made.source))[1]
    for domain in ("source", "target"):
        expected = made.network.segment(image, domain).logits
        assert torch.equal(made.segment(image, domain).logits, expected)
    with torch.no_grad():
        made.network.backbone.conv1.weight.zero_()
    assert not torch.equal(made.segment(image, "source").logits, made.segment(image).logits)


def test_loaders_of_a_preparation_ignore_signals_as_those_of_the_training_do():
    """A scheduler sends them to all processes; the run itself leaves, with one sentence."""
    data = Toy(domain="real", length=8, size=[32, 48])
    shown = prepare.images(data, torch.device("cpu"), workers=1)
    found = [next(shown)[0]]
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGTERM)
    assert found + [index for index, *_ in shown] == [*range(8)]
