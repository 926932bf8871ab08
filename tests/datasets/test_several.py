"""Several data sets as one: every sample is that of its part, and what a run stores for it is found again."""

import contextlib
import json
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from datasets import check
from datasets.base import DataError
from datasets.build import build_data
from datasets.sampler import RareClassSampler, StreamSampler, make_loader
from datasets.several import Several
from datasets.statistics import class_counts
from datasets.toy import Toy
from datasets.transforms import Augment
from engine.config import TARGET, ConfigError, derived_seed, load
from engine.errors import UserError
from engine.inference import evaluate
from engine.prepare import Preparation
from tests.datasets.files import Files
from tests.runs import TINY

SIZE = (8, 12)


class Others(Files):
    PALETTE = ((9, 0, 0), (8, 0, 0), (7, 0, 0))
    KNOWN_BAD = {"1": "for a test"}  # noqa: RUF012


def files(root, count, seed, names="0123456789"):
    """Images of noise; the label of image i has i + 1 rows of class 2, the rest is class 0."""
    for i in range(count):
        image = np.random.default_rng((seed, i)).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
        label = np.zeros(SIZE, np.uint8)
        label[: i + 1] = 2
        for kind, pixels in (("images", image), ("labels", label)):
            (root / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(root / kind / f"{names[i]}.png")
    return root


def both(tmp_path, **options):
    """Sets of three and two images whose files have the same names."""
    one, two = files(tmp_path / "one", 3, seed=1), files(tmp_path / "two", 2, seed=2)
    return [Files(root=one, **options), Files(root=two, **options)]


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in ("image", "label")) and all(
        torch.equal(a["extra"][key], b["extra"][key]) for key in {*a["extra"], *b["extra"]}
    )


def test_samples_are_those_of_the_parts_one_after_the_other(tmp_path):
    parts = both(tmp_path)
    data = Several(parts)
    expected = [part[i] for part in parts for i in range(len(part))]
    assert len(data) == len(expected) == 5 and [data.place(i) for i in range(5)] == [
        (0, 0),
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 1),
    ]
    for index, sample in enumerate(data):  # ends at the last
        assert same(sample, expected[index]) and sample["index"] == sample["sample"] == index
        image, label = data.load(index)
        assert np.array_equal(image, sample["image"].permute(1, 2, 0)) and np.array_equal(
            label, sample["label"]
        )
        assert np.array_equal(data.load_label(index), label)
    assert data.samples == parts[0].samples + parts[1].samples
    for outside in (5, -1):
        with pytest.raises(IndexError):
            data.load(outside)


def test_augmentation_is_a_function_of_the_seed_and_the_sample_in_the_whole_stream(tmp_path):
    augment = Augment(crop=[6, 6], color=[0.4, 0.4, 0.4, 0.1])
    parts = both(tmp_path, augment=augment, seed=3)
    data = Several(parts)
    for sample in range(6):
        drawn = data[(4, sample)]
        assert same(drawn, parts[1][(1, sample)]) and (drawn["index"], drawn["sample"]) == (
            4,
            sample,
        )
    assert not same(data[(4, 0)], data[(4, 1)]) and data.seed == 3
    plain = data.without_augmentation()
    assert plain[4]["image"].shape == (3, *SIZE) and data[4]["image"].shape == (3, 6, 6)
    assert same(plain[4], both(tmp_path)[1][1])


def test_classes_are_those_that_the_parts_share(tmp_path):
    parts = [both(tmp_path)[0], Others(root=tmp_path / "two")]
    data = Several(parts)
    assert (data.CLASSES, data.PALETTE, data.labels, data.SCORED) == (
        Files.CLASSES,
        Files.PALETTE,
        True,
        (),
    )
    assert data.split == "Files train + Others train"
    other = Files(root=tmp_path / "one", label_space={"a": ["a"], "c": ["c"], "b": ["b"]})
    with pytest.raises(
        DataError, match=r"need the same classes: Files has a, b, c; Files has a, c, b$"
    ):
        Several([*parts, other])
    with pytest.raises(
        DataError, match=r"labels in all of them or in none: Files train \+ Others train$"
    ):
        Several([parts[0], Others(root=tmp_path / "two", labels=False)])
    with pytest.raises(DataError, match="the list is empty"):
        Several([])


def test_a_class_is_scored_where_any_part_scores_it(tmp_path):
    def scored(*spaces):
        made = [
            Files(root=files(tmp_path, 1, 0), label_space=dict(zip("xyz", space)))
            for space in spaces
        ]
        return Several(made).SCORED

    assert scored((["a"], [], []), (["b"], [], ["c"])) == ("x", "z")
    assert scored((["a"], [], []), (["b"], ["a"], ["c"])) == ()
    assert scored(([], [], ["a"]), (["b"], [], [])) == ("x", "z")


