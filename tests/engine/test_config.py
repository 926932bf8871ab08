"""Configuration: what is read, how layers merge, that a mistake is an error which names the key."""

import re
import time

import pytest
import yaml

from engine import config
from engine.config import (
    TARGET,
    ConfigError,
    derived_seed,
    difference,
    load,
    override,
    plain,
    read_yaml,
    save,
    stages,
)
from engine.errors import UserError
from engine.ranges import is_a
from tests.fuzz import configurations
from tests.runs import TINY, TINY_UDA

KEYS = """
checkpoint.every checkpoint.keep data.augment.name data.cache data.monitor.name
data.rare_classes.min_pixels data.rare_classes.temperature data.root data.seen data.target.name
data.target_augment.name data.test data.train.name data.val.name data.workers
deterministic device dg.reweight.name dg.strong.name dg.style.name dg.tower.name
eval.crop eval.every eval.flip eval.mode eval.pictures eval.scales eval.short_side eval.stride
eval.patience eval.subsets eval.weights folder log.every log.images_every log.profile losses model.backbone.name
model.channels_last
model.compile
model.classifier.name model.bn_views model.decoder.name model.frozen_bn model.heads
model.cache model.frozen model.init model.lora model.sync_bn optimizer.betas optimizer.clip
optimizer.head_lr_factor optimizer.layer_decay optimizer.lr optimizer.momentum optimizer.name optimizer.weight_decay
precision prototypes
resume schedule.min_lr schedule.min_ratio schedule.power schedule.warmup schedule.warmup_ratio
seed stages threads timeout
train.accumulate train.batch_size train.iters train.teacher uda.compare uda.labelers
uda.mixer.name uda.source_short_side uda.source_weights.name uda.style.name
"""


def dotted(value, prefix=""):
    """The dotted keys of the leaves; an empty mapping is a leaf."""
    if not isinstance(value, dict) or not value:
        return [prefix[:-1]]
    return [name for key, item in value.items() for name in dotted(item, f"{prefix}{key}.")]


# --- reading -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, value",
    [
        ("1e-4", 1e-4),
        ("1.e-4", 1e-4),
        ("-2E+3", -2000.0),
        (".5", 0.5),
        ("2.0", 2.0),
        ("-3", -3),
        ("+7", 7),
        ("010", 10),
        ("1_000", "1_000"),
        ("1:30", "1:30"),
        ("2024-01-01", "2024-01-01"),
        ("on", "on"),
        ("off", "off"),
        ("no", "no"),
        ("yes", "yes"),
        *((text, True) for text in ("true", "True", "TRUE", "!!bool true")),
        *((text, False) for text in ("false", "False", "FALSE")),
        *((text, None) for text in ("null", "Null", "NULL")),
        ("tRUE", "tRUE"),
        ("!!float 3", 3.0),
        ("!!str 3", "3"),
        (str(2**62), 2**62),
        (".inf", ".inf"),
        ("~", None),
        ("", None),
        ("'1e-4'", "1e-4"),
        ("[1e-3, [no, 2]]", [1e-3, ["no", 2]]),
    ],
)
def test_scalars_are_read_as_in_yaml_1_2(text, value):
    result = read_yaml(f"key: {text}", "a file")["key"]
    assert result == value and type(result) is type(value)


def test_an_anchor_is_merged_and_own_keys_win():
    text = "a: &shared {x: 1, y: 2}\nb: {<<: *shared, y: 3}"
    assert read_yaml(text, "a file")["b"] == {"x": 1, "y": 3}


@pytest.mark.parametrize(
    "text, line", [("seed: 1\nthreads: 2\nseed: 3", 3), ("train:\n  iters: 1\n  iters: 2", 3)]
)
def test_a_key_that_appears_twice_names_file_line_and_key(write, text, line):
    with pytest.raises(
        ConfigError, match=rf"experiment\.yaml, line {line}: .*'({text.split()[-2][:-1]})'"
    ):
        load(write(text))


@pytest.mark.parametrize(
    "text, named",
    [
        ("a: {dir: images/{split}, b: 1}", True),
        ("a: {b: 1, dir: {split}/images}", True),
        ("a: [1, {b: 2}", False),
    ],
)
def test_a_text_with_braces_that_lacks_quotes_is_told_so(text, named):
    with pytest.raises(ConfigError, match="not valid YAML") as caught:
        read_yaml(text, "a file")
    assert ("needs quotes here" in str(caught.value)) is named


