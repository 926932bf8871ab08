"""predict.py on a checkpoint of the smallest run: what is labelled, under which names, and what stops it."""

import errno

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

import eval as evaluation
import predict
from engine import checkpoint
from engine.config import ConfigError
from engine.errors import UserError
from engine.inference import predict as scored
from tests.runs import TINY, train


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """Path of a checkpoint of one training step."""
    folder = tmp_path_factory.mktemp("run")
    train(folder, "train.iters=1", "eval.pictures=0", config=TINY)
    return str(folder / "best.pt")


@pytest.fixture
def never_loaded(monkeypatch):
    """The network is not loaded."""

    def fail(*_):
        raise AssertionError("the network was loaded")

    monkeypatch.setattr(predict, "load_network", fail)


def draw(path, size=(48, 32), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(0).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def written(out):
    """Names of the results below each folder."""
    names = {
        kind: sorted(p.relative_to(out / kind).as_posix() for p in (out / kind).rglob("*.png"))
        for kind in predict.KINDS
    }
    assert names["ids"] == names["colors"] == names["overlays"]
    return names["ids"]


def label(best, pictures, out, *overrides):
    predict.main([best, str(pictures), str(out), *overrides])


def test_a_folder_of_pictures_of_any_kind(best, tmp_path, capsys):
    draw(tmp_path / "in" / "a.jpg", (57, 40))
    draw(tmp_path / "in" / "city" / "grey.png", (48, 33), "L")
    label(best, tmp_path / "in", tmp_path / "out")
    assert "2 pictures written: " in capsys.readouterr().out
    palette = checkpoint.load(best)["palette"]
    for name, size in (("a.png", (57, 40)), ("city/grey.png", (48, 33))):
        ids, colors, overlay = (Image.open(tmp_path / "out" / k / name) for k in predict.KINDS)
        assert ids.mode == "L" and ids.size == size and np.array(ids).max() < 11
        assert colors.mode == "P" and np.array_equal(np.array(colors), np.array(ids))
        assert colors.getpalette()[:3] == list(palette[0]) and overlay.size == size


def test_a_single_picture(best, tmp_path):
    draw(tmp_path / "in" / "a.png")
    draw(tmp_path / "in" / "b.png")
    label(best, tmp_path / "in" / "a.png", tmp_path / "in" / "out")
    assert written(tmp_path / "in" / "out") == ["a.png"]


def test_pictures_of_one_stem_keep_their_suffix(best, tmp_path, capsys):
    for name in ("a.jpg", "a.png", "b.png", "c/a.jpg", "a.jpg.png"):
        draw(tmp_path / "in" / name)
    label(best, tmp_path / "in", tmp_path / "out")
    names = ["a.jpg.png", "a.jpg.png.png", "a.png.png", "b.png", "c/a.png"]
    assert written(tmp_path / "out") == names and "5 pictures" in capsys.readouterr().out


def test_hidden_files_and_earlier_results_are_no_pictures_and_links_are_followed(best, tmp_path):
    pictures = tmp_path / "in"
    for path in (pictures / "a.png", pictures / ".b.png", pictures / ".c" / "d.png"):
        draw(path)
    (pictures / "._a.jpg").write_bytes(b"no picture")
    draw(tmp_path / "elsewhere" / "e.PNG")
    (pictures / "city").symlink_to(tmp_path / "elsewhere")
    (pictures / "loop").symlink_to(pictures)
    for _ in range(2):
        label(best, pictures, pictures / "out")
        assert written(pictures / "out") == ["a.png", "city/e.png"]


def test_pictures_may_lie_in_the_folder_of_the_results(best, tmp_path):
    draw(tmp_path / "in" / "a.png")
    label(best, tmp_path / "in", tmp_path)
    assert written(tmp_path) == ["a.png"]


def test_a_broken_picture_is_named_and_skipped(best, tmp_path, capsys):
    for name in ("a.png", "c.png"):
        draw(tmp_path / "in" / name)
    (tmp_path / "in" / "b.jpg").write_bytes(b"no picture")
    label(best, tmp_path / "in", tmp_path / "out")
    output = capsys.readouterr().out
    assert [line for line in output.splitlines() if "b.jpg" in line and "skipped: " in line]
    assert "2 pictures written, 1 skipped: " in output
    assert written(tmp_path / "out") == ["a.png", "c.png"]
    with pytest.raises(UserError, match="none of the 1 pictures could be read"):
        label(best, tmp_path / "in" / "b.jpg", tmp_path / "out")


def test_what_cannot_be_labelled_is_said_before_the_network_is_loaded(tmp_path, never_loaded):
    pictures, file = tmp_path / "in", tmp_path / "file"
    (tmp_path / "empty").mkdir()
    file.write_text("")
    draw(pictures / "a.png")
    draw(tmp_path / "ids" / "a.png")
    before = (tmp_path / "ids" / "a.png").read_bytes()
    for given, out, message in (
        (tmp_path / "nowhere", tmp_path / "out", "there is no file or folder .*nowhere"),
        (tmp_path / "empty", tmp_path / "out", "there are no pictures .*in .*empty"),
        (pictures, file, "cannot make the folder .*file"),
        (pictures, file / "out", "cannot make the folder .*file/out"),
        (pictures, pictures, "cannot share .*in: choose another folder"),
        (tmp_path / "ids", tmp_path, "would overwrite the picture .*a.png"),
        (tmp_path / "ids" / "a.png", tmp_path, "would overwrite the picture .*a.png"),
    ):
        with pytest.raises(UserError, match=message):
            label("none.pt", given, out)
    assert (tmp_path / "ids" / "a.png").read_bytes() == before


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()]
)
def test_results_appear_whole_or_not_at_all(best, tmp_path, monkeypatch, error):
    draw(tmp_path / "in" / "a.png")

    def half(self, path, **_):
        path.write_bytes(b"half")
        raise error

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises((UserError, KeyboardInterrupt)) as caught:
        label(best, tmp_path / "in", tmp_path / "out")
    if isinstance(error, OSError):
        assert f"could not write {tmp_path}/out/ids/a.png: No space left" in str(caught.value)
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("value", "message"),
    [(float("nan"), "the weights decoder.* are not finite"), (3e38, "a.png: the network's scores")],
)
def test_what_is_not_finite_labels_nothing(best, tmp_path, value, message):
    draw(tmp_path / "in" / "a.png")
    saved = checkpoint.load(best)
    name = next(
        key for key in saved["model"] if key.startswith("decoder") and key.endswith("weight")
    )
    saved["model"][name].fill_(value)
    torch.save(saved, tmp_path / "broken.pt")
    with pytest.raises(UserError, match=message):
        label(str(tmp_path / "broken.pt"), tmp_path / "in", tmp_path / "out")
    assert written(tmp_path / "out") == []


