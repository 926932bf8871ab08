"""train_uda.py: resume in each of its stages, several processes, what it needs."""

import json
import re
import shutil

import pytest
import torch
from torch.nn.functional import interpolate

import train_uda
from datasets.reading import read_map
from datasets.style import ColorStats
from datasets.toy import Toy
from engine import checkpoint
from engine.errors import UserError
from models.build import restore
from models.segmentor import Segmentor
from tests.runs import TINY_UDA, assert_same_state, last, leaves, run, scalars, train

SOURCE = "{name: source, teacher: none, train: {teacher: 0.0}}"
WITH_HEAD = (
    f"{SOURCE[:-1]}, model: {{heads: {{auxiliary: {{name: auxiliary.Auxiliary, stage: 2}}}}}},"
    "losses: [{name: cross_entropy.CrossEntropy}, {name: cross_entropy.CrossEntropy, head: auxiliary}]}"
)
METHODS = {  # overrides of the smallest adaptation
    "self-training": (),
    "BCL": (  # half of the target's pixels get a label: not as many in each process
        f"stages=[{SOURCE}, {{name: adapt, init: previous, teacher: none, uda: {{mixer: {{name: mixers.SourceTarget}},"
        "labelers: [{name: bcl.StaticLabels}, {name: bcl.LabelTransfer, confidence: 0.9}]},"
        "losses: [{name: cross_entropy.CrossEntropy}, {name: cross_entropy.CrossEntropy, view: target, weight: 0.3},"
        "{name: entropy.Entropy, weight: 0.1}, {name: bcl.Contrast}]}]",
    ),
    "BiSMAP": (
        "prototypes={mixtures: {name: mixtures.Mixtures, components: 2, iterations: 3, view: none}}",
        f"stages=[{SOURCE}, {{name: adapt, init: previous, uda: {{mixer: {{name: mixers.Strong}},"
        "source_weights: {name: bismap.Transferability, clusters: 3, size: [32, 64], grid: [2, 2]},"
        "labelers: [{name: bismap.LikelihoodLabels, threshold: {source_quantile: 0.1}}]},"
        "losses: [{name: cross_entropy.CrossEntropy}, {name: bismap.SymmetricCrossEntropy, view: target},"
        "{name: bismap.Consistency, ramp: 2}]}]",
    ),
    "ProDA": (
        f"stages=[{SOURCE}, {{name: adapt, init: previous, teacher: frozen,"
        "uda: {mixer: {name: mixers.SourceTarget}, labelers: [{name: proda.Denoise}]},"
        "prototypes: {target: {name: centroids.Centroids, view: target}},"
        "losses: [{name: cross_entropy.CrossEntropy}, {name: bismap.SymmetricCrossEntropy, view: target},"
        "{name: proda.Regularity, weight: 0.1}]}]",
    ),
    "rounds": (  # BiSMAP's labels in ClassMix and masked, the maps of the source made once
        "prototypes={mixtures: {name: mixtures.Mixtures, components: 1, view: none}}",
        f"stages=[{SOURCE[:-1]}, iters: 2}}, {{name: round, repeat: 2, iters: 2, init: previous, uda: {{"
        "style: {name: style.ColorStats},"
        "mixer: {name: masked.Masked, block: 16, mixer: {name: mixers.ClassMix, target: true}},"
        "source_weights: {name: bismap.Transferability, clusters: 3, size: [32, 64], grid: [2, 2], entropy: none,"
        " encoder: {name: resnet.ResNet, depth: 18, weights: none}},"
        "labelers: [{name: bismap.LikelihoodLabels, threshold: {source_quantile: 0.1}, agree: 0.1}]},"
        "losses: [{name: cross_entropy.CrossEntropy}, {name: cross_entropy.CrossEntropy, view: mixed},"
        "{name: cross_entropy.CrossEntropy, view: masked}, {name: bcl.Contrast}]}]",
    ),
    "TMT": (
        "model={backbone: {name: mit.MiT, size: b0, drop_path: 0.0, weights: none}, classifier: {name: linear.Linear},"
        " decoder: {name: segformer_mlp.SegFormerMLP, width: 16, dropout: 0.0}, bn_views: [],"
        " heads: {region: {name: region.Region, stage: 3, cell: 2, ramp: 4, dropout: 0.0, cells: [1],"
        " variant: nats, queries: own, estimator: probe, order: rank, semantic: 1.0, coordinates: 0.1}}}",
        f"stages=[{SOURCE[:-1]}, model: {{heads: {{region: {{name: none}}}}}},"
        "losses: [{name: cross_entropy.CrossEntropy}]},"
        "{name: adapt, init: previous, uda: {mixer: {name: mixers.ClassMix, target: true},"
        "labelers: [{name: self_training.TeacherConfidence, threshold: 0.2}]},"
        "losses: [{name: cross_entropy.CrossEntropy}, {name: cross_entropy.CrossEntropy, view: mixed},"
        "{name: cross_entropy.CrossEntropy, head: region}, {name: tmt.RegionAdversarial},"
        "{name: tmt.RegionProbe}]}]",
    ),
    "TMT, twice": (
        "model={backbone: {name: mit.MiT, size: b0, drop_path: 0.0, weights: none}, classifier: {name: linear.Linear},"
        " decoder: {name: segformer_mlp.SegFormerMLP, width: 16, dropout: 0.0}, bn_views: [],"
        " heads: {region: {name: region.Region, stage: 3, cell: 2, ramp: 4, dropout: 0.0, cells: [1],"
        " variant: nats, queries: own, estimator: probe, order: rank, look: twice, semantic: 1.0}}}",
        f"stages=[{SOURCE[:-1]}, model: {{heads: {{region: {{name: none}}}}}},"
        "losses: [{name: cross_entropy.CrossEntropy}]},"
        "{name: adapt, init: previous, uda: {mixer: {name: mixers.ClassMix, target: true},"
        "labelers: [{name: self_training.TeacherConfidence, threshold: 0.2}]},"
        "losses: [{name: cross_entropy.CrossEntropy}, {name: cross_entropy.CrossEntropy, view: mixed},"
        "{name: tmt.RegionProbe}]}]",
    ),
}
ONE_STEP = ("train.iters=1", "uda.compare=false")
KEYS = ("model", "prototypes", "labelers", "optimizer", "scaler")


