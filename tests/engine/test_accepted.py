"""Whether a configuration may run: with a script, and from a checkpoint."""

import logging

import pytest

from engine.accepted import check_resume, check_sections, of_script
from engine.config import ConfigError, load, override, plain
from tests.engine.test_config import LOSSES
from tests.runs import ROOT, TINY, TINY_DG, TINY_UDA

SCRIPTS = {"train_supervised": TINY, "train_uda": TINY_UDA, "train_dg": TINY_DG}


def test_a_run_goes_on_only_with_the_configuration_that_it_had(write):
    old = plain(load(write("")))
    check_resume(
        old, load(write(""), ["eval.flip=true", "data.workers=0", "device=cpu", "folder=new"])
    )
    changed = load(write(""), ["optimizer.lr=1e-3"])
    with pytest.raises(ConfigError, match=r"optimizer\.lr 0\.0001 -> 0\.001"):
        check_resume(old, changed)
    check_resume(old, override(changed, ["resume=some/step_0000001.pt"]))


@pytest.mark.parametrize(
    "before, after, message",
    [
        (["losses.1.temperature=0.07"], ["losses.1.temperature=0.1"], r": losses\.occl\.temperature 0\.07 -> 0\.1\. C"),
        ([], ["losses=[{name: occl.OCCL}]"], r"losses\.cross_entropy \{.* -> null, losses\.occl\.weight 1\.0 -> null"),
        ([], [f"data.train.x={'y' * 999}"], r": data\.train\.x null -> 'y{30,40} \.\.\.\. C"),
        (["train.iters=7"], ["train.iters=6"], r"train\.iters 7 -> 6"),
        (["stages=[{iters: 5}, {iters: 5}]"], ["stages=[{iters: 6}, {iters: 5}]"], r"stages\.0\.iters 5 -> 6"),
        (["stages=[{iters: 5}, {iters: 5}]"], ["stages=[{iters: 5}, {iters: 4}]"], r"stages\.1\.iters 5 -> 4"),
        (["stages=[{}, {}]"], ["stages=[{}, {}]", "train.iters=1001"], r"train\.iters 1000 -> 1001"),
        (["stages=[{repeat: 2}]"], ["stages=[{repeat: 2, iters: 2000}]"], r"stages\..*2000"),
        (["stages=[{}]"], ["stages=[{}, {}]"], "stages"),
    ],
)  # fmt: skip
def test_what_differs_in_a_list_is_named_alone_and_only_the_end_may_move(
    write, before, after, message
):
    path = write(LOSSES)
    with pytest.raises(ConfigError, match=message):
        check_resume(plain(load(path, before)), load(path, after))


@pytest.mark.parametrize("key", ["model.backbone.weights", "model.init", "dg.tower.weights"])
def test_weights_may_move_and_not_change(write, key):
    def configured(value):
        tower = "dg.tower={name: clip.ViT, size: b}"
        return load(write(""), [tower, f"{key}={value}"])

    check_resume(plain(configured("a/net.pth")), configured("/b/net.pth"))
    for before, after in (("none", "a/net.pth"), ("a/net.pth", "none"), ("a/net.pth", "a/other.pth")):
        with pytest.raises(ConfigError, match=rf"{key} '{before}' -> '{after}'"):
            check_resume(plain(configured(before)), configured(after))


@pytest.mark.parametrize("given", ["log: {every: 7}", "checkpoint: {keep: 1}"])
def test_how_a_stage_logs_and_saves_may_change(write, given):
    check_resume(
        plain(load(write(""), ["stages=[{iters: 5}]"])),
        load(write(""), [f"stages=[{{iters: 5, {given}}}]"]),
    )


@pytest.mark.parametrize(
    "before, after",
    [
        ([], ["train.iters=1001"]),
        (["stages=[{iters: 5}, {iters: 5}]"], ["stages=[{iters: 5}, {iters: 6}]"]),
        (
            ["stages=[{iters: 5}, {name: b}]"],
            ["stages=[{iters: 5}, {name: b}]", "train.iters=1001"],
        ),
        (["stages=[{train: {iters: 5}}]"], ["stages=[{train: {iters: 7}}]"]),
    ],
)
def test_a_run_or_its_last_stage_may_become_longer(write, caplog, monkeypatch, before, after):
    monkeypatch.setattr(logging.getLogger("engine"), "propagate", True)
    check_resume(plain(load(write(""), before)), load(write(""), after))
    assert "the learning rate is that of the longer run" in caplog.text
    caplog.clear()
    check_resume(plain(load(write(""), after)), load(write(""), after))
    assert not caplog.text