@pytest.mark.parametrize(
    "text", ["seed: [1", "a: {{b}}", "[1, 2]: 3", "seed: \x07", "- 1", "just words", "[]", "0"]
)
def test_a_file_that_is_no_mapping_names_the_file(write, text):
    with pytest.raises(ConfigError, match=r"experiment\.yaml"):
        load(write(text))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_file_is_utf_8_with_or_without_a_byte_order_mark(write, encoding):
    path = write("")
    path.write_text("folder: Straße", encoding)
    assert load(path).folder == "Straße"


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_another_encoding_names_the_file_and_the_way_out(write, encoding):
    path = write("")
    path.write_bytes("folder: Straße".encode(encoding))
    with pytest.raises(ConfigError, match=r"experiment\.yaml is not in UTF-8.*: save it"):
        load(path)


@pytest.mark.parametrize(
    "text, message",
    [
        ("seed: [1", r"line 1, column 9: expected ',' or '\]'"),
        ("a: b: c", "line 1, column 5: mapping values are not allowed here"),
        ("seed: \x07", "special characters are not allowed"),
        ("seed: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ("seed: !!float x", "line 1: 'x' is no YAML float"),
        ("seed: !!bool x", "line 1: 'x' is no YAML bool"),
        ("seed: !!int 1.5", r"line 1: '1\.5' is no YAML int"),
        ("seed: !!set {a}", "could not determine a constructor"),
        (f"seed: {'9' * 4301}", "line 1: the number '9+ ... is too large"),
        ("seed: 1e999", "line 1: the number '1e999' is too large"),
        ("seed: &a [*a]", "nests deeper than 50 levels"),
        ("seed: &a {b: [*a, *a]}", "nests deeper than 50 levels"),
        ("seed: " + "[" * 5000, "nests deeper than 50 levels"),
        (f"seed: [{'0, ' * 30_000}]", "holds more than 20000 values"),
        ("base: [3]", r"base must be a file or a list of files, not \[3\]"),
    ],
    ids=lambda value: value[:20],
)
def test_a_damaged_file_is_one_short_sentence(write, text, message):
    with pytest.raises(ConfigError, match=rf"experiment\.yaml.*{message}") as error:
        load(write(text))
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("entry", ["[{}]", "{{<<: [{}]}}"])
def test_aliases_that_stand_for_billions_of_values_are_an_error_at_once(write, entry):
    lines = ["a0: &a0 {x: 1, y: 2}"]
    lines += [f"a{i}: &a{i} {entry.format(', '.join([f'*a{i - 1}'] * 9))}" for i in range(1, 15)]
    began = time.process_time()
    with pytest.raises(ConfigError, match=r"holds more than 20000 values|unknown key 'a0'"):
        load(write("\n".join(lines)))
    assert time.process_time() - began < 2


def test_a_string_that_starts_with_the_home_folder_is_expanded(write, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    text = (
        "data: {root: ~/mine, train: {name: x.Y, root: ~/a}, test: {b: {name: x.Y, list: a/~/b}}}"
    )
    cfg = load(write(text), ["folder=~/runs", "model.backbone.weights=~/w.pt"])
    assert (cfg.data.root, cfg.data.train.root) == ("/home/me/mine", "/home/me/a")
    assert (cfg.folder, cfg.model.backbone.weights) == ("/home/me/runs", "/home/me/w.pt")
    assert cfg.data.test.b.list == "a/~/b"


def test_environment_variables_are_expanded_in_files_and_overrides(write, monkeypatch):
    monkeypatch.setenv("ROOT", "/data")
    monkeypatch.setenv("SET", "camvid")
    cfg = load(
        write("data: {root: '${ROOT}/${SET}', test: {a: {name: x.Y, files: ['${SET}']}}}"),
        ["folder=out/${SET}"],
    )
    assert cfg.data.root == "/data/camvid"
    assert cfg.data.test.a.files == ["camvid"]
    assert cfg.folder == "out/camvid"


@pytest.mark.parametrize("overrides", [[], ["folder=${NOT_SET}/x"]])
def test_an_environment_variable_that_is_not_set_is_an_error(write, monkeypatch, overrides):
    monkeypatch.delenv("NOT_SET", raising=False)
    with pytest.raises(ConfigError, match=r"NOT_SET.*is not set"):
        load(write("" if overrides else "folder: ${NOT_SET}/x"), overrides)


def test_a_key_that_is_missing_in_code_suggests_one(write):
    with pytest.raises(AttributeError, match="'weight_decai'; did you mean 'weight_decay'"):
        load(write("")).optimizer.weight_decai  # noqa: B018


# --- mistakes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, given, message",
    [
        ("sed: 1", "sed=1", r"'sed'; did you mean 'seed'\?"),
        (
            "optimizer: {lrr: 1}",
            "optimizer.lrr=1",
            r"'optimizer\.lrr'; did you mean 'optimizer\.lr'\?",
        ),
        ("train: {iter: 1}", "train.iter=1", r"'train\.iter'; did you mean 'train\.iters'\?"),
        (
            "eval: {strides: [1, 1]}",
            "eval.strides=[1, 1]",
            r"'eval\.strides'; did you mean 'eval\.stride'\?",
        ),
        ("model: {zzz: 1}", "model.zzz=1", r"'model\.zzz'; known here: init, backbone, decoder"),
        (
            "optimizer: {lr: fast}",
            "optimizer.lr=fast",
            r"optimizer\.lr must be a float .* not 'fast'",
        ),
        (
            "optimizer: {lr: true}",
            "optimizer.lr=true",
            r"optimizer\.lr must be a float .* not true",
        ),
        ("optimizer: {lr: }", "optimizer.lr=", r"optimizer\.lr must be a float .* not null"),
        ("train: {iters: 2.5}", "train.iters=2.5", r"train\.iters must be an int .* not 2\.5"),
        ("train: {iters: true}", "train.iters=true", r"train\.iters must be an int .* not true"),
        ("eval: {flip: 1}", "eval.flip=1", r"eval\.flip must be true or false, not 1"),
        ("eval: {flip: on}", "eval.flip=on", r"eval\.flip must be true or false, not 'on'"),
        ("eval: {scales: 1.0}", "eval.scales=1.0", r"eval\.scales must be a list .* not 1\.0"),
        ("precision: 16", "precision=16", r"precision must be fp32, bf16 or fp16, not 16"),
        ("optimizer: SGD", "optimizer=SGD", r"optimizer must be a mapping .* not 'SGD'"),
        ("losses: {name: a.B}", "losses={name: a.B}", r"losses must be a list"),
        (
            "model: {backbone: {name: 3}}",
            "model.backbone.name=3",
            r"model\.backbone\.name must be a string",
        ),
    ],
)
def test_unknown_keys_and_wrong_types_are_errors_in_files_and_on_the_command_line(
    write, text, given, message
):
    with pytest.raises(ConfigError, match=message) as error:
        load(write(text))
    assert "experiment.yaml" in str(error.value)
    with pytest.raises(ConfigError, match=message):
        load(write(""), [given])


def test_an_int_is_fine_where_a_float_is_expected_and_a_root_may_be_null(write):
    cfg = load(write("optimizer: {lr: 1}\ndata: {root: a}"), ["optimizer.clip=2", "data.root="])
    assert (cfg.optimizer.lr, cfg.optimizer.clip, cfg.data.root) == (1, 2, None)


WRONG = {
    "seed": "-1 2147483648",
    "folder": "'' 3",
    "resume": "'' null",
    "device": "gpu cuda:0 cpu:7",
    "threads": "-1 1000000",
    "precision": "half bf32",
    "timeout": "0 -1 1e9",
    "data.root": "2024 '' [a]",
    "data.test": "[] {a:_3}",
    "data.seen": "a [1]",
    "data.cache": "1",
    "data.rare_classes.temperature": "-0.1",
    "data.rare_classes.min_pixels": "-1",
    "data.workers": "-1 1000000",
    "model.heads": "[] 3",
    "model.frozen_bn": "[head] backbone",
    "model.bn_views": "[1]",
    "uda.labelers": "{} [1]",
    "stages": "[1] {}",
    "prototypes": "[]",
    "losses": "[] [1] null",
    "train.iters": "0 -3 1.5 1e12",
    "train.batch_size": "0 1000000000000",
    "train.accumulate": "0",
    "train.teacher": "1.0 2 -0.1",
    "optimizer.name": "Adam",
    "optimizer.lr": "0 -1 .nan .inf -.inf null true",
    "optimizer.head_lr_factor": "-1",
    "optimizer.weight_decay": "-1",
    "optimizer.momentum": "1.0",
    "optimizer.betas": "[0.9] [0.9,_0.99,_0.9] [0.9,_1.0] [] 0.9",
    "optimizer.clip": "-1",
    "schedule.warmup": "-5 0.5",
    "schedule.warmup_ratio": "-1 2",
    "schedule.power": "-1 cosin",
    "schedule.min_ratio": "1.5",
    "schedule.min_lr": "-1 .nan",
    "eval.every": "-1",
    "eval.mode": "hole",
    "eval.crop": "[0,_0] [5] [1,_2,_3] [a,_b] 512",
    "eval.stride": "[0,_1]",
    "eval.short_side": "-5",
    "eval.scales": "[] [0.0] [-1] [1.0,_.nan] [1e9] 1.0",
    "eval.weights": "teachr",
    "eval.subsets": "[] {a:_[]} {a:_3}",
    "eval.pictures": "-1",
    "eval.patience": "-1 1.5",
    "log.every": "0",
    "log.images_every": "-1",
    "log.profile": "-1 0.5",
    "checkpoint.every": "0",
    "checkpoint.keep": "0 -1",
}


@pytest.mark.parametrize(
    "key, value",
    [(key, value.replace("_", " ")) for key, values in WRONG.items() for value in values.split()],
)
def test_a_value_out_of_its_range_is_a_sentence_with_key_range_and_value(write, key, value):
    *sections, last = key.split(".")
    text = f"{last}: {value}"
    for section in reversed(sections):
        text = f"{section}: {{{text}}}"
    for arguments in ((write(text),), (write("", "other.yaml"), [f"{key}={value}"])):
        with pytest.raises(
            ConfigError, match=rf": {re.escape(key)}[\w.]* must be .*, not "
        ) as error:
            load(*arguments)
        assert "\n" not in str(error.value) and len(str(error.value)) < 300


@pytest.mark.parametrize(
    "given",
    [
        "seed=2147483647",
        "timeout=0.5",
        "train.iters=1000000000000",
        "optimizer.clip=0",
        "optimizer.betas=[0, 0.5]",
        "eval.scales=[0.5, 1]",
        "schedule.power=0",
        "schedule.power=cosine",
        "checkpoint.keep=1",
        "eval.subsets={mIoU13: [a]}",
        "data.test={Straße_1.0-b: {name: none}}",
    ],
)
def test_values_at_the_end_of_their_range_are_accepted(write, given):
    load(write(""), [given])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"eval": {"crop": [4, 4, 4]}}, r"eval\.crop must be a list of length 2"),
        (
            {"eval": {"stride": [4, float("nan")]}},
            r"eval\.stride\.1 must be an int in \[1, 16384\]",
        ),
        ({"optimizer": {"lr": float("inf")}}, r"optimizer\.lr must be a float above 0, not Inf"),
        ({"optimizer": 3}, "optimizer must be a mapping"),
        ({"data": {"test": {"../../x": {"name": "a.B"}}}}, r"a name in data\.test must be a name"),
        ({"data": {"test": {"/tmp/x": {"name": "a.B"}}}}, r"a name in data\.test must be a name"),
        ({"stages": [{"name": "../x"}]}, r"stages\.0\.name must be a name"),
        ([], "must hold keys and values"),
    ],
)
def test_the_configuration_of_a_checkpoint_is_checked_too(settings, message):
    with pytest.raises(ConfigError, match=message):
        override(settings, [])


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".x", "a..b", "", "x" * 51, "a b", 3])
@pytest.mark.parametrize(
    "key, item",
    [
        ("data.test", {"name": "a.B"}),
        ("prototypes", {"name": "a.B"}),
        ("eval.subsets", ["a"]),
        ("stages", None),
    ],
)
def test_names_that_become_files_are_no_paths(write, key, item, name):
    value = [{"name": name}] if key == "stages" else {name: item}
    text = f"{key}={yaml.safe_dump(value, default_flow_style=True)}"
    with pytest.raises(ConfigError, match=r"name.* must be a name of 1 to 50 letters"):
        load(write(""), [text])