def test_parts_may_be_drawn_and_may_be_several_themselves(tmp_path):
    toys = [Toy(domain=domain, length=2, size=[24, 32]) for domain in ("synthetic", "fog", "night")]
    data = Several([Several(toys[:2]), toys[2]])
    assert len(data) == 6 and [data.stem(i) for i in (3, 4)] == [
        "0/1/fog/train/00001",
        "1/night/train/00000",
    ]
    assert same(data[3], toys[1][1]) and data[3]["index"] == 3 and same(data[5], toys[2][1])
    assert data.split == "Several Toy train + Toy train + Toy train"


# --- maps ----------------------------------------------------------------------------------------------------------


def test_stems_are_distinct_and_lead_to_the_maps_of_each_part(tmp_path):
    parts = both(tmp_path / "data")
    data = Several(parts)
    stems = [data.stem(i) for i in range(5)]
    assert stems == ["0/images/0", "0/images/1", "0/images/2", "1/images/0", "1/images/1"]
    assert data[4]["extra"] == {}
    for index, stem in enumerate(stems):
        path = tmp_path / "maps" / f"{stem}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full(SIZE, index, np.uint8)).save(path)
    data.extra["number"] = tmp_path / "maps"
    assert [int(data[i]["extra"]["number"].unique()) for i in range(5)] == [0, 1, 2, 3, 4]
    assert data.without_augmentation()[0]["extra"] == {} and parts[0].extra == parts[1].extra == {}
    (tmp_path / "maps" / "1" / "images" / "0.png").unlink()
    with pytest.raises(
        DataError, match=r"two/images/0.png has no map 'number': there is no file .*maps/1/images/0"
    ):
        data[3]


class Shades:
    """Stands for a network: three classes by brightness."""

    training = False

    def eval(self):
        return self

    def train(self, mode):
        return self

    def segment(self, image, domain="target"):
        class Output:
            grey = image.mean(1, keepdim=True)
            logits = torch.cat([0.5 - grey, 0 * grey - 1, grey - 0.5], 1)

        return Output


def test_what_a_stage_stores_comes_back_with_the_geometry_of_its_image(tmp_path):
    augment = Augment(crop=[6, 6], scale=[1.0, 1.0], flip=0.5)
    source, target = (
        Several(both(tmp_path / name, augment=augment, labels=labels))
        for name, labels in (("s", True), ("t", False))
    )
    made = Preparation(
        Shades(),
        source,
        target,
        {},
        tmp_path / "maps",
        torch.device("cpu"),
        contextlib.nullcontext(),
    )
    for dataset in (made.source, made.target):
        made.store("red", dataset, lambda index, image, label: (255 * image[0, 0]).byte(), {})
    made.store(
        "labels", made.target, lambda index, image, label: torch.full(SIZE, index), {}, palette=True
    )
    assert made.stored() == [
        f"maps/{kind}" for kind in ("source/red", "target/red", "target/labels")
    ]
    for data in (source, target):
        (batch,) = make_loader(data, StreamSampler(5, batch_size=5, stop=1), workers=2)
        for i in range(5):
            item = {key: batch[key][i] for key in ("image", "index")}
            assert (item["image"][0].int() - batch["extra"]["red"][i].int()).abs().max() <= 1
            if data is target:
                assert batch["extra"]["labels"][i].unique().tolist() == [item["index"]]
    settings = json.loads((tmp_path / "maps" / "target" / "labels" / "settings.json").read_text())
    assert settings["images"] == 5 and settings["classes"] == ["a", "b", "c"]


# --- sampling, counting, evaluation --------------------------------------------------------------------------------


def test_images_are_drawn_in_proportion_to_the_sizes_of_the_sets(tmp_path):
    data = Several(both(tmp_path))
    loader = make_loader(data, StreamSampler(len(data), batch_size=5, stop=8))
    drawn = torch.cat([batch["index"] for batch in loader])
    assert torch.bincount(drawn).tolist() == [8] * 5


def test_counts_and_rare_class_sampling_cover_all_parts(tmp_path):
    parts = both(tmp_path / "data")
    counts = class_counts(Several(parts), tmp_path / "cache", workers=2)
    rows = [1, 2, 3, 1, 2]
    assert counts.tolist() == [[12 * (8 - n), 0, 12 * n] for n in rows]
    assert counts.tolist() == [
        c for part in parts for c in class_counts(part, tmp_path / "cache").tolist()
    ]
    assert (
        class_counts(Several(parts[::-1]), tmp_path / "cache").tolist()
        == counts[[3, 4, 0, 1, 2]].tolist()
    )
    assert len(list((tmp_path / "cache").iterdir())) == 4
    sampler = RareClassSampler(counts, temperature=1e-3, min_pixels=20, batch_size=1, stop=1)
    assert {sampler.index(sample) for sample in range(100)} == {
        1,
        2,
        4,
    }  # at least two rows of the rare class
    unlabelled = Several(both(tmp_path / "data", labels=False))
    assert unlabelled.load_label(0) is None and not unlabelled.labels
    with pytest.raises(
        DataError, match=r"classes of Several Files train \+ Files train cannot be counted"
    ):
        class_counts(unlabelled, tmp_path / "cache")


