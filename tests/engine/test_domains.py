"""engine/domains.py: planted gaps are found, equal domains have none, and eval.py writes the terms."""

import json
from types import SimpleNamespace

import pytest
import torch

import eval as evaluation
from datasets.toy import Toy
from engine import domains
from engine.config import ConfigError
from engine.errors import UserError
from engine.statistics import resize_labels
from tests.runs import TINY_DG, train

LABEL = torch.zeros(1, 6, 6, dtype=torch.uint8)


def rows(classes, shift=0.0, images=20, dim=4):
    """Cells {class: rows} whose first coordinate is moved by `shift`."""
    found = {}
    for k in classes:
        x = torch.randn(images, dim, dtype=torch.float64) + 3 * torch.eye(dim).double()[k]
        x[:, 0] += shift
        found[k] = torch.cat([torch.arange(images).double()[:, None], x], 1)
    return found


def test_equal_domains_cannot_be_told_apart_and_planted_ones_can():
    error, between = domains.gap(rows(range(3), images=400), rows(range(3), images=400))
    assert 0.44 < error < 0.56 and between < 0.4
    error, between = domains.gap(rows(range(3), images=400), rows(range(3), 50.0, images=400))
    assert error == 0 and abs(between - 50) < 0.5


def test_classes_of_one_set_alone_and_their_frequency_are_no_gap():
    source, domain = rows(range(3), images=400), rows(range(3), images=400)
    domain = {0: domain[0], 1: domain[1][:40], 3: domain[2] + 100}
    error, between = domains.gap(source, domain)
    assert 0.4 < error < 0.6 and between < 0.8
    assert domains.gap(domain, source)[1] == pytest.approx(between)


@pytest.mark.parametrize("images", [398, 399, 400])
def test_thinning_takes_images_of_both_folds(images, monkeypatch):
    """Five cells of each image: every tenth of 1995 rows would be of an even one."""
    monkeypatch.setattr(domains, "images", lambda *_, **__: [(i, None, LABEL) for i in range(images)])
    network = SimpleNamespace(
        segment=lambda *_, **__: SimpleNamespace(features=torch.randn(1, 4, 3, 3), embedding=None)
    )
    found = domains.cells(network, None, None, torch.no_grad(), 0, 0)["features"][0]
    assert len(found) == domains.PER_SET and (found[:, 0] % 2).mean() == 0.5
    moved = found + torch.tensor([0, 50, 0, 0, 0])
    assert domains.gap({0: found}, {0: moved})[0] == 0


def test_sets_without_a_class_in_both_folds_have_no_gap():
    one, several = rows([0], images=1), rows([0, 1], images=20)
    assert domains.gap(one, several) is domains.gap(several, one) is None
    assert domains.gap(rows([0]), rows([1])) is domains.gap(several, {}) is None


def test_the_probe_is_tested_on_images_that_it_has_not_seen():
    """What tells the domains apart in images of even number means the opposite in the others."""
    numbers = torch.arange(200).double()
    sign = torch.where(numbers % 2 == 0, 1.0, -1.0)
    source, domain = (torch.stack([numbers, side * sign, torch.randn(200)], 1) for side in (-1, 1))
    labels = torch.cat([torch.zeros(200), torch.ones(200)]).double()
    assert domains.probe_error(torch.cat([source, domain]).double(), labels) == 1.0


def test_cells_are_unit_features_of_their_class_at_most_five_of_an_image(monkeypatch):
    class Network:
        def segment(self, image, heads):
            assert heads
            features = torch.cat([image, image.square()], 1)[..., ::2, ::2]
            return SimpleNamespace(features=features, embedding=None)

    dataset = Toy(domain="real", split="test", length=7, size=[24, 32])
    given = (Network(), dataset, torch.device("cpu"), torch.no_grad(), 0, 0)
    found = domains.cells(*given)
    assert [*found] == ["features"]
    for k, kept in found["features"].items():
        assert kept.dtype == torch.float64 and kept.shape[1] == 7
        torch.testing.assert_close(kept[:, 1:].norm(dim=1), torch.ones(len(kept)).double())
        assert kept[:, 0].unique(return_counts=True)[1].max() <= 5
        for row in kept:
            sample = dataset[int(row[0])]
            image = sample["image"][:, ::2, ::2].double() / 255
            features = torch.nn.functional.normalize(torch.cat([image, image.square()]), dim=0)
            of_class = features[:, resize_labels(sample["label"][None], (12, 16))[0] == k]
            assert (of_class - row[1:, None]).abs().sum(0).min() < 1e-6
    monkeypatch.setattr(domains, "PER_SET", 4)
    assert max(map(len, domains.cells(*given)["features"].values())) == 4


def test_eval_writes_the_terms_of_both_spaces(tmp_path, capsys):
    train(tmp_path / "run", "train.iters=1", config=TINY_DG)
    unseen = [str(tmp_path / "run" / "best.pt"), "data.seen=[]", "data.test.synthetic={name: none}"]
    evaluation.main(unseen)
    table = next((tmp_path / "run").glob("eval_best_*/domains.txt"))
    before = table.read_text()
    evaluation.main([*unseen, "domains=true"])  # as seen from data.val, which is no test set
    assert table.read_text() == before
    assert json.loads((table.parent / "domains.json").read_text())["source"] == "val"
    night = "data.test.{}={{name: toy.Toy, domain: night, split: test, length: 2, size: [48, 64]}}"
    for name, message in (("val", "has the name of data.val"), ("domains", "has the name of a file of results")):
        with pytest.raises(ConfigError, match=rf"data\.test\.{name} {message}"):
            evaluation.main([*unseen, night.format(name), "domains=true"])
    evaluation.main([str(tmp_path / "run" / "best.pt"), "domains=true"])
    folder = tmp_path / "run" / "eval_best"
    content = json.loads((folder / "domains.json").read_text())
    assert content["source"] == "synthetic" and [*content["spaces"]] == ["features", "joint"]
    accuracies = {
        name: json.loads((folder / f"{name}.json").read_text())["summary"]["mAcc"]
        for name in ("synthetic", "night", "fog")
    }
    for space, terms in content["spaces"].items():
        assert [*terms] == ["night", "fog"] and (folder / f"domains_{space}.png").exists()
        for name, found in terms.items():
            assert [*found] == list(domains.COLUMNS)
            assert found["error"] == pytest.approx(1 - accuracies[name] / 100)
            assert found["source error"] == pytest.approx(1 - accuracies["synthetic"] / 100)
            assert found["distance"] == pytest.approx(max(0, 2 - 4 * found["probe error"]))
            assert found["bound"] == found["source error"] + found["distance"] / 2
            assert 0 < found["class distance"] < 2
    assert "joint, source synthetic" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="domains must be true, not yes"):
        evaluation.main([str(tmp_path / "run" / "best.pt"), "domains=yes"])
    only = [f"data.test.{name}={{name: none}}" for name in ("night", "fog")]
    with pytest.raises(UserError, match="needs a set beside that of the training domain, synth"):
        evaluation.main([str(tmp_path / "run" / "best.pt"), "domains=true", *only])
    none = ("data.seen=[]", "data.val={name: none}")
    with pytest.raises(ConfigError, match=r"needs one process, and a set of the training domain"):
        evaluation.main([str(tmp_path / "run" / "best.pt"), "domains=true", *none])