@pytest.mark.parametrize(
    "given, message",
    [
        ("eval.crop.1=0", r"eval\.crop\.1 must be an int in"),
        ("eval.crop.=7", "the list has no entry ''"),
        ("eval.crop.²=7", "the list has no entry '²'"),
        ("losses.0=3", r"losses\.0 must be a mapping, not 3"),
        ("stages=[{iters: -1}]", r"stages\.0\.iters must be an int of at least 0"),
        ("stages=[{repeat: 0}]", r"stages\.0\.repeat must be an int in \[1, 100\], not 0"),
        ("stages=[{repeat: 1e8}]", r"stages\.0\.repeat must be an int"),
        ("stages=[{repeat: 100000000}]", r"stages\.0\.repeat must be an int in \[1, 100\]"),
        (f"stages=[{', '.join(['{repeat: 100}'] * 11)}]", "more than 1000 stages"),
        ("stages=[{lr_scale: 0}]", r"stages\.0\.lr_scale must be a float in"),
        ("stages=[{teacher: emma}]", "must be ema, frozen or none, not 'emma'"),
        ("stages=[{train: {iters: 0}}]", r"stages\.0\.train\.iters must be an int of at least 1"),
        ("stages=[{optimizer: 3}]", r"stages\.0\.optimizer must be a mapping"),
        *(
            (f"stages=[{{{key}: {value}}}]", rf"unknown key 'stages\.0\.{key}'")
            for key, value in {
                "stages": [],
                "folder": "x",
                "resume": "auto",
                "device": "cpu",
                "threads": 2,
                "deterministic": "true",
                "timeout": 5,
            }.items()
        ),
        ("eval={mode: slide, crop: [64, 64], stride: [64, 65]}", "stride 65 must not be larger"),
        ("data.seen=[real]", r"data\.seen names 'real', which is not in data\.test"),
        (".".join("a" * 99) + "=1", "unknown key|nests deeper than 50 levels"),
        ("prototypes." + ".".join("a" * 2000) + "=1", "nests deeper than 50 levels"),
        (f"seed={'x' * 10_000}", "seed must be an int .* not 'x{50,80} ...$"),
        (f"{'x' * 10_000}=1", "unknown key 'x{50,80} ...'; known here"),
        ("lr=1e-3", r"unknown key 'lr'; did you mean 'optimizer\.lr'\?"),
        ("train.epochs=10", r"unknown key 'train\.epochs'; did you mean 'train\.iters'\?"),
        ("learning_rate=1", r"did you mean 'optimizer\.lr'\?"),
        ("folder=runs/try #2", "the override folder: ' #' begins a comment; quote the value"),
        ("batchsize=4", r"did you mean 'train\.batch_size'\?"),
        ("every=4", r"did you mean 'eval\.every' or 'log\.every' or 'checkpoint\.every'\?"),
    ],
    ids=lambda value: value[:30],
)
def test_an_override_that_cannot_be_is_one_short_sentence(write, given, message):
    with pytest.raises(ConfigError, match=message) as error:
        load(write(""), [given])
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("text", ["seed", "=3", "seed 3", ""])
def test_an_override_without_key_and_value_is_an_error(write, text):
    with pytest.raises(ConfigError, match=r"not of the form key\.sub=value"):
        load(write(""), [text])


