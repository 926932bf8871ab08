"""train_dg.py: resume, several processes, what reaches inference, what is frozen, and the protocol."""

import contextlib
import json
import re
from types import SimpleNamespace

import open_clip
import pytest
import torch
import torch.nn.functional as F

from engine import checkpoint
from engine.config import load
from engine.errors import UserError
from engine.report import domain_table
from engine.statistics import IGNORE
from losses.ppar import Reweight
from models.build import restore
from models.segmentor import Segmentor
from tests.records import a_batch, a_step, an_output
from tests.runs import ROOT, TINY_DG, assert_same_state, last, leaves, run, scalars, train
from train_dg import evidence

ATTENTION = (
    "model.heads.text_attention={name: text_attention.TextAttention, layers: 1}",
    "losses.ppar.easy=attention",
)
FIDELITY = (
    "losses=[{name: cross_entropy.CrossEntropy}, {name: ppar.Alignment, easy: attention}, "
    "{name: ppar.TextFidelity}]"
)


def test_resuming_is_bitwise(tmp_path):
    straight = train(tmp_path / "straight", config=TINY_DG)
    train(tmp_path / "parts", config=TINY_DG)
    checkpoint.list_steps(tmp_path / "parts")[0].unlink()
    code, output = run(tmp_path / "parts", config=TINY_DG)
    assert code == 0 and "step_0000003.pt" in output, output
    assert_same_state(last(tmp_path / "straight"), last(tmp_path / "parts"))
    one, two = (leaves(last(tmp_path / name)["rng"]).values() for name in ("straight", "parts"))
    assert all(torch.equal(a, b) for a, b in zip(one, two))
    resumed = scalars(tmp_path / "parts")
    assert {s: v["train/loss"] for s, v in resumed.items()} == {
        s: v["train/loss"] for s, v in straight.items()
    }
    assert last(tmp_path / "parts")["prototypes"]["visual.seen"].any()


def test_two_processes_equal_one(tmp_path):
    exact = (
        "model.frozen_bn=[backbone, decoder, projector]",
        "model.decoder.dropout=0.0",
        "schedule.warmup=0",
    )
    exact += ("train.iters=3",)
    exact += (
        "optimizer={name: SGD, lr: 1e-3, head_lr_factor: 1.0, momentum: 0.9}",
        "checkpoint.every=1",
    )
    exact += ("losses.ppar.granularity=coarse_to_fine", "dg.reweight.level=image")
    for name, processes in (("one", 1), ("two", 2)):
        code, output = run(
            tmp_path / name, *exact, processes=processes, double=True, config=TINY_DG
        )
        assert code == 0, output
    for step in (1, 3):
        one, two = (
            checkpoint.load(tmp_path / name / f"step_{step:07d}.pt") for name in ("one", "two")
        )
        assert_same_state(one, two, 1e-10, ("model", "teacher", "prototypes", "optimizer"))
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    for step in one:
        for key in (key for key in one[step] if key.startswith(("train/loss", "dg/"))):
            assert one[step][key] == pytest.approx(two[step][key], rel=0, abs=1e-10), (step, key)
    matrices = [
        json.loads((tmp_path / name / "eval" / "fog.json").read_text())["matrix"]
        for name in ("one", "two")
    ]
    assert matrices[0] == matrices[1]


def test_the_branch_changes_no_logit_at_inference(tmp_path):
    train(tmp_path / "run", *ATTENTION, FIDELITY, config=TINY_DG)
    path = checkpoint.list_steps(tmp_path / "run")[0]
    network = restore(path, ["eval.weights=student"])[0]
    image = torch.rand(1, 3, 32, 48)
    expected = network.segment(image)
    assert expected.embedding is None and expected.text is None
    network.head_names = []
    assert torch.equal(network.segment(image).logits, expected.logits)


def test_every_part_can_be_switched_off_and_then_nothing_of_it_is_left(tmp_path):
    off = (
        "model.heads.projector={name: none}",
        "prototypes={text: {name: none}, visual: {name: none}}",
        "train.iters=2",
    )
    off += ("dg.reweight={name: none}", "losses=[{name: cross_entropy.CrossEntropy}]")
    steps = train(tmp_path / "plain", *off, config=TINY_DG)
    assert not any("weight" in key or "ppar" in key for key in steps[1])


