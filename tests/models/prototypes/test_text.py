"""Text prototypes: rows by hand, mismatches, the real arrays of CLIP, and the command that makes the file."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from datasets.camvid import CamVid
from datasets.cityscapes import Cityscapes
from engine.build import build
from engine.config import ConfigError
from engine.errors import UserError
from models.prototypes.text import (
    CLASSES,
    TEMPLATES,
    main,
    read_classes,
    read_names,
    read_rows,
    write_rows,
)
from models.prototypes.text import main as text_command
from tests.engine.damaged import refused
from tests.fuzz.files import saved
from tests.records import a_step
from tests.runs import ROOT

REAL = ROOT.parent / "shared" / "data" / "clip"
NAMES = ("Road", "Car", "Sky", "traffic light")
D = 6


def vectors(rows=4, seed=0):
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def write(folder, values=None, names=NAMES, **more):
    """A file as the command makes it."""
    path = folder / "text.pt"
    torch.save(
        {"vectors": vectors() if values is None else values, "classes": list(names), **more}, path
    )
    return str(path)


def make(file, classes=NAMES, in_channels=D, **options):
    spec = {"name": "text.Text", "file": str(file), **options}
    return build(
        "models.prototypes",
        spec,
        num_classes=len(classes),
        in_channels=in_channels,
        classes=classes,
    )


def units(x):
    return x / x.norm(dim=-1, keepdim=True)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_have_length_one_and_are_deterministic(tmp_path):
    first, second = (make(write(tmp_path, 7 * vectors())) for _ in range(2))
    for rows in (first.means(), first.text):
        assert rows.dtype == torch.float32
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(4), rtol=0, atol=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))
    assert first.seen.all() and not list(first.parameters())


@pytest.mark.parametrize("center", [True, False])
def test_rows_are_in_the_order_of_the_data_set_whatever_that_of_the_file(center, tmp_path):
    expected = make(write(tmp_path), center=center)
    order = [2, 0, 3, 1]
    file = write(tmp_path, vectors()[order], [NAMES[i].upper() for i in order])
    actual = make(file, center=center)
    assert torch.equal(actual.text, expected.text)
    torch.testing.assert_close(actual.vectors, expected.vectors, rtol=0, atol=1e-6)
    torch.testing.assert_close(actual.text, units(vectors()))


def test_centring_by_hand(tmp_path):
    plain, centred = (make(write(tmp_path), center=center) for center in (False, True))
    torch.testing.assert_close(plain.means(), units(vectors()))
    rows = units(vectors())
    torch.testing.assert_close(centred.means(), units(rows - rows.mean(0)))
    torch.testing.assert_close(centred.text, rows)


def test_centring_is_over_the_classes_of_the_data_set_alone(tmp_path):
    file = write(tmp_path, vectors(6), [*NAMES, "ship", "moon"])
    rows = units(vectors(6))[:4]
    torch.testing.assert_close(make(file).means(), units(rows - rows.mean(0)))


def test_mapped_classes_are_the_mean_of_unit_rows(tmp_path):
    values = vectors(5) * torch.tensor([1.0, 2.0, 30.0, 1.0, 1.0])[:, None]
    file = write(tmp_path, values, ["street", "van", "CAR", "sky", "signal"])
    mapping = {"road": ["street"], "Car": ["van", "car"], "Traffic Light": "signal"}
    actual = make(file, map=mapping, center=False).means()
    rows = units(values)
    torch.testing.assert_close(
        actual, units(torch.stack([rows[0], (rows[1] + rows[2]) / 2, rows[3], rows[4]]))
    )


def test_score_is_the_cosine_and_nothing_changes_the_rows(tmp_path):
    member = make(write(tmp_path))
    features, labels = torch.randn(2, D, 3, 5), torch.randint(4, (2, 3, 5))
    expected = F.cosine_similarity(features[:, None], member.means()[None, :, :, None, None], dim=2)
    torch.testing.assert_close(member.score(features), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert member.score(features.bfloat16()).dtype == torch.float32
    before = {key: value.clone() for key, value in member.state_dict().items()}
    member.update([(features, labels, None)], a_step())
    member.fit(lambda: [(features, labels, None)], {})
    assert all(torch.equal(value, before[key]) for key, value in member.state_dict().items())


def test_plain_arrays_take_names_from_a_list_or_a_file(tmp_path):
    np.save(tmp_path / "rows.npy", vectors().numpy().astype(np.float16))
    torch.save(vectors(), tmp_path / "rows.pt")
    (tmp_path / "names.txt").write_text("".join(f"{name}\n" for name in NAMES) + "\n")
    (tmp_path / "columns.txt").write_text(
        "".join(f"{i}\t7\t{name}\ta photo of it\n" for i, name in enumerate(NAMES))
    )
    expected = make(write(tmp_path))
    for file in ("rows.npy", "rows.pt"):
        for rows in (str(tmp_path / "names.txt"), str(tmp_path / "columns.txt"), list(NAMES)):
            actual = make(tmp_path / file, rows=rows).means()
            torch.testing.assert_close(
                actual, expected.means(), rtol=0, atol=2e-3 if "npy" in file else 1e-6
            )


# --- mismatches ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, options, message",
    [
        (
            ["Road", "Car", "Sky", "signal"],
            {},
            r"no row for traffic light.*its rows are road, car, sky, signal.*map: ",
        ),
        (["Road", "Car", "Sky"], {}, "4 rows and there are 3 names"),
        (["Road", "car", "CAR", "Sky"], {}, "several rows are called car"),
        (NAMES, {"map": {"Raod": ["Car"]}}, r"map names the class 'raod'.*did you mean 'road'"),
        (NAMES, {"map": {"Road": ["Cra"]}}, r"map\.road names 'Cra'.*did you mean 'car'"),
        (NAMES, {"map": {"Road": []}}, r"map\.road names 'nothing'"),
        (NAMES, {"rows": ["a"]}, "leave out the option rows"),
        (NAMES, {"classes": ("Road", "Car", "Sky")}, None),
        (NAMES, {"classes": ("Road", "Car", "ROAD", "Sky")}, "several classes are called road"),
        (NAMES, {"in_channels": 8}, r"6 channels.* 8: set model\.heads\.projector=.*channels: 6}"),
    ],
)
def test_mismatches_name_what_is_wrong_and_what_to_do(names, options, message, tmp_path):
    file = write(tmp_path, names=names)
    if message is None:  # more rows than classes
        assert make(file, **options).means().shape == (3, D)
        return
    with pytest.raises(ConfigError, match=message):
        make(file, **options)


def test_files_that_cannot_be_used_say_why(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no file .*none\.pt; make it: python -m models\.prototypes\.text out="
    ):
        make(tmp_path / "none.pt")
    np.save(tmp_path / "rows.npy", vectors().numpy())
    with pytest.raises(ConfigError, match="does not name its rows: give rows"):
        make(tmp_path / "rows.npy")
    torch.save({"state_dict": {}}, tmp_path / "other.pt")
    with pytest.raises(ConfigError, match="must hold `vectors` and `classes`"):
        make(tmp_path / "other.pt")
    np.save(tmp_path / "rows.npy", np.arange(4))
    with pytest.raises(ConfigError, match="one array of floating-point numbers"):
        make(tmp_path / "rows.npy", rows=list(NAMES))
    with pytest.raises(ConfigError, match="4 classes and 3 names"):
        build(
            "models.prototypes",
            {"name": "text.Text", "file": write(tmp_path)},
            num_classes=4,
            in_channels=D,
            classes=NAMES[:3],
        )
    for values in (
        vectors().index_fill(0, torch.tensor([1]), 0.0),
        vectors()[:1].repeat(4, 1),
        vectors() * torch.nan,
    ):
        with pytest.raises(ConfigError, match="zero, not finite, or the same"):
            make(write(tmp_path, values.clone()))
    assert (
        make(write(tmp_path, vectors()[:1].expand(4, D).clone()), center=False)
        .means()
        .isfinite()
        .all()
    )


def test_the_file_is_read_without_open_clip(tmp_path):
    """Training reads the file alone; nothing else of this package needs open_clip or timm."""
    code = (
        "import sys; from engine.build import build; "
        f"member = build('models.prototypes', {{'name': 'text.Text', 'file': {write(tmp_path)!r}}}, num_classes=4, "
        f"in_channels={D}, classes={NAMES!r}); assert member.means().shape == (4, {D}); "
        "assert not {'open_clip', 'timm', 'models.backbones.clip'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# --- the real arrays -------------------------------------------------------------------------------------------------


needs_real = pytest.mark.skipif(not REAL.is_dir(), reason=f"no CLIP text embeddings in {REAL}")
CONCEPTS = {
    "Pavement": ["sidewalk"],
    "SignSymbol": ["traffic sign", "traffic light"],
    "Pedestrian": ["person", "pedestrian"],
    "Bicyclist": ["cyclist"],
}


WALL = {"wall": ["individual standing wall, which is not part of a building"]}


@needs_real
@pytest.mark.parametrize(
    "array, rows, classes, mapping",
    [
        ("camvid11_ViT-B-16", "camvid11_prompts", CamVid.CLASSES, None),
        ("cityscapes_single", "cityscapes_classes", Cityscapes.CLASSES, None),
        ("cityscapes_conceptavg3_single", "cityscapes_classes", Cityscapes.CLASSES, None),
        ("cityscapes_maskclip_ViT-B-16", "cityscapes_classes", Cityscapes.CLASSES, None),
        ("cityscapes_concept3_single", "cityscapes_concept3_names", Cityscapes.CLASSES, WALL),
        ("cityscapes_concept3_single", "cityscapes_concept3_names", CamVid.CLASSES, CONCEPTS),
        ("ade_single", "ade20k_classes", ("road", "sky", "car"), None),
    ],
)
def test_every_real_array_loads(array, rows, classes, mapping):
    member = make(REAL / f"{array}.npy", classes, 512, rows=str(REAL / f"{rows}.txt"), map=mapping)
    assert member.means().shape == (len(classes), 512)
    torch.testing.assert_close(member.means().norm(dim=1), torch.ones(len(classes)))


@needs_real
def test_real_names_are_read_from_their_column():
    assert tuple(read_names(REAL / "camvid11_prompts.txt")) == CamVid.CLASSES
    assert tuple(read_names(REAL / "cityscapes_classes.txt")) == Cityscapes.CLASSES
    names = read_names(REAL / "cityscapes_concept3_names.txt")
    assert len(names) == 54 and names[:4] == ["road", "street", "parking space", "sidewalk"]
    assert len(read_names(REAL / "ade20k_classes.txt")) == 150


@needs_real
def test_centring_takes_away_what_the_rows_of_camvid_share():
    member = make(
        REAL / "camvid11_ViT-B-16.npy", CamVid.CLASSES, 512, rows=str(REAL / "camvid11_prompts.txt")
    )
    apart = ~torch.eye(11, dtype=torch.bool)
    raw, centred = ((rows @ rows.T)[apart] for rows in (member.text, member.vectors))
    assert raw.min() > 0.73 and 0.88 < raw.max() < 0.89
    assert centred.min() > -0.33 and 0.21 < centred.max() < 0.22


@needs_real
def test_rows_of_two_sources_agree_by_class():
    """Two groups made these arrays independently: every row is nearest to its own class of the other."""
    one, two = (
        make(
            REAL / f"cityscapes_{kind}.npy",
            Cityscapes.CLASSES,
            512,
            rows=str(REAL / "cityscapes_classes.txt"),
        )
        for kind in ("single", "maskclip_ViT-B-16")
    )
    for rows, others in ((one.text, two.text), (one.vectors, two.vectors)):
        assert ((rows @ others.T).argmax(1) == torch.arange(19)).all()


# --- the command -----------------------------------------------------------------------------------------------------


def test_lists_are_those_of_the_data_sets():
    assert (
        tuple(CLASSES["camvid"]) == CamVid.CLASSES
        and tuple(CLASSES["cityscapes"]) == Cityscapes.CLASSES
    )
    assert len({*TEMPLATES["ensemble"]}) == 8 and TEMPLATES["single"][0] in TEMPLATES["ensemble"]
    assert CLASSES["cityscapes"]["vegetation"] == ["vegetation", "tree", "bush"]


def test_classes_are_a_list_a_mapping_or_a_file_of_either(tmp_path):
    assert read_classes(["a", "b"]) == {"a": ["a"], "b": ["b"]}
    assert read_classes({"a": ["x", "y"], "b": "z"}) == {"a": ["x", "y"], "b": ["z"]}
    (tmp_path / "classes.yaml").write_text("Car: [car, van]\nno: [no]\n")
    assert read_classes(str(tmp_path / "classes.yaml")) == {"Car": ["car", "van"], "no": ["no"]}
    (tmp_path / "classes.txt").write_text("0\troad\n1\ttraffic light\n")
    assert read_classes(str(tmp_path / "classes.txt")) == {
        "road": ["road"],
        "traffic light": ["traffic light"],
    }
    with pytest.raises(UserError, match="classes=cityscape is neither cityscapes nor camvid"):
        read_classes("cityscape")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small CLIP that open_clip knows by name, with and without QuickGELU, and a file of random weights."""
    open_clip = pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    folder = tmp_path_factory.mktemp("models")
    tower = {"context_length": 20, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    config = {"embed_dim": 24, "vision_cfg": vision, "text_cfg": tower}
    (folder / "small.json").write_text(json.dumps(config))
    (folder / "small-quickgelu.json").write_text(json.dumps(config | {"quick_gelu": True}))
    open_clip.add_model_config(folder)
    torch.manual_seed(3)
    network = open_clip.create_model("small").eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # so that an activation makes a difference
    torch.save(network.state_dict(), folder / "small.pt")
    return open_clip, network, str(folder / "small.pt")


def by_hand(open_clip, network, model, prompts):
    rows, tokenizer = [], open_clip.get_tokenizer(model)
    for texts in prompts:
        tokens = torch.cat([tokenizer([text]) for text in texts])
        rows.append(F.normalize(F.normalize(network.encode_text(tokens), dim=1).mean(0), dim=0))
    return torch.stack(rows)


@torch.no_grad()
def test_the_command_makes_a_file_of_open_clips_own_embeddings(clip, tmp_path):
    open_clip, network, weights = clip
    out = tmp_path / "new" / "text.pt"
    arguments = [
        f"out={out}",
        "model=small",
        f"pretrained={weights}",
        "classes={Car: [car, van], Sky: sky}",
    ]
    main([*arguments, "templates=['a {} at night.', 'a {}.']"])
    content = torch.load(out, weights_only=True)
    prompts = {
        "Car": ["a car at night.", "a car.", "a van at night.", "a van."],
        "Sky": ["a sky at night.", "a sky."],
    }
    assert content["classes"] == ["Car", "Sky"] and content["prompts"] == prompts
    assert (content["model"], content["pretrained"], content["activation"]) == (
        "small",
        weights,
        "GELU",
    )
    expected = by_hand(open_clip, network, "small", prompts.values())
    assert content["vectors"].dtype == torch.float32
    torch.testing.assert_close(content["vectors"], expected, rtol=1e-5, atol=1e-5)
    assert [path.name for path in out.parent.iterdir()] == ["text.pt"]  # nothing unfinished is left
    torch.testing.assert_close(
        make(out, ("sky", "car"), 24, center=False).means(), content["vectors"].flip(0)
    )
    main([*arguments, "templates=['a {} at night.', 'a {}.']"])
    assert torch.equal(torch.load(out, weights_only=True)["vectors"], content["vectors"])


@torch.no_grad()
def test_the_command_takes_the_lists_and_templates_by_name(clip, tmp_path):
    open_clip, network, weights = clip
    main([f"out={tmp_path / 'c.pt'}", "model=small", f"pretrained={weights}", "classes=camvid"])
    content = torch.load(tmp_path / "c.pt", weights_only=True)
    assert tuple(content["classes"]) == CamVid.CLASSES
    assert len(content["prompts"]["Road"]) == 8 and len(content["prompts"]["Pavement"]) == 16
    expected = by_hand(open_clip, network, "small", content["prompts"].values())
    torch.testing.assert_close(content["vectors"], expected, rtol=1e-5, atol=1e-5)
    assert make(tmp_path / "c.pt", CamVid.CLASSES, 24).means().shape == (11, 24)


@torch.no_grad()
def test_weights_of_openai_get_quickgelu(clip, tmp_path, monkeypatch):
    open_clip, network, weights = clip
    quick = open_clip.create_model("small-quickgelu").eval()
    quick.load_state_dict(network.state_dict())
    expected = by_hand(open_clip, quick, "small", [["a photo of a car."]])
    assert (
        expected - by_hand(open_clip, network, "small", [["a photo of a car."]])
    ).abs().max() > 1e-3
    state = network.state_dict()
    marked = tmp_path / "openai.pt"
    numbers = {"input_resolution": torch.tensor(32), "context_length": torch.tensor(20)}
    torch.save({key: value.clone() for key, value in state.items()} | numbers, marked)
    tag = {"openai": {"file": weights, "quick_gelu": True}}
    monkeypatch.setitem(open_clip.pretrained._PRETRAINED, "small", tag)
    out = tmp_path / "text.pt"
    for model, source in [("small", marked), ("small-quickgelu", weights), ("small", "openai")]:
        main(
            [
                f"out={out}",
                f"model={model}",
                f"pretrained={source}",
                "classes=[car]",
                "templates=single",
            ]
        )
        content = torch.load(out, weights_only=True)
        assert content["activation"] == "QuickGELU"
        torch.testing.assert_close(content["vectors"], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "out=PATH and classes"),
        (["clases=[a]"], r"'clases=\[a\]' is not of the form key=value; did you mean 'classes'"),
        (["classes"], "not of the form"),
        (["out=x.pt", "classes=[a"], "not valid YAML"),
        (["out=x.pt", "classes=[a]", "templates=ensembel"], "templates must be single or ensemble"),
        (["out=x.pt", "classes=[a]", "templates=[a photo]"], "templates must be"),
        (
            ["out=x.pt", "classes=[a]", "model=ViT-B16"],
            "open_clip has no model 'ViT-B16'; did you mean",
        ),
        (
            ["out=x.pt", "classes=[a]", "pretrained=opnai"],
            r"no file opnai, and the weights .* of ViT-B-16 are: openai",
        ),
    ],
)
def test_wrong_arguments_give_one_clear_message(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if any(key in message for key in ("open_clip", "opnai")):
        pytest.importorskip("open_clip", reason="open_clip_torch is not installed")
    with pytest.raises(UserError, match=message):
        main(arguments)
    assert not list(tmp_path.iterdir())


def test_the_command_runs_as_a_module():
    command = [sys.executable, "-m", "models.prototypes.text"]
    usage = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (
        usage.returncode == 1 and "out=prototypes/cityscapes.pt classes=cityscapes" in usage.stderr
    )
    wrong = subprocess.run([*command, "out=x.pt"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: out=PATH and classes=")


# --- arrays, texts, caches -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, message",
    [("a: {b: c}", "list of names"), ("just text", "list of names"), ("[a, [b]]", "list of names"),
     ("a: []", "list of names"), ("", "list of names"), ("a: [b", "is not valid YAML"),
     ("[" * 400, "is not valid YAML")],
)  # fmt: skip
def test_a_file_of_classes_that_holds_something_else_is_refused(tmp_path, text, message):
    path = tmp_path / "classes.yaml"
    assert message in refused(path, text.encode(), lambda path: read_classes(str(path)))


@pytest.mark.parametrize(
    "argument",
    ["model=[a]", "out={a: b}", "templates={a: b}", "templates=[[a]]", "classes={a: {b: c}}"],
)
def test_an_argument_of_another_kind_is_one_line(tmp_path, argument):
    with pytest.raises(UserError, match=r"^[^\n]*must be [^\n]*$"):
        text_command([f"out={tmp_path}/a.pt", "classes=camvid", argument])


def test_rows_whose_names_are_no_names_are_refused_and_a_failed_write_leaves_nothing(tmp_path):
    for classes in (3, "abc", [1, 2, 3], None):
        data = saved({"vectors": torch.ones(3, 4), "classes": classes})
        with pytest.raises(ValueError, match=r"`classes` must be a list of names"):
            (tmp_path / "a.pt").write_bytes(data)
            read_rows(tmp_path / "a.pt", None)
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="could not write"):
        write_rows(tmp_path / "folder", torch.ones(3, 4), ["a", "b", "c"])
    assert {path.name for path in tmp_path.iterdir()} == {"a.pt", "folder"}