def test_an_override_below_a_value_is_an_error(write):
    with pytest.raises(ConfigError, match=r"'seed\.x': 0 has no key 'x'"):
        load(write(""), ["seed.x=1"])


# --- bases and merging ---------------------------------------------------------------------------------------------


def test_bases_merge_from_left_to_right_and_own_keys_win(write):
    write("train: {iters: 1, batch_size: 1, accumulate: 1}\neval: {crop: [1, 1]}", "base/a.yaml")
    write("train: {iters: 2, batch_size: 2}", "base/b.yaml")
    cfg = load(
        write("base: [../base/a.yaml, ../base/b.yaml]\ntrain: {iters: 3}", "deep/experiment.yaml")
    )
    assert (cfg.train.iters, cfg.train.batch_size, cfg.train.accumulate) == (3, 2, 1)
    assert cfg.eval.crop == [1, 1] and cfg.eval.stride == [341, 341]
    assert "base" not in cfg


def test_a_base_is_found_relative_to_the_file_that_names_it(write):
    write("seed: 5", "a/b/c.yaml")
    write("base: b/c.yaml", "a/middle.yaml")
    assert load(write("base: a/middle.yaml")).seed == 5
    assert load(write("base:")).seed == 0


def test_a_mistake_in_a_base_names_the_base(write):
    write("sead: 5", "wrong.yaml")
    with pytest.raises(ConfigError, match=r"wrong\.yaml: unknown key 'sead'"):
        load(write("base: wrong.yaml"))