@pytest.mark.parametrize(
    ("method", "steps"),
    [
        ("self-training", (1,)),
        ("BCL", (3, 4)),
        ("BiSMAP", (3, 5)),
        ("rounds", (5,)),
        ("TMT", (4,)),
        ("TMT, twice", (4,)),
    ],
)
def test_resuming_in_any_stage_is_bitwise(tmp_path, method, steps):
    """Killed within the first stage, at its end, within the second; the rest in a new process."""
    options = METHODS[method]
    straight = train(tmp_path / "straight", *options, config=TINY_UDA)
    for step in steps:
        parts = tmp_path / f"parts_{step}"
        shutil.copytree(tmp_path / "straight", parts)
        for path in checkpoint.list_steps(parts)[: 6 - step]:
            path.unlink()
        (parts / "results.json").unlink()
        code, output = run(parts, *options, config=TINY_UDA)
        assert code == 0 and f"step_{step:07d}.pt" in output, output
        averaged = ("teacher",) if method != "BCL" else ()
        assert_same_state(last(tmp_path / "straight"), last(parts), keys=KEYS + averaged)
        one, two = (leaves(last(path)["rng"]).values() for path in (tmp_path / "straight", parts))
        assert all(torch.equal(a, b) for a, b in zip(one, two))
        assert {s: v["train/loss"] for s, v in scalars(parts).items()} == {
            s: v["train/loss"] for s, v in straight.items()
        }
        results = [
            json.loads((path / "results.json").read_text())["results"]
            for path in (tmp_path / "straight", parts)
        ]
        assert results[0] == results[1]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one(tmp_path, method):
    exact = (
        "model.frozen_bn=[backbone, decoder]",
        "model.decoder.dropout=0.0",
        "schedule.warmup=0",
    )
    exact += ("optimizer={name: SGD, lr: 1e-3, head_lr_factor: 1.0, momentum: 0.9}",)
    exact += ("train.iters=2",)  # of each stage; "rounds" says its own
    for name, processes in (("one", 1), ("two", 2)):
        options = (*METHODS[method], *exact)
        code, output = run(
            tmp_path / name, *options, processes=processes, double=True, config=TINY_UDA
        )
        assert code == 0, output
    for step in (2, 3, 4):
        one, two = (
            checkpoint.load(tmp_path / name / f"step_{step:07d}.pt") for name in ("one", "two")
        )
        averaged = ("teacher",) * (step > 2 and method != "BCL")
        assert_same_state(
            one, two, 1e-10, ("model", "prototypes", "labelers", "optimizer", *averaged)
        )
    one, two = scalars(tmp_path / "one"), scalars(tmp_path / "two")
    assert method != "BCL" or 0.05 < one[3]["uda/labelled_target"] < 0.9
    for step in one:
        for key in (key for key in one[step] if key.startswith(("train/loss", "uda/"))):
            assert one[step][key] == pytest.approx(two[step][key], rel=0, abs=1e-10), (step, key)
    matrices = [
        json.loads((tmp_path / name / "eval" / "toy.json").read_text())["matrix"]
        for name in ("one", "two")
    ]
    assert matrices[0] == matrices[1]