def test_a_checkpoint_from_before_a_key_existed_goes_on_with_its_default(write):
    old = plain(load(write("")))
    del old["model"]["compile"], old["optimizer"]["clip"]
    check_resume(old, load(write("")))
    with pytest.raises(ConfigError, match=r"optimizer\.clip 0\.0 -> 1"):
        check_resume(old, load(write(""), ["optimizer.clip=1"]))


@pytest.mark.parametrize(
    "script, given, message",
    [
        ("train_supervised", "uda.mixer={name: mixers.ClassMix}", "uda has no effect .* train_uda.py"),
        ("train_supervised", "stages=[{init: x.pt}]", "stages has no effect .* train_uda.py"),
        ("train_supervised", "data.target={name: toy.Toy}", r"data\.target has no effect"),
        ("train_supervised", "data.monitor={name: toy.Toy}", r"data\.monitor has no effect"),
        ("train_supervised", "data.target_augment={name: transforms.Augment}", r"data\.target_augment has"),
        ("train_supervised", "model.bn_views=[source]", r"model\.bn_views has no effect"),
        ("train_supervised", "dg.style={name: style.FDA}", r"dg has no effect .* train_dg\.py"),
        ("train_supervised", "model.heads.projector={name: projector.Projector, channels: 8}",
         r"model\.heads\.projector has"),
        ("train_supervised", "model.heads.text_attention={name: none}", r"model\.heads\.text_attention has"),
        ("train_supervised", "prototypes.centroids.view=target", "train_supervised.py has no view 'target'"),
        ("train_supervised", "losses.0.view=mixed", "has no view 'mixed'; there are source, none"),
        ("train_dg", "uda.compare=false", "uda has no effect in train_dg"),
        ("train_dg", "stages=[{}]", "stages has no effect"),
        ("train_dg", "losses.0.view=target", "train_dg.py has no view 'target'"),
        ("train_uda", "dg.strong={name: mixers.ColorBlur}", "dg has no effect in train_uda"),
        ("train_uda", "stages=[{model: {heads: {projector: {channels: 8}}}}]", r"model\.heads\.projector has"),
        ("train_supervised", "train.teacher=0", "there is no teacher: set train.teacher"),
        ("train_dg", "train.teacher=0", "there is no teacher"),
        ("train_uda", "stages=[{teacher: ema}, {teacher: none}]", "there is no teacher"),
        ("train_uda", "stages=[{teacher: frozen, name: kd}, {}]", "stage kd: eval.weights=teacher would .* discard"),
        ("train_uda", "stages=[{teacher: ema, train: {teacher: 0}}]", "there is no teacher"),
    ],
)  # fmt: skip
def test_what_a_script_would_ignore_is_an_error(script, given, message):
    with pytest.raises(ConfigError, match=message):
        check_sections(load(SCRIPTS[script], ["eval.weights=teacher", given]), script)


@pytest.mark.parametrize(
    "script, given",
    [
        ("train_supervised", "prototypes.centroids.view=none"),
        ("train_dg", "prototypes.visual.view=tower"),
        ("train_uda", "stages=[{teacher: none}, {teacher: ema}]"),
        ("train_uda", "losses.0.view=mixed"),
    ],
)
def test_what_a_script_uses_is_none(script, given):
    check_sections(load(SCRIPTS[script], ["eval.weights=teacher", given]), script)


def test_what_labels_the_target_stays_the_same_in_a_run_that_goes_on():
    """What the evaluation looks at may change, unless labels are made with it."""
    for script, changes in ((TINY, 0), (TINY_UDA, 1)):
        for change in ("eval.short_side=24", "eval.weights=teacher"):
            old, new = load(script), load(script, [change])
            if changes:
                with pytest.raises(ConfigError, match=f"another configuration: {change[:8]}"):
                    check_resume(old, new)
            else:
                check_resume(old, new)


def test_a_missing_file_of_text_is_said_before_anything_is_read(tmp_path):
    path = str(ROOT / "configs" / "dg" / "gta5_ppar_resnet50.yaml")
    gone = f"prototypes.text.file={tmp_path}/gone.pt"
    with pytest.raises(ConfigError, match=r"no file .*gone\.pt; make it: python -m models\.proto"):
        of_script("train_dg", [path, gone])
    (tmp_path / "gone.pt").touch()
    assert of_script("train_dg", [path, gone]).prototypes.text["file"] == f"{tmp_path}/gone.pt"
    with pytest.raises(ConfigError, match="there is no configuration file"):
        of_script("train_dg", ["--show"])
