"""masked.Masked: patches of the target are hidden; labels and weights are those of the target."""

import pytest
import torch

from datasets.masked import Masked
from datasets.mixers import ClassMix
from engine.build import build
from engine.errors import UserError
from tests.datasets.test_mixers import SIZE, batch, constant, mixed
from tests.records import a_step

PLAIN = {"color_p": 0.0, "blur_p": 0.0}
CLASS_MIX = {"name": "mixers.ClassMix"}


def test_it_adds_one_view_to_those_of_the_other_mixer():
    weights = {"target": constant(0.25)}
    alone, step = (
        mixed(ClassMix(seed=3), dict(weights)),
        mixed(
            build("datasets", {"name": "masked.Masked", "mixer": CLASS_MIX}, seed=3), dict(weights)
        ),
    )
    assert [*step.views] == [*alone.views, "masked"] and step.views["masked"].domain == "target"
    assert torch.equal(step.views["mixed"].image, alone.views["mixed"].image)
    assert torch.equal(step.labels["mixed"], alone.labels["mixed"])
    assert step.labels["masked"] is step.labels["target"]
    assert step.weights["masked"] is step.weights["target"]
    assert not torch.equal(step.views["masked"].image, step.target.image)


def test_hidden_patches_have_the_mean_colour_and_the_others_are_as_they_were():
    mixer = Masked(mixer=CLASS_MIX, block=4, ratio=0.5, **PLAIN)
    step = mixed(mixer)
    shown, image = step.views["masked"].image, step.target.image
    hidden = mixer.hidden(step.target.sample, SIZE)
    assert hidden.shape == (2, *SIZE) and 0.2 < hidden.float().mean() < 0.8
    assert not torch.equal(hidden[0], hidden[1])
    for top in range(0, SIZE[0], 4):  # whole patches, cut at the right border
        for left in range(0, SIZE[1], 4):
            patch = hidden[:, top : top + 4, left : left + 4].flatten(1)
            assert (patch == patch[:, :1]).all()
    mean = image.mean((2, 3), keepdim=True).expand_as(image)
    assert torch.equal(shown, torch.where(hidden[:, None], mean, image))


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
def test_the_ratio_is_the_share_of_hidden_patches(ratio):
    mixer = Masked(mixer=CLASS_MIX, block=2, ratio=ratio)
    share = mixer.hidden(torch.arange(40), (40, 40)).double().mean()
    assert abs(share - ratio) < 0.02 * (0 < ratio < 1) + 1e-9


def test_what_is_hidden_and_changed_depends_on_the_sample_and_the_seed_alone():
    options = {"mixer": CLASS_MIX, "block": 4, "color_p": 1.0, "blur_p": 1.0}
    one, again = (mixed(Masked(**options), samples=(4, 9)) for _ in range(2))
    assert torch.equal(one.views["masked"].image, again.views["masked"].image)
    mixer, other = Masked(**options), Masked(seed=1, **options)
    assert torch.equal(
        mixer.hidden(torch.tensor([9]), SIZE)[0], mixer.hidden(torch.tensor([4, 9]), SIZE)[1]
    )
    assert not torch.equal(*(each.hidden(torch.tensor([9]), SIZE) for each in (mixer, other)))
    # The colours are not those of the other mixer: nothing is pasted, so mixed is changed alone.
    step = a_step(None, {}, {}, source=batch()[0], target=batch()[1])
    step.source.label.fill_(255)
    strong = {"mixer": CLASS_MIX | {"color_p": 1.0, "blur_p": 1.0}, "ratio": 0.0}
    Masked(**(options | strong))(step)
    assert not torch.allclose(step.views["masked"].image, step.views["mixed"].image, atol=1e-2)


def test_without_labels_of_the_target_it_says_that_a_labeler_is_needed():
    source, target = batch()
    step = a_step(labels=source.label, source=source, target=target)
    mixer = Masked(mixer={"name": "mixers.Source"})
    mixer(step)
    with pytest.raises(
        UserError, match=r"masked\.Masked needs labels of the target.*uda\.labelers"
    ):
        mixer.after(step)