def test_the_second_stage_starts_from_the_first_and_moves_the_teacher(tmp_path):
    train(tmp_path / "run", "optimizer.lr=1e-30", "optimizer.weight_decay=0.0", config=TINY_UDA)
    first, second = (checkpoint.load(tmp_path / "run" / f"step_000000{n}.pt") for n in (3, 6))
    assert "teacher" not in first and second["teacher"]["updates"] == 3
    assert (first["stage"], first["stage_step"], second["stage"], second["stage_step"]) == (
        0,
        3,
        1,
        3,
    )
    weights = {k: v for k, v in first["model"].items() if "running" not in k and "tracked" not in k}
    for name, value in weights.items():
        torch.testing.assert_close(second["model"][name], value, rtol=0, atol=1e-20)


def test_a_stage_has_its_own_clipping_batch_log_and_checkpoints(tmp_path, monkeypatch):
    reports, report = [], train_uda.final_report
    monkeypatch.setattr(train_uda, "final_report", lambda *a: reports.append(a) or report(*a))
    own = "optimizer: {name: SGD, lr: 1.0, clip: 1e-30, weight_decay: 0.0}, train: {batch_size: 2}"
    own += ", log: {every: 3}, checkpoint: {every: 2}, eval: {every: 0}, precision: bf16"
    found = train(
        tmp_path / "run",
        f"stages=[{SOURCE}, {{name: adapt, init: previous, {own}}}]",
        "uda.compare=false",
        config=TINY_UDA,
    )
    assert [*found] == [1, 2, 3, 5, 6]
    assert reports[0][3]._enabled and reports[0][3].fast_dtype == torch.bfloat16
    assert [path.stem[-1] for path in checkpoint.list_steps(tmp_path / "run")] == [*"65321"]
    before, after = (checkpoint.load(tmp_path / "run" / f"step_000000{n}.pt") for n in (3, 6))
    for name, value in before["model"].items():
        if "running" not in name and "tracked" not in name:
            assert torch.equal(after["model"][name], value), name
    text = (tmp_path / "run" / "log.txt").read_text()
    for step, size in ((2, 4), (6, 2)):
        pace, speed = re.search(
            rf"step {step}/6 .* ([\d.]+) s/step  ([\d.]+) images", text
        ).groups()
        assert float(pace) * float(speed) == pytest.approx(size, rel=0.1)