def test_a_base_that_is_missing_is_told_with_the_file_that_names_it(write):
    path = write("base: nowhere.yaml")
    with pytest.raises(ConfigError, match=rf"no configuration file .*nowhere.yaml, which {path} names"):
        load(path)
    with pytest.raises(ConfigError, match=r"no configuration file .*missing.yaml$"):
        load(path.parent / "missing.yaml")


def test_two_files_may_share_a_base_but_a_cycle_is_an_error(write):
    write("seed: 5", "root.yaml")
    write("base: root.yaml", "left.yaml")
    write("base: root.yaml", "right.yaml")
    assert load(write("base: [left.yaml, right.yaml]")).seed == 5
    write("base: b.yaml", "a.yaml")
    with pytest.raises(ConfigError, match=r"a\.yaml is its own base, through a\.yaml -> b\.yaml"):
        load(write("base: a.yaml", "b.yaml").with_name("a.yaml"))


@pytest.mark.parametrize("base", ["missing.yaml", "."])
def test_a_base_that_is_no_file_names_the_path(write, base):
    path = write(f"base: {base}")
    with pytest.raises(ConfigError, match=re.escape(str((path.parent / base).resolve()))):
        load(path)


def test_naming_another_class_replaces_the_component_and_the_same_or_none_merges(write):
    write("model: {decoder: {name: fcn.FCN, width: 7, dropout: 0.3}}", "base.yaml")

    def decoder(text, *overrides):
        return plain(load(write(f"base: base.yaml\n{text}"), overrides).model.decoder)

    assert decoder("model: {decoder: {name: other.Other, depth: 2}}") == {
        "name": "other.Other",
        "depth": 2,
    }
    assert decoder("model: {decoder: {name: fcn.FCN, width: 9}}") == {
        "name": "fcn.FCN",
        "width": 9,
        "dropout": 0.3,
    }
    assert decoder("model: {decoder: {width: 9}}") == {
        "name": "fcn.FCN",
        "width": 9,
        "dropout": 0.3,
    }
    assert decoder("", "model.decoder.name=other.Other") == {"name": "other.Other"}
    assert decoder("", "model.decoder={name: other.Other, depth: 2}") == {
        "name": "other.Other",
        "depth": 2,
    }
    assert decoder("", "model.decoder={width: 9}") == {
        "name": "fcn.FCN",
        "width": 9,
        "dropout": 0.3,
    }
    assert decoder("", "model.decoder.width=9") == {"name": "fcn.FCN", "width": 9, "dropout": 0.3}