# The loss is ramped and weights are warmed up, so that at step 1 both are what they are without;
# teacher prototypes are there from step 2 on.
SHORT = (
    "train.iters=3",
    "prototypes.visual.start=0.0",
    "model.decoder.dropout=0.0",
    "eval.pictures=0",
)
ALIGNED = {"loss_ppar"}
WEIGHTED = {"loss_ppar", "loss_cross_entropy"}
# Option: (overrides, the first step whose losses it changes, which of them it changes there).
OPTIONS = {
    "order": (("losses.ppar.order=hard_to_easy",), 2, ALIGNED),
    "text alone": (("losses.ppar.order=hard",), 2, ALIGNED),
    "by difficulty": (("losses.ppar.order=by_difficulty",), 2, ALIGNED),
    "all pixels": (("losses.ppar.curriculum=1",), 2, ALIGNED),
    "coarse to fine": (("losses.ppar.granularity=coarse_to_fine",), 2, ALIGNED),
    "images": (("dg.reweight.level=image",), 2, WEIGHTED),
    "no weights": (("dg.reweight={name: none}",), 2, WEIGHTED),
    "styles": (("dg.style={name: style.ColorStats}",), 1, {"loss_cross_entropy"}),
    "strong colours": (("dg.strong={name: mixers.ColorBlur}",), 1, {"loss_cross_entropy"}),
    "random text": (
        ("prototypes.text={name: basis.RandomDirections, space: joint, view: none}",),
        2,
        WEIGHTED,
    ),
    "student": (("prototypes.visual.view=source",), 2, WEIGHTED),
    "attention": ((*ATTENTION, FIDELITY), 1, {"loss_ppar_2"}),
    "centroids": (
        (
            "prototypes={text: {name: basis.OrthogonalBasis, space: joint, view: none}, "
            "visual: {name: centroids.Centroids, space: joint, view: teacher}}",
        ),
        2,
        WEIGHTED,
    ),
    "accumulate": (("train.accumulate=2",), 1, {"loss_cross_entropy"}),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Scalars of the run without any of the options."""
    return train(tmp_path_factory.mktemp("plain"), *SHORT, config=TINY_DG)


def differing(one, two):
    """The losses of a step that differ between two runs, or that one of them lacks."""
    keys = {key for key in one.keys() | two.keys() if key.startswith("train/loss_")}
    return {
        key.removeprefix("train/")
        for key in keys
        if key not in one or key not in two or one[key] != pytest.approx(two[key], rel=1e-5)
    }


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_changes_what_it_is_about_and_nothing_before(tmp_path, plain, name):
    overrides, first, expected = OPTIONS[name]
    steps = train(tmp_path / "run", *SHORT, *overrides, config=TINY_DG)
    changed = {number: differing(plain[number], steps[number]) for number in (1, 2, 3)}
    assert not any(changed[number] for number in range(1, first))
    assert changed[first] == expected
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    scores = [results["results"][domain]["mIoU"] for domain in ("night", "fog")]
    assert results["unseen_mIoU"] == pytest.approx(sum(scores) / 2)
    assert results["seen"] == ["synthetic"]


# --- what reaches which part -----------------------------------------------------------------------------------------


def test_prototypes_learn_from_the_teacher_where_it_is_right():
    labels = torch.tensor([[[0, 1], [2, IGNORE]]])
    logits = torch.zeros(1, 3, 2, 2)
    for (row, column), guess in {(0, 0): 0, (0, 1): 2, (1, 0): 2, (1, 1): 1}.items():
        logits[0, guess, row, column] = 1
    embedding, features = torch.randn(1, 4, 2, 2), torch.randn(1, 5, 2, 2)
    output = an_output(logits, features, embedding=embedding)
    teacher = SimpleNamespace(segment=lambda image, heads: output)
    step = a_step({"source": an_output(-logits, -features, embedding=-embedding)}, labels)
    step.source = a_batch(torch.zeros(1, 3, 2, 2), labels)

    def shown(view, space):
        [found] = evidence([step], view, space, teacher, None, contextlib.nullcontext())
        return found

    right = torch.tensor([[[0, IGNORE], [2, IGNORE]]])
    for space, expected in (("joint", F.normalize(embedding, dim=1)), ("features", features)):
        for view, sign, known in (("teacher", 1, right), ("source", -1, labels)):
            found, seen, weights = shown(view, space)
            torch.testing.assert_close(found, sign * expected)
            assert torch.equal(seen, known) and weights is None


def test_prototypes_learn_from_the_towers_cells_of_one_class():
    labels = torch.zeros(1, 8, 8, dtype=torch.int64)
    labels[:, :4, 4:] = 1
    labels[:, 4:, 4:] = 2
    labels[:, :2, :2] = 1  # three quarters of the cell are still its own
    labels[:, 4:6, 4:6] = 0
    labels[:, 6:, :3] = 2  # leaves less of the cell
    dense = torch.randn(1, 4, 2, 2)
    step = a_step(None, labels, source=a_batch(torch.rand(1, 3, 8, 8), labels))
    seen = []
    tower = SimpleNamespace(dense=lambda image: seen.append(image) or dense)
    [(features, cells, _)] = evidence([step], "tower", "joint", None, tower, None)
    assert torch.equal(features, dense) and seen[0] is step.source.image
    assert cells.tolist() == [[[0, 1], [IGNORE, 2]]]


@pytest.fixture
def tiny_clip(tmp_path):
    """A small CLIP of open_clip, and a text of its joint space for the classes of the toy."""
    from datasets.toy import Toy

    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    tower = {"image_size": 64, "layers": 3, "width": 32, "head_width": 16, "patch_size": 16}
    config = {"embed_dim": 24, "vision_cfg": tower, "text_cfg": text}
    (tmp_path / "small-ViT.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path)
    torch.save({"vectors": torch.randn(11, 24), "classes": list(Toy.CLASSES)}, tmp_path / "text.pt")
    return (
        "model.heads.projector.channels=24",
        f"prototypes.text={{name: text.Text, space: joint, view: none, file: {tmp_path / 'text.pt'}}}",
        "dg.tower={name: clip.ViT, model: small-ViT, taps: [2], weights: none}",
        "dg.reweight.source=both",
        "train.iters=2",
    )


def test_a_frozen_tower_with_batch_norm_keeps_its_statistics(tmp_path, tiny_clip, monkeypatch):
    from models.backbones.clip import ResNet

    text = {"context_length": 8, "vocab_size": 64, "width": 32, "heads": 2, "layers": 1}
    tower = {
        "image_size": 64,
        "layers": [1, 1, 1, 1],
        "width": 16,
        "head_width": 64,
        "patch_size": None,
    }
    (tmp_path / "small-RN.json").write_text(
        json.dumps({"embed_dim": 24, "vision_cfg": tower, "text_cfg": text})
    )
    open_clip.add_model_config(tmp_path)
    towers, states, original = [], [], ResNet.dense

    def dense(self, image):
        towers.append(self)
        states.append({key: value.clone() for key, value in self.state_dict().items()})
        return original(self, image)

    monkeypatch.setattr(ResNet, "dense", dense)
    tower = "dg.tower={name: clip.ResNet, model: small-RN, weights: none}"
    train(tmp_path / "run", *tiny_clip, tower, "prototypes.visual.view=tower", config=TINY_DG)
    assert len({id(tower) for tower in towers}) == 1 and any(
        "running_mean" in key for key in states[0]
    )
    assert all(torch.equal(value, states[0][key]) for key, value in towers[0].state_dict().items())
    assert not any(p.requires_grad for p in towers[0].parameters())


def test_the_student_alone_sees_styles_and_strong_colours_and_the_weights_reach_the_losses(
    tmp_path, tiny_clip, monkeypatch
):
    from models.backbones.clip import ViT

    pictures = {"tower": [], "teacher": [], "student": [], "batch": []}
    dense, forward, segment, after = ViT.dense, Segmentor.forward, Segmentor.segment, Reweight.after

    def see(who, image):
        pictures[who].append(image.detach().clone())

    def zero(self, step):
        after(self, step)
        see("batch", step.source.image)
        step.weights["source"] = torch.zeros_like(step.weights["source"])

    monkeypatch.setattr("datasets.style.ColorStats.__call__", lambda self, own, other: own + 10)
    monkeypatch.setattr(
        "datasets.mixers.ColorBlur.__call__", lambda self, image, numbers: image * 3
    )
    monkeypatch.setattr(ViT, "dense", lambda s, x: see("tower", x) or dense(s, x))
    monkeypatch.setattr(
        Segmentor, "forward", lambda s, v, n: see("student", v["source"].image) or forward(s, v, n)
    )
    monkeypatch.setattr(
        Segmentor, "segment", lambda s, x, **k: see("teacher", x) or segment(s, x, **k)
    )
    monkeypatch.setattr(Reweight, "after", zero)
    changes = ("dg.style={name: style.ColorStats}", "dg.strong={name: mixers.ColorBlur}")
    steps = train(tmp_path / "run", *tiny_clip, *changes, "eval.pictures=0", config=TINY_DG)
    assert len(pictures["batch"]) == 2
    for number, batch in enumerate(pictures["batch"]):
        assert torch.equal(pictures["tower"][number], batch)
        torch.testing.assert_close(pictures["student"][number], (batch + 10) * 3)
    assert torch.equal(pictures["teacher"][0], pictures["batch"][1])  # starts at the second step
    for step in steps.values():
        assert step["train/loss_cross_entropy"] == step["train/loss_ppar"] == 0


@pytest.mark.parametrize("offline", [0, 5])
def test_clip_runs_end_to_end_and_stays_as_it_is(tmp_path, tiny_clip, offline, monkeypatch):
    from models.backbones.clip import ViT

    seen, original = [], ViT.dense

    def dense(self, image):
        seen.append((self, self.training, any(p.requires_grad for p in self.parameters())))
        return original(self, image)

    monkeypatch.setattr(ViT, "dense", dense)
    visual = f"prototypes.visual={{name: visual_text.VisualText, view: tower, offline: {offline}, start: 0.0}}"
    losses = "losses=[{name: cross_entropy.CrossEntropy, by_weights: true}, {name: ppar.Alignment},"
    losses += "{name: ppar.FrozenFeatures, weight: 0.1}]"
    train(tmp_path / "run", *tiny_clip, visual, losses, config=TINY_DG)
    assert len(seen) == (5 + 2 if offline else 2 + 2)  # the pass or the updates, and the steps
    assert not any(training or grad for _, training, grad in seen)
    saved = last(tmp_path / "run")
    assert (
        not any("tower" in key for key in saved["model"])
        and saved["prototypes"]["visual.seen"].any()
    )


# --- the protocol ----------------------------------------------------------------------------------------------------


def test_a_run_that_selects_on_a_target_warns_and_is_marked(tmp_path, capsys):
    short = ("train.iters=1", "eval.pictures=0")
    for number, val in enumerate(
        ("{domain: night, split: val}", "{domain: synthetic, split: val}")
    ):
        target = number == 0
        spec = val.replace("{", "{name: toy.Toy, length: 2, size: [32, 48], ")
        train(tmp_path / str(number), f"data.val={spec}", *short, config=TINY_DG)
        results = json.loads((tmp_path / str(number) / "results.json").read_text())
        assert (
            ("selected_on_target" in results)
            == target
            == ("not of the training domain" in "".join(capsys.readouterr()))
        )
    same = "data.val={name: toy.Toy, domain: night, split: test, length: 2, size: [32, 48]}"
    train(tmp_path / "same", same, *short, config=TINY_DG)
    assert "shares images with the test domain night" in "".join(capsys.readouterr())


def test_the_table_has_a_mean_of_the_unseen_domains_alone():
    table = domain_table(
        {"a": {"day": 60.0, "night": 30.0, "fog": 40.0}, "b": {"day": 61.0, "night": 20.0}}, ["day"]
    )
    lines = [line.split() for line in table.splitlines()]
    assert lines[0] == ["mIoU", "day*", "night", "fog", "unseen"]
    assert lines[1] == ["a", "60.00", "30.00", "40.00", "35.00"]
    assert lines[2] == ["b", "61.00", "20.00", "-", "-"]


def test_eval_compares_checkpoints_over_domains(tmp_path, capsys):
    import eval as evaluation

    for seed in (0, 1):
        train(
            tmp_path / str(seed), f"seed={seed}", "train.iters=1", "eval.pictures=0", config=TINY_DG
        )
    paths = [str(checkpoint.list_steps(tmp_path / str(seed))[0]) for seed in (0, 1)]
    evaluation.main([*paths, "eval.pictures=0"])
    table = next(tmp_path.glob("0/eval_step_*/domains_*.txt")).read_text()
    for seed in (0, 1):
        results = json.loads((tmp_path / str(seed) / "results.json").read_text())
        line = table.splitlines()[1 + seed].split()
        assert line[0] == paths[seed] and line[-1] == f"{results['unseen_mIoU']:.2f}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.seen=[day]", "data.seen names 'day', which is not in data.test"),
        (
            "prototypes.visual.view=tower",
            "prototypes.visual: view must be source, none, teacher .* or tower",
        ),
        ("prototypes.visual.space=text", "prototypes.visual: space must be features, or joint"),
        (
            "model.heads.projector={name: none}",
            "prototypes.text: space must be features, or joint with model.heads.projector",
        ),
        ("train.teacher=0.0", "prototypes.visual: view must be"),
        (
            "dg.tower={name: resnet.ResNet, weights: none}",
            "dg.tower: resnet.ResNet has no dense features; clip.ViT, clip.ResNet and vit.ViT",
        ),
        ("prototypes.visual.text=clip", "VisualText needs the prototypes 'clip'"),
        (
            "model.heads.text_attention={name: text_attention.TextAttention} prototypes.text={name: none}",
            "needs the rows that look at the image",
        ),
    ],
)
def test_a_wrong_configuration_is_one_clear_error(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        train(tmp_path / "run", *re.split(" (?=prototypes)", override), config=TINY_DG)


def test_a_tower_of_another_space_is_an_error(tmp_path, tiny_clip):
    with pytest.raises(
        UserError,
        match=r"has 24 channels, and that of model\.heads\.projector 16: set its channels to 24",
    ):
        train(tmp_path / "run", *tiny_clip[2:3], config=TINY_DG)


def test_several_sources_train_as_one_and_each_has_its_factor(tmp_path, monkeypatch):
    weights, after = [], Reweight.after

    def record(self, step):
        after(self, step)
        weights.append((step.source.part, step.source.image, step.weights["source"]))

    monkeypatch.setattr(Reweight, "after", record)
    sources = ", ".join(
        f"{{name: toy.Toy, domain: {d}, length: 5, size: [32, 48]}}" for d in ("synthetic", "night")
    )
    train(
        tmp_path / "run",
        f"data.train=[{sources}]",
        "train.iters=2",
        "dg.reweight={level: source, warmup: 0.0, low: 1.0, high: 3.0}",
        "data.val={name: none}",
        config=TINY_DG,
    )
    assert "10 images" in (tmp_path / "run" / "log.txt").read_text()
    parts = torch.cat([part for part, *_ in weights])
    assert {*parts.tolist()} == {0, 1} and len(parts) == 8
    light = torch.cat([image.mean((1, 2, 3)) for _, image, _ in weights])
    assert light[parts == 1].max() < light[parts == 0].min()  # nights are dark
    assert (
        load(TINY_DG, [f"data.train=[{sources}]", "data.train.1.domain=snow"]).data.train[1][
            "domain"
        ]
        == "snow"
    )


def test_the_toy_configuration_is_one_of_six_domains():
    cfg = load(str(ROOT / "configs" / "toy" / "dg_ppar.yaml"), [])
    assert list(cfg.data.test) == [
        "synthetic",
        "real",
        "night",
        "fog",
        "rain",
        "snow",
    ] and cfg.data.seen == ["synthetic"]


def test_a_style_needs_another_image_in_the_micro_batch(tmp_path):
    style = "dg.style={name: style.ColorStats}"
    for options in (("train.batch_size=1",), ("train.batch_size=4", "train.accumulate=4")):
        with pytest.raises(UserError, match=r"needs two or more in each process and micro-batch"):
            train(tmp_path / "run", style, *options, config=TINY_DG)