def test_target_labels_are_never_read_in_training(tmp_path, monkeypatch):
    from datasets.toy import Toy

    original, seen = Toy.load, []

    def load_and_tell(self, index):
        image, label = original(self, index)
        if self.split == "train" and self.domain == "real":
            seen.append((label == 255).all())
        return image, label

    monkeypatch.setattr(Toy, "load", load_and_tell)
    train(tmp_path / "run", config=TINY_UDA)
    assert len(seen) == 6 * 4 and all(seen)


def test_a_run_without_a_target_or_a_teacher_says_so(tmp_path):
    with pytest.raises(UserError, match=r"needs data\.target"):
        train(tmp_path / "a", "data.target={name: none}", config=TINY_UDA)
    labeler = "uda.labelers=[{name: self_training.TeacherConfidence}]"
    with pytest.raises(UserError, match="needs a teacher"):
        train(tmp_path / "b", labeler, "stages=[{teacher: none}]", config=TINY_UDA)
    with pytest.raises(UserError, match=r"train\.teacher=0 would copy the student"):
        train(tmp_path / "d", labeler, "stages=[]", "train.teacher=0.0", config=TINY_UDA)
    with pytest.raises(UserError, match="there is no stage before it"):
        train(tmp_path / "c", "stages=[{init: previous}]", config=TINY_UDA)


def test_labels_are_made_of_what_the_student_sees(tmp_path, monkeypatch):
    """The sizes of the evaluation, the source in its style and through its stem."""
    seen, segment = [], Segmentor.segment

    def spy(self, image, domain="target", **options):
        seen.append((domain, image, self.training))
        return segment(self, image, domain, **options)

    monkeypatch.setattr(Segmentor, "segment", spy)
    monkeypatch.setattr(ColorStats, "__call__", lambda self, source, target: 0 * source)
    size = ("eval.short_side=24", "uda.source_short_side=32", "uda.style={name: style.ColorStats}")
    few = ("train.iters=1", "data.val={name: none}", "data.test.toy.length=1")
    train(tmp_path / "run", *METHODS["BiSMAP"], *size, *few, config=TINY_UDA)
    shown = {
        domain: [image for name, image, training in seen if name == domain and not training]
        for domain in ("source", "target")
    }
    assert len(shown["source"]) >= 2 * 10 and len(shown["target"]) >= 9
    assert all(min(image.shape[-2:]) == 32 and not image.any() for image in shown["source"])
    whole = [image for image in shown["target"] if len(image) == 1]
    assert len(whole) >= 9 and all(min(image.shape[-2:]) == 24 for image in whole)


def test_the_network_of_the_stage_before_labels_also_where_the_student_starts_anew(tmp_path):
    """At the size of the evaluation, stored at that of the file."""
    stored = "{name: self_training.StoredConfidence, threshold: 0.0}"
    train(
        tmp_path / "run",
        f"stages=[{SOURCE}, {{name: adapt, init: imagenet, uda: {{mixer: {{name:"
        f" mixers.SourceTarget}}, labelers: [{stored}]}},"
        " losses: [{name: cross_entropy.CrossEntropy, view: target}]}]",
        "eval.short_side=24",
        "train.iters=2",
        config=TINY_UDA,
    )
    network = restore(tmp_path / "run" / "stage_source.pt")[0]
    target = Toy(domain="real", length=9, size=[48, 64], labels=False)
    for index in range(9):
        image = target[index]["image"][None].float() / 255
        small = interpolate(image, (24, 32), mode="bilinear", antialias=True)
        with torch.no_grad():
            logits = network.segment(small).logits
        expected = interpolate(logits, (24, 32), mode="bilinear").argmax(1)[0]
        path = tmp_path / "run/maps/2_adapt/target/pseudo_labels" / f"{target.stem(index)}.png"
        found = torch.from_numpy(read_map(path))
        assert torch.equal(found, expected.repeat_interleave(2, 0).repeat_interleave(2, 1))