def test_a_component_that_the_defaults_leave_open_can_be_named(write):
    cfg = load(
        write("data: {train: {name: toy.Toy, length: 4}}"),
        ["data.val.name=toy.Toy", "data.val.length=5"],
    )
    assert plain(cfg.data.train) == {"name": "toy.Toy", "length": 4}
    assert plain(cfg.data.val) == {"name": "toy.Toy", "length": 5}


def test_another_optimiser_keeps_the_other_options_of_the_section(write):
    """`optimizer.name` is a word, not module.Class: the section is no component."""
    for cfg in (
        load(write("optimizer: {name: SGD, lr: 0.1}")),
        load(write(""), ["optimizer.name=SGD", "optimizer.lr=0.1"]),
    ):
        assert (cfg.optimizer.name, cfg.optimizer.lr, cfg.optimizer.momentum) == ("SGD", 0.1, 0.9)


# --- overrides of lists and open mappings --------------------------------------------------------------------------


LOSSES = "losses: [{name: cross_entropy.CrossEntropy, weight: 1.0}, {name: occl.OCCL, weight: 1.0}]"


@pytest.mark.parametrize(
    "key, position",
    [("losses.0", 0), ("losses.1", 1), ("losses.cross_entropy", 0), ("losses.occl", 1)],
)
def test_an_entry_of_a_list_is_addressed_by_position_or_module(write, key, position):
    cfg = load(write(LOSSES), [f"{key}.weight=0.25", f"{key}.extra=[1, 2]"])
    changed, other = cfg.losses[position], cfg.losses[1 - position]
    assert (changed.weight, changed.extra) == (0.25, [1, 2])
    assert other.weight == 1.0 and "extra" not in other and "." in changed.name


def test_an_entry_of_a_list_can_be_replaced(write):
    cfg = load(write(LOSSES), ["losses.occl={name: dice.Dice}", "eval.crop.1=7"])
    assert [spec.name for spec in cfg.losses] == ["cross_entropy.CrossEntropy", "dice.Dice"]
    assert cfg.eval.crop == [512, 7]


@pytest.mark.parametrize("entry", ["2", "-1", "ocl"])
def test_an_entry_that_the_list_does_not_have_is_an_error(write, entry):
    with pytest.raises(ConfigError, match=f"no entry '{entry}'; it has cross_entropy, occl"):
        load(write(LOSSES), [f"losses.{entry}.weight=1"])