def test_a_picture_too_small_for_the_network_is_named_and_skipped(tmp_path, capsys):
    options = ["model.backbone={name: mit.MiT, size: b0, weights: none}", "eval.pictures=0"]
    train(tmp_path / "run", "train.iters=1", *options)
    draw(tmp_path / "in" / "a.png")
    draw(tmp_path / "in" / "b.png", (20, 20))
    label(str(tmp_path / "run" / "best.pt"), tmp_path / "in", tmp_path / "out")
    assert written(tmp_path / "out") == ["a.png"]
    said = capsys.readouterr().out
    assert "in/b.png: the network cannot take 1 x 20x20 pixels" in said and "1 skipped" in said
    spec = "data.test.toy={name: toy.Toy, split: test, length: 2, size: [20, 20]}"
    with pytest.raises(UserError, match=r"^toy, \S+: the network cannot take 1 x 20x20 pixels"):
        evaluation.main([str(tmp_path / "run" / "best.pt"), spec])


# --- in Python -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(best):
    before = torch.get_rng_state(), torch.get_num_threads()
    found = predict.load(best, "device=cpu", "threads=3")
    assert torch.get_num_threads() == before[1] and torch.equal(torch.get_rng_state(), before[0])
    return found


def test_a_file_an_array_and_lists_of_them_have_the_same_labels(best, model, tmp_path):
    draw(tmp_path / "in" / "a.png", (57, 40))
    label(best, tmp_path / "in", tmp_path / "out")
    expected = np.array(Image.open(tmp_path / "out" / "ids" / "a.png"))
    path = tmp_path / "in" / "a.png"
    pixels = np.array(Image.open(path))
    turned = np.ascontiguousarray(pixels[..., ::-1])[..., ::-1]  # as of cv2.imread
    for picture in (path, str(path), pixels, turned, Image.open(path)):
        labels = model(picture)
        assert labels.dtype == np.uint8 and np.array_equal(labels, expected)
    for several in ([path, pixels], np.stack([pixels, pixels])):
        assert all(np.array_equal(labels, expected) for labels in model(several))
    saved = checkpoint.load(best)
    assert model.classes == saved["classes"] and model.palette == saved["palette"]
    colored = model.colored(expected)
    assert colored.mode == "P" and colored.getpalette()[:3] == list(model.palette[0])
    for wrong in (pixels / 255.0, pixels[..., 0], pixels[..., :2], None):
        with pytest.raises(UserError, match=r"the picture must be \(H, W, 3\) uint8, not"):
            model(wrong)
    with pytest.raises(UserError, match=r"cannot read the image .*no\.png"):
        model(tmp_path / "no.png")