def test_rounds_renew_the_labels_and_keep_the_weights(tmp_path):
    """Random weights of a fixed encoder: a second map would differ from the first."""
    train(tmp_path / "run", *METHODS["rounds"], config=TINY_UDA)
    found = {p.parent.relative_to(tmp_path / "run/maps") for p in tmp_path.rglob("settings.json")}
    weights, *labels = sorted(map(str, found))
    assert weights == "2_round1/source/transferability"
    assert labels == [f"{stage}/target/pseudo_labels" for stage in ("2_round1", "3_round2")]
    assert last(tmp_path / "run")["maps"] == [weights, labels[1]]
    one, two = (sorted((tmp_path / "run/maps" / path).rglob("*.png")) for path in labels)
    assert len(one) == 9 and any(a.read_bytes() != b.read_bytes() for a, b in zip(one, two))


def test_labels_that_need_the_student_are_mixed(tmp_path):
    mixer = ("{name: mixers.SourceTarget}", "{name: mixers.ClassMix, target: true}")
    options = (
        METHODS["ProDA"][0]
        .replace(*mixer)
        .replace("SymmetricCrossEntropy, view: target", "SymmetricCrossEntropy, view: mixed")
    )
    steps = train(tmp_path / "run", options, *ONE_STEP, config=TINY_UDA)
    assert steps[2]["uda/labelled_target"] == steps[2]["uda/labelled_mixed"] == 1


def test_the_source_takes_the_style_and_keeps_its_content(tmp_path):
    """FDA returns its first argument where beta is 0."""
    plain, styled = (
        train(tmp_path / name, f"uda.style={style}", "stages=[]", *ONE_STEP, config=TINY_UDA)
        for name, style in (("a", "{name: none}"), ("b", "{name: style.FDA, beta: 0.0}"))
    )
    assert plain[1]["train/loss"] == styled[1]["train/loss"]


def test_a_frozen_teacher_of_another_shape_goes_on_after_a_kill(tmp_path):
    """The network of the stage before has a head that the student lacks."""
    options = (METHODS["ProDA"][0].replace(SOURCE, WITH_HEAD), "train.iters=2")
    train(tmp_path / "run", *options, config=TINY_UDA)
    whole = last(tmp_path / "run")
    assert any("auxiliary" in name for name in whole["teacher"])
    assert not any("auxiliary" in name for name in whole["model"])
    (tmp_path / "run" / "step_0000004.pt").unlink()
    (tmp_path / "run" / "results.json").unlink()
    train(tmp_path / "run", *options, config=TINY_UDA)
    assert_same_state(whole, last(tmp_path / "run"), keys=(*KEYS, "teacher"))


@pytest.mark.parametrize(
    "part, name",
    [
        ("uda.labelers=[{name: bcl.StaticLabels}]", "StaticLabels"),
        (
            "uda.labelers=[{name: bismap.LikelihoodLabels, prototypes: classifier}]",
            "LikelihoodLabels",
        ),
        ("uda.labelers=[{name: self_training.StoredConfidence}]", "StoredConfidence"),
        ("uda.labelers=[{name: proda.Denoise}]", "Denoise"),
        ("uda.source_weights={name: bismap.Transferability}", "Transferability"),
        ("losses=[{name: bismap.Distillation}]", "the frozen teacher"),
    ],
)
def test_a_network_that_has_learnt_nothing_labels_nothing(tmp_path, part, name):
    with pytest.raises(UserError, match=f"stage first: {name} takes predictions .* learnt nothing"):
        train(tmp_path / "run", part, "stages=[{name: first, teacher: frozen}]", config=TINY_UDA)
    assert not (tmp_path / "run").exists()


def test_what_is_drawn_differs_between_domains_stages_and_runs(tmp_path, monkeypatch):
    orders, seeds, mixed = [], [], []

    class Spy(train_uda.Stream):
        def __init__(self, dataset, *options):
            super().__init__(dataset, *options)
            orders.append(tuple(self.sampler.index(i) for i in range(10)))
            seeds.append(dataset.seed)

    def build(uda, **context):
        mixed.append(context["seed"])
        return build_adaptation(uda, **context)

    build_adaptation = train_uda.build_adaptation
    monkeypatch.setattr(train_uda, "Stream", Spy)
    for seed in (0, 1):
        monkeypatch.setattr(train_uda, "build_adaptation", build)
        few = (*ONE_STEP, "data.target.length=10", "data.val={name: none}", f"seed={seed}")
        train(tmp_path / str(seed), *few, config=TINY_UDA)
    assert len(orders) == 8 and len({*orders}) == 8  # source, target of two stages of two runs
    assert len({*seeds}) == 8 and len({*mixed}) == 4