def test_evaluation_over_several_sets_adds_their_pixels(tmp_path):
    class Options:
        mode, short_side, scales, flip, subsets = "whole", 0, [1.0], False, {}

    parts = both(tmp_path)
    arguments = (Options, torch.device("cpu"), contextlib.nullcontext())
    one, two, all_of_them = (
        evaluate(Shades(), data, *arguments).matrix for data in (*parts, Several(parts))
    )
    assert (
        torch.equal(one + two, all_of_them) and all_of_them.sum() == 5 * 96 and one.diag().sum() > 0
    )


def test_check_walks_over_several_sets_and_reports_what_is_left_out(tmp_path, capsys):
    sets = [both(tmp_path)[0], Others(root=tmp_path / "two")]
    text = "\n".join(
        check.describe(Several(sets), "train", *check.measure(Several(sets), "train", 0))
    )
    assert (
        "train: Several Files train + Others train, 4 images" in text
        and "two/images/1.png (for a test)" in text
    )
    config = """
    data:
      workers: 0
      augment: {name: transforms.Augment, crop: [16, 16]}
      train:
        - {name: toy.Toy, domain: fog, length: 3, size: [24, 32]}
        - {name: toy.Toy, domain: real, length: 2, size: [24, 32]}
      target:
        - {name: toy.Toy, domain: night, length: 2, size: [24, 32]}
        - {name: toy.Toy, domain: rain, length: 2, size: [24, 32]}
    """
    (tmp_path / "c.yaml").write_text(textwrap.dedent(config))
    check.main([str(tmp_path / "c.yaml"), f"folder={tmp_path / 'run'}"])
    text = capsys.readouterr().out
    assert "train: Several Toy train + Toy train, 5 images" in text and "target: Several" in text
    assert (Path(tmp_path) / "run" / "check" / "augmented.png").is_file()


# --- the data of a configuration ------------------------------------------------------------------

ONE = "{name: toy.Toy, size: [16, 24], length: 3}"


def test_a_configuration_names_the_sets_of_a_run():
    texts = [f"data.{name}={ONE}" for name in ("train", "val", "monitor")]
    texts += [f"data.test={{toy: {{name: none}}, other: {ONE}}}", f"data.target=[{ONE}, {ONE}]"]
    data = build_data(load(TINY, texts))
    assert [len(data.train), len(data.val), len(data.monitor)] == [3, 3, 3]
    assert list(data.test) == ["other"]
    assert isinstance(data.target, Several) and len(data.target) == 6
    assert all((sample["label"] == 255).all() for sample in data.target)
    assert data.train.augment and data.target.parts[0].augment and not data.val.augment
    assert data.target.parts[0].seed == derived_seed(data.train.seed, TARGET)
    small = build_data(load(TINY, ["data.val={name: none}", f"data.train=[{ONE}]"]))
    assert isinstance(small.train, Toy) and small[1] is small.target is small.monitor is None


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("data.train=[{toy}, {toy_}]", r"data\.train\.1: .*length"),
        ("data.train=[{toy}, {other}]", r"data\.train: data sets that are used as one need"),
        ("data.val={toy_}", r"data\.val: .*length"),
        ("data.train={name: none}", r"data\.train names no data set"),
        ("data.augment.crop=abc", r"data\.augment: .*crop"),
        ("data.target_augment={name: transforms.Augment, crop: abc}", r"data\.target_augment: "),
    ],
)
def test_what_is_wrong_is_told_with_the_key_it_stands_under(change, says):
    wrong = ONE.replace("3", "-3")
    other = "{name: toy.Toy, size: [16, 24], label_space: {road: [Road], sky: [Sky]}}"
    change = change.replace("{toy_}", wrong).replace("{toy}", ONE).replace("{other}", other)
    with pytest.raises(UserError, match=f"^{says}"):
        build_data(load(TINY, [change, f"data.target={ONE}"]))


def test_sets_that_do_not_belong_together_are_named():
    other = "{name: toy.Toy, size: [16, 24], length: 3, label_space: {road: [Road], sky: [Sky]}}"
    for key in ("val", "target", "monitor", "test.other"):
        with pytest.raises(ConfigError, match=rf"data\.{key} has 2 classes \(road, sky\) and data"):
            build_data(load(TINY, [f"data.{key}={other}"]))
    with pytest.raises(ConfigError, match=r"set data\.val or data\.test"):
        build_data(load(TINY, ["data.val={name: none}", "data.test.toy={name: none}"]))