@pytest.mark.parametrize("overrides", [(), ("eval.flip=true",), ("eval.scales=[0.5,1.0]",)])
def test_probabilities_sum_to_one_and_are_those_of_evaluation(best, overrides):
    model = predict.load(best, *overrides)
    pixels = np.random.default_rng(0).integers(0, 255, (40, 57, 3), dtype=np.uint8)
    chances = model.probabilities(pixels)
    assert chances.shape == (11, 40, 57) and np.allclose(chances.sum(0), 1, atol=1e-5)
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    scores = scored(model.network, image, model.cfg.eval)
    expected = scores if overrides else scores.softmax(1)
    assert torch.equal(torch.from_numpy(chances), expected[0])
    assert np.array_equal(model(pixels), scores.argmax(1)[0].numpy())


# --- patterns, videos, probabilities ----------------------------------------------------------------------------------


def test_a_pattern_names_pictures_by_their_place_below_what_is_fixed(best, tmp_path, capsys):
    for name in ("a.jpg", "b.png", "notes.txt", "city/c.jpg"):
        draw(tmp_path / "in" / name) if name != "notes.txt" else (tmp_path / "in" / name).touch()
    label(best, tmp_path / "in" / "*.*", tmp_path / "one")
    assert written(tmp_path / "one") == ["a.png", "b.png"]
    for _ in range(2):
        label(best, tmp_path / "in" / "**" / "*.jpg", tmp_path / "in" / "out")
        assert written(tmp_path / "in" / "out") == ["a.png", "city/c.png"]
    with pytest.raises(UserError, match=r"there are no pictures .* in .*\*.gif"):
        label(best, tmp_path / "in" / "*.gif", tmp_path / "two")
    draw(tmp_path / "my [1]" / "a.png")
    with pytest.raises(UserError, match=r"no pictures .* in .*my \[1\].*; in a pattern write \[\[\] for"):
        label(best, tmp_path / "my [1]" / "*.png", tmp_path / "two")
    label(best, tmp_path / "my [[]1]" / "*.png", tmp_path / "two")
    assert written(tmp_path / "two") == ["my [1]/a.png"]


def test_what_is_asked_wrongly_is_said_before_the_network_is_loaded(tmp_path, never_loaded):
    draw(tmp_path / "a.png")
    for more, message in (
        ("b.jpg", "b.jpg is one argument too many: .* a pattern in quotes"),
        ("probabilities=yes", "probabilities must be true, not yes"),
    ):
        with pytest.raises(ConfigError, match=message):
            label("none.pt", tmp_path / "a.png", tmp_path / "out", more)


def test_the_frames_of_a_video_are_labelled_and_its_damage_is_named(best, tmp_path, capsys):
    path = tmp_path / "film.avi"
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 5, (48, 32))
    for number in range(3):
        video.write(np.full((32, 48, 3), (250, 60 * number, 0), np.uint8))  # blue first
    video.release()
    seen = [image for _, _, image in predict.frames(path, path)]
    assert seen[0].shape == (32, 48, 3) and seen[0][..., 2].mean() > 200 > seen[0][..., 0].mean()
    (tmp_path / "other.mp4").write_bytes(b"no video")
    label(best, tmp_path / "*.*", tmp_path / "out", "probabilities=true")
    names = [f"film/{number:06d}.png" for number in range(3)]
    assert written(tmp_path / "out") == names
    said = capsys.readouterr().out
    assert "3 pictures written, 1 skipped" in said
    assert "skipped: " in said and "other.mp4: 0 of 0 frames can be read" in said
    ids = np.array(Image.open(tmp_path / "out" / "ids" / names[2]))
    chances = np.load(tmp_path / "out" / "probabilities" / "film" / "000002.npy")
    assert chances.dtype == np.float16 and chances.shape == (11, 32, 48)
    assert (chances.max(0) - np.take_along_axis(chances, ids[None], 0)[0]).max() < 1e-3