def test_a_named_checkpoint_in_another_folder_brings_the_network_before_adaptation(tmp_path):
    train(tmp_path / "run", config=TINY_UDA)
    path = tmp_path / "run" / "step_0000005.pt"
    train(tmp_path / "other", f"resume={path}", config=TINY_UDA)
    assert_same_state(last(tmp_path / "other"), last(tmp_path / "run"))
    old, new = (
        json.loads((tmp_path / name / "results.json").read_text()) for name in ("run", "other")
    )
    assert old["before"] == new["before"]


def test_a_named_checkpoint_in_another_folder_brings_its_stored_labels(tmp_path):
    stored = (
        f"stages=[{SOURCE}, {{name: adapt, init: previous, uda: {{labelers: [{{name: "
        "self_training.StoredConfidence, threshold: 0.2}]}}]",
    )
    train(tmp_path / "run", *stored, config=TINY_UDA)
    path = tmp_path / "run" / "step_0000005.pt"
    train(tmp_path / "other", *stored, f"resume={path}", config=TINY_UDA)
    assert_same_state(last(tmp_path / "other"), last(tmp_path / "run"))


def test_a_start_of_a_later_stage_that_is_not_there_is_found_before_the_first(tmp_path):
    stages = "stages=[{name: source, teacher: none, train: {teacher: 0.0}}, {name: adapt, init: %s}]"
    with pytest.raises(UserError, match=r"stage adapt: init: there is no file \S+/none\.pt"):
        train(tmp_path / "run", stages % (tmp_path / "none.pt"), config=TINY_UDA)
    assert not (tmp_path / "run").exists()
    train(tmp_path / "start", "train.iters=1", config=TINY_UDA)
    start = tmp_path / "start" / "stage_source.pt"
    train(tmp_path / "run", stages % start, "eval.pictures=0", config=TINY_UDA)
    start.unlink()  # no longer needed
    train(tmp_path / "run", stages % start, "eval.pictures=0", config=TINY_UDA)
    # Of a single stage, the report compares it with its start.
    one = f"stages=[{{name: adapt, init: {tmp_path / 'start' / 'step_0000001.pt'}}}]"
    train(tmp_path / "one", one, "eval.pictures=0", config=TINY_UDA)
    (tmp_path / "start" / "step_0000001.pt").unlink()
    with pytest.raises(UserError, match=r"no file \S+step_0000001\.pt, which uda\.compare=true"):
        train(tmp_path / "one", one, config=TINY_UDA)
    train(tmp_path / "one", one, "uda.compare=false", "eval.pictures=0", config=TINY_UDA)


@pytest.mark.parametrize(
    ("second", "says"),
    [
        ("model: {bn_views: [targett]}", "model.bn_views names targett, and .* makes the views source"),
        (
            "uda: {labelers: [], mixer: {name: mixers.Source}}, model: {bn_views: [mixed]}",
            "model.bn_views names mixed, and mixers.Source makes the views source: change one",
        ),
        (
            "uda: {mixer: {name: masked.Masked, mixer: {name: mixers.ClassMix}}},"
            "prototypes: {far: {name: centroids.Centroids, view: target}}",
            "prototypes.far.view names target, and masked.Masked makes .* source, mixed, masked",
        ),
    ],
)
def test_a_view_that_nothing_makes_is_said_before_the_first_stage(tmp_path, second, says):
    with pytest.raises(UserError, match=says):
        train(tmp_path / "run", f"stages=[{SOURCE}, {{name: adapt, {second}}}]", config=TINY_UDA)
    assert not [*(tmp_path / "run").glob("*.pt")]