def test_open_mappings_take_new_names_and_components_new_options(write):
    cfg = load(
        write(""),
        [
            "prototypes.means.name=centroids.Centroids",
            "prototypes.means.momentum=0.9",
            "model.backbone.depth=18",
            "data.test.night.name=toy.Toy",
        ],
    )
    assert plain(cfg.prototypes) == {"means": {"name": "centroids.Centroids", "momentum": 0.9}}
    assert cfg.model.backbone.depth == 18 and cfg.data.test.night.name == "toy.Toy"


def test_overrides_are_applied_in_order_and_leave_the_original_alone(write):
    cfg = load(write(LOSSES))
    before = plain(cfg)
    changed = override(cfg, ["seed=1", "seed=2", "losses.occl.weight=0"])
    assert (changed.seed, changed.losses[1].weight) == (2, 0) and isinstance(
        changed.losses[1], config.Config
    )
    assert plain(cfg) == before


# --- saving, the folder, comparing ---------------------------------------------------------------------------------


def test_a_saved_configuration_gives_itself_back_and_runs_alone(write, tmp_path):
    write(
        f"optimizer: {{lr: 1e-5}}\n{LOSSES}\ndata: {{test: {{b: {{name: x.Y, boxes: [[1, 2.5], [], [null]]}}}}}}",
        "base.yaml",
    )
    strings = [
        "1e-4",
        "09",
        "010",
        "12e3",
        "on",
        "null",
        "",
        "~",
        "1:30",
        "true",
        ".5",
        "a: b",
        "# c",
        "Straße",
    ]
    cfg = load(
        write("base: base.yaml\nschedule: {warmup_ratio: 1.e-7}"),
        [f"model.bn_views={strings!r}", "optimizer.clip=1e20"],
    )
    target = tmp_path / "elsewhere" / "config.yaml"
    target.parent.mkdir()
    save(cfg, target)
    again = load(target)
    assert repr(plain(again)) == repr(plain(cfg))  # values, types and order
    assert (
        again.optimizer.lr == 1e-5
        and again.schedule.warmup_ratio == 1e-7
        and again.model.bn_views == strings
    )
    assert again.data.test.b.boxes == [[1, 2.5], [], [None]]
    assert (
        yaml.safe_load(target.read_text())["model"]["bn_views"] == strings
    )  # other programs read YAML 1.1


def test_the_automatic_folder_names_the_experiment_and_the_seed(write):
    assert load(write("seed: 3")).folder == "runs/experiment/seed3"
    assert (
        load(write("", "configs/work/configs/camvid/small.yaml"), ["seed=2"]).folder
        == "runs/camvid/small/seed2"
    )
    assert load(write("folder: mine")).folder == "mine"
    assert load(write(""), ["folder=there"]).folder == "there"


def test_plain_leaves_neither_config_nor_tuple():
    value = plain(config.Config(a=config.Config(b=(1, config.Config(c=2)))))
    assert value == {"a": {"b": [1, {"c": 2}]}}
    assert type(value) is dict and type(value["a"]) is dict and type(value["a"]["b"][1]) is dict


def test_difference_lists_dotted_keys_with_both_values():
    old = {"a": 1, "b": {"c": [1], "d": 2}, "gone": 0}
    new = {"a": 1, "b": {"c": [1, 2], "d": 2}, "new": {"x": 1}}
    assert difference(old, new) == {
        "b.c": ([1], [1, 2]),
        "gone": (0, None),
        "new": (None, {"x": 1}),
    }
    assert difference(old, old) == {}


# --- the defaults --------------------------------------------------------------------------------------------------


def test_every_default_has_a_comment_on_its_line():
    checked = 0
    for number, line in enumerate(config.DEFAULTS.read_text().splitlines(), start=1):
        section = re.fullmatch(r" *\w+:", line)
        component = re.fullmatch(
            r" *(- |\w+: )\{name: \w+\.\w+.*\}", line
        )  # documented in its own file
        if not line.strip() or line.lstrip().startswith("#") or section or component:
            continue
        assert re.search(r"\S\s+# \S", line), (
            f"line {number} of defaults.yaml has no comment: {line}"
        )
        checked += 1
    assert checked > 40


