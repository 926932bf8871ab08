"""Maps of a frozen backbone that are computed once."""

import numpy as np
import pytest
import torch

from engine.config import ConfigError
from engine.errors import UserError
from models.cache import FeatureCache
from predict import load
from tests.runs import TINY, run, scalars, train

WHOLE = "data.augment={name: transforms.Whole, size: [48, 64], flip: 0.5}"
FROZEN = ("model.frozen=[backbone]", WHOLE)


def saved(folder, step=6):
    return torch.load(folder / f"step_{step:07d}.pt", weights_only=False)


class Counting(torch.nn.Module):
    """A backbone of two maps that counts the pictures it sees."""

    channels = [3, 6]  # noqa: RUF012

    def __init__(self, factor=1.0):
        super().__init__()
        self.register_buffer("factor", torch.tensor(factor))
        self.pictures = 0

    def forward(self, image):
        self.pictures += len(image)
        small = self.factor * image[..., ::4, ::4]
        return [small, torch.cat([small, -small], 1)[..., ::2, ::2]]


def test_a_picture_is_computed_once_and_read_in_half_precision_ever_after(tmp_path):
    backbone, images = Counting(), torch.rand(3, 3, 16, 24)
    cache = FeatureCache(backbone, {"name": "a.B"}, tmp_path)
    first = cache(images)
    assert backbone.pictures == 3
    expected = [maps.half().float() for maps in backbone(images)]
    again = FeatureCache(backbone, {"name": "a.B"}, tmp_path)(images.flip(0))
    assert backbone.pictures == 6  # those of `expected`
    for a, b, c in zip(first, again, expected, strict=True):
        assert torch.equal(a, c) and torch.equal(b.flip(0), c) and a.dtype == torch.float32
    changed = images.clone()
    changed[1, 0, 0, 0] += 1 / 255
    mixed = cache(changed)
    assert backbone.pictures == 7
    assert torch.equal(mixed[0][0], first[0][0]) and not torch.equal(mixed[0][1], first[0][1])


def test_maps_too_large_for_16_bits_are_refused_and_not_stored(tmp_path):
    cache = FeatureCache(Counting(1e6), {"name": "a.B"}, tmp_path)
    with pytest.raises(UserError, match=r"16 bits.*set model\.cache=none"):
        cache(torch.rand(1, 3, 16, 24))
    assert not [*tmp_path.rglob("*.npy")]


def test_other_weights_options_and_precision_have_files_of_their_own(tmp_path):
    image = torch.rand(1, 3, 16, 24)

    def maps(spec=None, factor=1.0):
        backbone = Counting(factor)
        maps = FeatureCache(backbone, {"name": "a.B", **(spec or {})}, tmp_path)(image)
        return maps[0], backbone.pictures

    assert maps()[1] == 1 and maps()[1] == 0
    other, computed = maps(factor=2.0)
    assert computed == 1 and torch.equal(other, (2 * image[..., ::4, ::4]).half().float())
    assert maps({"size": "b"})[1] == 1
    assert maps({"weights": "elsewhere.pth"})[1] == 0  # the weights count by their content
    with torch.autocast("cpu", torch.bfloat16):
        assert maps()[1] == 1


def test_training_on_stored_maps_is_training_on_the_frozen_backbone(tmp_path):
    cached = (*FROZEN, f"model.cache={tmp_path / 'maps'}")
    plain = train(tmp_path / "plain", *FROZEN)
    first = train(tmp_path / "first", *cached)
    count = len([*(tmp_path / "maps").rglob("*.npy")])
    again = train(tmp_path / "again", *cached)
    assert count and len([*(tmp_path / "maps").rglob("*.npy")]) == count
    for step, line in plain.items():
        rounding = 2e-3 if step == 1 else 5e-2  # later steps are of networks that grow apart
        assert first[step]["train/loss"] == pytest.approx(line["train/loss"], rel=rounding)
        assert again[step]["train/loss"] == first[step]["train/loss"]
    assert first != plain  # it did read: float16 shows
    best, picture = tmp_path / "first" / "best.pt", np.zeros((48, 64, 3), np.uint8)
    probabilities = [
        load(best, option).probabilities(picture) for option in ("seed=0", "model.cache=none")
    ]
    assert np.array_equal(*probabilities)  # of whole precision
    assert len([*(tmp_path / "maps").rglob("*.npy")]) == count  # nothing of a user's picture


def test_a_resumed_run_on_stored_maps_ends_bit_for_bit_equal(tmp_path):
    cached = (*FROZEN, f"model.cache={tmp_path / 'maps'}")
    train(tmp_path / "whole", *cached)
    train(tmp_path / "part", *cached, "train.iters=3", "schedule.warmup=2")
    (tmp_path / "part" / "results.json").unlink(missing_ok=True)
    whole = saved(tmp_path / "whole")["model"]
    train(tmp_path / "part2", *cached, f"resume={tmp_path / 'whole' / 'step_0000003.pt'}")
    resumed = saved(tmp_path / "part2")["model"]
    assert all(torch.equal(value, resumed[name]) for name, value in whole.items())


def test_two_processes_share_the_stored_maps(tmp_path):
    cached = (*FROZEN, f"model.cache={tmp_path / 'maps'}", "model.frozen_bn=[decoder]")
    cached += ("model.decoder={name: fcn.FCN, width: 16, dropout: 0.0}",)
    losses = []
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        code, output = run(folder, *cached, processes=processes, double=True, config=TINY)
        assert code == 0, output
        losses.append([line["train/loss"] for line in scalars(folder).values()])
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize(
    "overrides, sentence",
    [
        ((WHOLE,), r"frozen backbone: model\.frozen"),
        (("model.frozen=[backbone]",), "transforms.Augment draws ever new ones"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_training(tmp_path, overrides, sentence):
    with pytest.raises((ConfigError, UserError), match=sentence):
        train(tmp_path / "a", f"model.cache={tmp_path / 'maps'}", *overrides)
    assert not (tmp_path / "maps").exists()