def test_every_default_has_a_range_and_lies_in_it():
    """What has none is true or false, or the name of a component."""
    for key in config._leaves(config.defaults()):
        value, kind = config.defaults(), config.RANGES
        for part in key.split("."):
            value, kind = value[part], kind.get(part) if isinstance(kind, dict) else None
        if kind is None:
            assert isinstance(value, bool) or key.endswith(".name"), key
        else:
            assert is_a(value, kind), key
    assert config.STAGE.keys() == config.STAGE_RANGES.keys()
    assert all(is_a(value, config.STAGE_RANGES[key]) for key, value in config.STAGE.items())


def test_options_do_not_grow_unnoticed():
    """A new option is a decision: does the field expect it, and can it not be a constant? Then write it here too."""
    assert sorted(dotted(read_yaml(config.DEFAULTS.read_text(), "defaults"))) == sorted(
        KEYS.split()
    )


# --- keys that have moved --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["projector", "text_attention", "auxiliary", "region"])
def test_a_key_that_has_moved_names_its_new_place(name):
    with pytest.raises(
        ConfigError, match=rf"'model.{name}' has moved to model.heads.{name}=\{{name"
    ):
        load(TINY, [f"model.{name}={{stage: 1}}"])
    with pytest.raises(ConfigError, match=rf"moved to stages.0.model.heads.{name}"):
        load(TINY, [f"stages=[{{model: {{{name}: {{stage: 1}}}}}}]"])


def test_the_configuration_of_an_older_checkpoint_becomes_one_of_today():
    cfg = config.plain(load(TINY))
    model = {k: v for k, v in cfg["model"].items() if k != "heads"}
    old = {"projector": {"channels": 16, "width": 0}, "text_attention": {"layers": 0}}
    old |= {"region": {"stage": 3, "cell": 2}, "auxiliary": {"stage": 0, "width": 8}}
    stage = {"name": "source", "model": {"region": {"stage": 0}}}
    new = config.modern(cfg | {"model": model | old, "stages": [stage, {"name": "adapt"}]})
    assert new["model"]["heads"] == {
        "projector": {"name": "projector.Projector", "channels": 16, "width": 0},
        "text_attention": {"name": "none"},
        "auxiliary": {"name": "none"},
        "region": {"name": "region.Region", "stage": 3, "cell": 2},
    }
    assert new["stages"][0]["model"] == {"heads": {"region": {"name": "none"}}}
    config.check(new, "here")
    assert config.modern(cfg) == cfg


def test_damaged_configurations_end_in_one_line_each():
    counts, _ = configurations.run(seed=0, count=25)
    assert (
        counts["accepted"] and counts["one line"] and counts["accepted"] + counts["one line"] == 25
    )


# --- stages --------------------------------------------------------------------------------------------------------


def test_stages_override_repeat_and_scale_the_learning_rate():
    cfg = load(
        TINY_UDA,
        [
            "stages=[{name: a, iters: 2}, {name: b, repeat: 3, lr_scale: 0.5, train: {batch_size: 2}}]"
        ],
    )
    result = stages(cfg)
    assert [stage.stage.name for stage in result] == ["a", "b1", "b2", "b3"]
    assert [stage.optimizer.lr for stage in result] == [1e-3, 1e-3, 5e-4, 2.5e-4]
    assert [(stage.train.iters, stage.train.batch_size) for stage in result[:2]] == [(2, 4), (3, 2)]
    assert [stage.stage.name for stage in stages(load(TINY_UDA, ["stages=[]"]))] == ["main"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("[{optimizer: {lrr: 1}}]", r"unknown key 'stages\.0\.optimizer\.lrr'; did you mean"),
        ("[{repaet: 2}]", r"unknown key 'stages\.0\.repaet'"),
        ("[{iters: many}]", r"stages\.0\.iters must be an int"),
        ("[main]", r"stages\.0 must be a mapping"),
        ("[{eval: {mode: slide, crop: [64, 64], stride: [65, 64]}}]", "stride 65 must not be larger"),
    ],
)
def test_mistakes_in_stages_are_named(spec, message):
    with pytest.raises(UserError, match=message):
        stages(load(TINY_UDA, [f"stages={spec}"]))


def test_every_stage_and_every_run_has_a_seed_of_its_own():
    runs = [stages(load(TINY_UDA, [f"seed={seed}"])) for seed in range(20)]
    assert [run[0].seed for run in runs] == [*range(20)]
    seeds = [stage.seed for run in runs for stage in run]
    seeds += [derived_seed(stage.seed, TARGET) for run in runs for stage in run]
    assert len({*seeds}) == 80 and max(seeds) < 2**30
