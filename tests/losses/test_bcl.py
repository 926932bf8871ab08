"""BCL: static labels by share and rank, label transfer with its bias, contrast against the released form."""

import itertools
import json
import math

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from engine.build import build
from engine.errors import UserError
from engine.statistics import resize_labels
from losses.bcl import Contrast, LabelTransfer, StaticLabels, log_odds
from models.classifiers.linear import Linear
from models.prototypes.basis import OrthogonalBasis
from models.prototypes.centroids import Centroids
from models.prototypes.mixtures import Mixtures
from models.prototypes.pair import Pair
from tests.records import a_batch, a_step, an_output
from tests.runs import on_two_processes

IGNORE = 255
K, D = 5, 8
FORWARD, BACKWARD = {"backward_weight": 0.0}, {"forward_weight": 0.0}
LAYOUTS = pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])


def a_pair(source, target, truth, pseudo=None, prototypes=None, number=0, total=100, **fields):
    """A step on features of both views and their labels; the target may have none."""
    outputs = {"source": an_output(features=source), "target": an_output(features=target)}
    labels = {"source": truth} | ({} if pseudo is None else {"target": pseudo})
    return a_step(outputs, labels, None, prototypes, number, total, **fields)


def maps(batch=2, size=(6, 5), dim=D, dtype=torch.float64, grad=False):
    return torch.randn(batch, dim, *size, dtype=dtype).requires_grad_(grad)


def blocks(classes, batch=2, size=(6, 5), factor=4):
    """Random labels (B, H, W) in squares of `factor` pixels."""
    ids = torch.tensor(classes)[torch.randint(len(classes), (batch, *size))]
    return ids.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def of_classes(labels, vectors):
    """Features (B, D, h, w): the vector (K, D) of each cell's class."""
    return vectors[labels].permute(0, 3, 1, 2).contiguous()


# --- static labels ---------------------------------------------------------------------------------------------------


class Target:
    """What StaticLabels needs of engine.prepare.Preparation, and of a network: image number i has the i-th logits."""

    def __init__(self, logits, size, mine=None):
        self.logits, self.size, self.target, self.stored = logits, size, object(), {}
        self.mine = range(len(logits)) if mine is None else mine

    def images(self, dataset):
        assert dataset is self.target
        for i in self.mine:
            yield i, torch.full((1, 3, *self.size), i), torch.full((1, *self.size), IGNORE)

    def segment(self, image, domain="target"):
        return an_output(self.logits[image[:, 0, 0, 0].long()])

    def store(self, name, dataset, make, settings, palette=False):
        assert name == "pseudo_labels" and dataset is self.target and palette
        self.settings = settings
        self.stored = {i: make(i, image, label) for i, image, label in self.images(dataset)}


def labelled(logits, size=None, **options):
    """(labeler, labels (N, H, W)) of a target set with these logits."""
    target = Target(logits, size or logits.shape[-2:])
    labeler = StaticLabels(num_classes=logits.shape[1], **options)
    labeler.prepare(target)
    return labeler, torch.stack([*target.stored.values()]), target


def random_logits(images=6, classes=K, size=(24, 30)):
    """Some images are surer than others, and some classes rarer."""
    logits = torch.randn(images, classes, *size) - torch.arange(classes)[:, None, None] / 4
    return logits * torch.linspace(0.5, 4, images)[:, None, None, None]


def test_log_odds_are_those_of_the_most_probable_class():
    logits = maps(3, dim=K)
    p, classes = logits.softmax(1).max(1)
    sure, found = log_odds(logits, (6, 5))
    assert torch.equal(found, classes)
    torch.testing.assert_close(sure, (p / (1 - p)).log())


def test_static_labels_are_the_arg_max_of_between_one_and_two_shares_of_the_pixels():
    logits = random_logits()
    _, labels, _ = labelled(logits)
    chosen = labels != IGNORE
    assert torch.equal(labels[chosen], logits.argmax(1)[chosen])
    assert 0.11 < chosen.float().mean() < 0.2
    assert (chosen.flatten(1).float().mean(1) >= 0.1).all()  # the local rule
    ids = logits.argmax(1)
    for c in range(K):  # the global rule
        assert chosen[ids == c].float().mean() >= 0.1


def test_thresholds_are_what_the_share_of_each_class_reaches():
    logits = random_logits()
    labeler, *_ = labelled(logits, share=0.2)
    sure, classes = log_odds(logits, logits.shape[-2:])
    for c in range(K):
        values = sure[classes == c].sort(descending=True).values
        exact = values[math.ceil(0.2 * len(values)) - 1]
        assert exact - 1 / 512 < labeler.theta[c] <= exact


@pytest.mark.parametrize("share, local", [(0.1, 72), (0.3, 216)])
def test_static_labels_are_the_union_of_both_rules(share, local):
    logits = random_logits()
    labeler, labels, _ = labelled(logits, share=share)
    sure, classes = log_odds(logits, logits.shape[-2:])
    least = sure.flatten(1).topk(local, 1).values[:, -1, None, None]  # of 720 pixels
    assert torch.equal(labels != IGNORE, (sure >= labeler.theta[classes]) | (sure >= least))


def test_logits_are_resized_before_pixels_are_ranked():
    small = random_logits(size=(6, 8))
    large = F.interpolate(small, size=(24, 32), mode="bilinear", align_corners=False)
    a, b = labelled(small, size=(24, 32)), labelled(large)
    assert torch.equal(a[1], b[1]) and torch.equal(a[0].theta, b[0].theta)


def test_saturated_probabilities_still_get_local_labels_by_rank():
    logits = random_logits(2) * 40
    logits[:, 0] += 60
    assert (
        logits.softmax(1).max(1).values == 1
    ).float().mean() > 0.2  # a quantile of 1 is never exceeded
    labeler = StaticLabels(num_classes=K)  # without thresholds the local rule is alone
    labels = labeler.label(
        Target(logits, (24, 30)), torch.tensor([0, 1]).view(2, 1, 1, 1).expand(2, 3, 24, 30), {}
    )
    assert ((labels != IGNORE).flatten(1).sum(1) == 72).all()
    sure = log_odds(logits, (24, 30))[0]
    for chosen, values in zip(labels != IGNORE, sure):
        assert values[chosen].min() > values[~chosen].max()


@pytest.mark.parametrize("share", [1e-6, 0.1, 0.33, 0.9, 1.0])
def test_of_equal_pixels_those_are_chosen_that_a_stable_sort_puts_first(share):
    sure, labeler = (
        torch.randint(-2, 3, (3, 7, 9)).float(),
        StaticLabels(num_classes=K, share=share),
    )
    sure[0] = 2
    chosen = labeler.select(sure, torch.zeros(3, 7, 9, dtype=torch.int64)) == 0
    for values, mask in zip(sure.flatten(1), chosen.flatten(1)):
        first = values.argsort(descending=True, stable=True)[: max(1, round(share * 63))]
        assert mask.nonzero().flatten().tolist() == first.sort().values.tolist()


def test_ties_are_not_left_out():
    logits = torch.zeros(2, K, 10, 10)
    logits[:, 1] = 500  # beyond the last bin
    _, labels, _ = labelled(logits)
    assert (labels == 1).all()
    logits[:, 1] = 0.1  # within a bin
    _, labels, _ = labelled(logits)
    assert (labels == 1).all()
    _, labels, _ = labelled(
        torch.tensor([0.0, 0.5]).view(1, 2, 1, 1).expand(2, 2, 10, 10)
    )  # on the edge of a bin
    assert (labels == 1).all()


def test_a_larger_share_only_adds_static_labels():
    logits = random_logits()
    logits[0] = logits[0, :, :1, :1]  # an image of ties
    chosen = [labelled(logits, share=share)[1] != IGNORE for share in (0.01, 0.1, 0.3, 1.0)]
    for less, more in itertools.pairwise(chosen):
        assert (more | ~less).all() and more.sum() > less.sum()
    assert chosen[-1].all()


def test_classes_never_predicted_have_no_threshold_to_reach():
    logits = random_logits()
    logits[:, 3] = -100
    labeler, labels, target = labelled(logits)
    assert labeler.theta.isinf().tolist() == [False, False, False, True, False]
    assert not (labels == 3).any()
    assert json.loads(json.dumps(target.settings, allow_nan=False))["log_odds"][3] is None
    sure = torch.tensor([[[9.0, 8.0] + [0.0] * 18]])  # two of twenty are the local share
    assert (labeler.select(sure, torch.full((1, 1, 20), 3)) == 3).sum() == 2


def test_label_gives_the_stored_labels_and_before_reads_them():
    logits = random_logits(3)
    labeler, labels, target = labelled(logits)
    again = StaticLabels(num_classes=K)
    again.load_state_dict(labeler.state_dict())
    images = torch.arange(3.0).view(3, 1, 1, 1).expand(3, 3, 24, 30)
    assert torch.equal(again.label(target, images, {}), labels)
    step = a_step(target=a_batch(images, pseudo_labels=labels.to(torch.uint8)))
    labeler.before(step)
    assert step.labels["target"].dtype == torch.int64 and not step.weights
    assert [*step.labels] == ["target"] and torch.equal(step.labels["target"], labels)


def test_static_labels_of_bf16_logits_are_ranked_in_float32():
    logits = random_logits().bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        _, labels, _ = labelled(logits)
    assert torch.equal(labels, labelled(logits.float())[1])


@pytest.mark.parametrize("share", [0.0, -0.1, 1.5])
def test_a_share_that_is_none_is_an_error(share):
    with pytest.raises(ValueError, match=f"'share' must be a float in .*, not {share}"):
        build("losses", {"name": "bcl.StaticLabels", "share": share}, num_classes=K)


# --- label transfer --------------------------------------------------------------------------------------------------


def transfer(num_classes=K, in_channels=D, **options):
    return LabelTransfer(num_classes=num_classes, in_channels=in_channels, **options).double()


def after(labeler, source, target, truth, static, number=0):
    step = a_pair(source, target, truth, static, number=number)
    labeler.after(step)
    assert not step.weights and {*step.labels} == {"source", "target"}
    assert step.labels["source"] is truth
    return step.labels["target"]


def step_of(labeler, *arguments, number=0):
    labels = after(labeler, *arguments, number=number)
    labeler.update(a_step(number=number, total=100))
    return labels


def unlabelled(labels):
    return torch.full_like(labels, IGNORE)


@pytest.mark.parametrize("lead, confidence", [(0.3, 0.527), (0.4277, 0.8), (0.5, 0.892)])
def test_confidence_of_a_cosine_lead_among_19_classes(lead, confidence):
    vectors = torch.eye(19, 20, dtype=torch.float64)
    truth = torch.arange(19).view(1, 1, 19)
    pixel = lead * vectors[7] + math.sqrt(1 - lead**2) * torch.eye(20, dtype=torch.float64)[19]
    target = pixel.view(1, 20, 1, 1).expand(1, 20, 1, 19)
    for threshold, expected in ((confidence - 6e-4, 7), (confidence + 6e-4, IGNORE)):
        labeler = transfer(19, 20, confidence=threshold)
        assert (
            after(labeler, of_classes(truth, vectors), target, truth, unlabelled(truth)) == expected
        ).all()


def naive_transfer(source, target, truth, bias, confidence, tau):
    """y_D (B, h, w), pair by pair and pixel by pixel."""
    result = torch.full((len(source), *target.shape[2:]), IGNORE)
    for b in range(len(source)):
        unit = {}
        for c in sorted({*truth[b].flatten().tolist()} - {IGNORE}):
            pixels = source[b].permute(1, 2, 0)[truth[b] == c]
            mean = F.normalize(F.normalize(pixels, dim=1).mean(0), dim=0)
            unit[c] = F.normalize(mean + bias[c], dim=0)
        for y in range(target.shape[2]):
            for x in range(target.shape[3]):
                pixel = F.normalize(target[b, :, y, x], dim=0)
                scores = [
                    math.exp((unit[c] @ pixel if c in unit else -1) / tau) for c in range(len(bias))
                ]
                best = max(unit, key=lambda c: scores[c])
                if scores[best] / sum(scores) > confidence:
                    result[b, y, x] = best
    return result


def test_dynamic_labels_equal_a_loop_over_pixels():
    labeler = transfer(confidence=0.5, temperature=0.2)
    labeler.bias.copy_(torch.randn(K, D) / 3)
    source, target, truth = maps(3), maps(3), blocks([0, 1, 3, IGNORE], 3, factor=1)
    expected = naive_transfer(source, target, truth, labeler.bias, 0.5, 0.2)
    assert 0.1 < (expected == IGNORE).float().mean() < 0.9 and len(expected.unique()) == 4
    assert torch.equal(after(labeler, source, target, truth, unlabelled(truth)), expected)


def test_dynamic_labels_fill_only_unlabelled_pixels_in_whole_cells():
    source, target, truth, static = maps(), maps(), blocks(range(K)), blocks([0, 2, IGNORE])
    static[:, 0, 0] = 1  # of the other pixels of this cell, those without a label are filled
    labels = after(transfer(confidence=0.4), source, target, truth, static)
    assert torch.equal(labels[static != IGNORE], static[static != IGNORE])
    assert (labels[static == IGNORE] != IGNORE).any()
    filled = after(transfer(confidence=0.4), source, target, truth, unlabelled(static))
    assert torch.equal(filled, filled[:, ::4, ::4].repeat_interleave(4, 1).repeat_interleave(4, 2))
    assert torch.equal(labels, torch.where(static == IGNORE, filled, static))


def test_a_lower_threshold_only_fills_more():
    source, target, truth, static = maps(), maps(), blocks(range(K)), blocks([0, IGNORE, IGNORE])
    results = [
        after(transfer(confidence=c), source, target, truth, static) for c in (0.95, 0.8, 0.5, 0.0)
    ]
    for less, more in itertools.pairwise(results):
        assert torch.equal(less[less != IGNORE], more[less != IGNORE])
        assert (more != IGNORE).sum() > (less != IGNORE).sum()
    assert (results[-1] != IGNORE).all()


def test_only_classes_of_the_paired_source_image_are_transferred():
    source, target = maps(), maps()
    truth = torch.cat([blocks([0, 2], 1), blocks([4], 1)])
    labels = after(transfer(confidence=0.0), source, target, truth, unlabelled(truth))
    assert {*labels[0].unique().tolist()} == {0, 2} and (labels[1] == 4).all()
    truth[1] = IGNORE
    assert (
        after(transfer(confidence=0.0), source, target, truth, unlabelled(truth))[1] == IGNORE
    ).all()


def shifted(angle):
    """Two source classes along the axes and the target's, turned by an angle in degrees -> features, labels."""
    labels = torch.tensor([[[0, 0, 1, 1]]])
    turn = torch.deg2rad(torch.tensor([0.0, 90.0]) + angle)
    turned = torch.stack([turn.cos(), turn.sin()], 1).double()
    return of_classes(labels, torch.eye(2).double()), of_classes(labels, turned), labels, turned


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_the_bias_follows_a_constant_offset_as_an_average_from_zero(steps):
    source, target, labels, turned = shifted(30.0)
    labeler = LabelTransfer(num_classes=3, in_channels=2, momentum=0.9).double()
    for step in range(steps):
        step_of(labeler, source, target, labels, labels, number=step)
    expected = (turned - torch.eye(2).double()) * (1 - 0.9**steps)
    torch.testing.assert_close(labeler.bias[:2], expected)
    assert not labeler.bias[2].any() and labeler.updates.tolist() == [steps, steps, 0]


def test_the_bias_moves_by_the_mean_of_the_pairs_whose_images_both_have_the_class():
    source, target = maps(3), maps(3)
    truth, static = blocks([0, 1, 3], 3), blocks([0, 2, 3, IGNORE], 3)
    truth[0], static[1][static[1] == 3] = 0, IGNORE
    labeler = transfer(momentum=0.75)
    step_of(labeler, source, target, truth, static)
    expected = torch.zeros_like(labeler.bias)
    for c in range(K):
        moves = []
        for b in range(3):
            pixels = [
                (source[b], resize_labels(truth, (6, 5))[b]),
                (target[b], resize_labels(static, (6, 5))[b]),
            ]
            vectors = [
                F.normalize(f, dim=0)[:, y == c].mean(1) for f, y in pixels if (y == c).any()
            ]
            if len(vectors) == 2:
                moves.append(F.normalize(vectors[1], dim=0) - F.normalize(vectors[0], dim=0))
        expected[c] = 0.25 * torch.stack(moves).mean(0) if moves else 0
        assert len(moves) == [3, 0, 0, 1, 0][c]  # 1 occurs in the source only, 2 in the target
    torch.testing.assert_close(labeler.bias, expected)
    assert labeler.updates.tolist() == [1, 0, 0, 1, 0]


def test_calibration_turns_wrong_labels_into_right_ones():
    source, target, labels, _ = shifted(60.0)
    labeler = transfer(2, 2, momentum=0.9)
    static = labels.clone()
    static[..., 1::2] = IGNORE  # the second pixel of each class has to be transferred
    first = step_of(labeler, source, target, labels, static)
    off = after(transfer(2, 2, calibration="off"), source, target, labels, static)
    assert torch.equal(first, off)  # the bias starts at zero
    assert first.flatten().tolist() == [0, 1, 1, 1]
    for step in range(1, 30):
        last = step_of(labeler, source, target, labels, static, number=step)
    assert torch.equal(last, labels)


def test_the_ramp_lets_the_bias_in_step_by_step():
    source, target, labels, _ = shifted(60.0)
    labeler = transfer(2, 2, ramp=0.5, confidence=0.0, calibration="off")
    labeler.bias.copy_(target[0, :, 0, [0, 2]].T - torch.eye(2))
    for number, share in ((0, 0.0), (10, 0.2), (25, 0.5), (50, 1.0), (99, 1.0)):
        expected = transfer(2, 2, confidence=0.0, calibration="off")
        expected.bias.copy_(labeler.bias * share)
        fine = torch.deg2rad(torch.linspace(0, 180, 200)).view(1, 1, 1, -1).double()
        fine = torch.cat([fine.cos(), fine.sin()], 1)
        arguments = (source, fine, labels, torch.full((1, 1, 200), IGNORE))
        filled = after(labeler, *arguments, number=number)
        assert torch.equal(filled, after(expected, *arguments)), number
    assert after(labeler, *arguments, number=50).ne(after(labeler, *arguments, number=0)).any()


def test_dynamic_labels_do_not_move_the_bias():
    source, target, truth, static = maps(), maps(), blocks(range(K)), blocks([0, 1, IGNORE, IGNORE])
    biases = []
    for options in ({"dynamic": "off"}, {"confidence": 0.0}):
        labeler = transfer(**options)
        step_of(labeler, source, target, truth, static)
        biases.append(labeler.bias)
    assert torch.equal(*biases) and biases[0][:2].any(1).all() and not biases[0][2:].any()


def test_the_bias_does_not_depend_on_the_length_of_features():
    truth, static = blocks(range(K)), blocks(range(K))
    source, target = maps(), maps()
    biases = []
    for scale in (lambda: 1.0, lambda: torch.rand(2, 1, 6, 5) + 0.1):
        labeler = transfer()
        step_of(labeler, source * scale(), target * scale(), truth, static)
        biases.append(labeler.bias)
    torch.testing.assert_close(*biases)


def test_two_micro_batches_equal_one():
    batch = maps(4), maps(4), blocks(range(K), 4), blocks([0, 1, IGNORE], 4)
    batch[2][0][batch[2][0] == 1] = IGNORE  # so that classes differ in their number of pairs
    one, two = transfer(), transfer()
    for step in range(2):
        step_of(one, *batch, number=step)
        for part in (slice(0, 1), slice(1, 4)):
            before = two.bias.clone()
            after(two, *(x[part] for x in batch), number=step)
            assert torch.equal(
                two.bias, before
            )  # the state of the last step until the step is done
        two.update(a_step(number=step))
    torch.testing.assert_close(two.bias, one.bias, rtol=0, atol=1e-15)
    assert one.bias[:2].any(1).all() and torch.equal(one.updates, two.updates)


@pytest.mark.parametrize("factor", [1.0, math.nan, math.inf])
def test_a_skipped_step_leaves_no_trace(factor):
    first, second = ((maps(), maps(), blocks(range(K)), blocks(range(K))) for _ in range(2))
    labeler, expected = transfer(), transfer()
    for part in (labeler, expected):
        step_of(part, *second)
    before = labeler.bias.clone()
    after(labeler, first[0] * factor, *first[1:], number=1)
    assert bool(labeler.moves.isfinite().all()) == (factor == 1) and labeler.moves.any()
    labeler.update(a_step(number=1, skipped=torch.tensor(True)))
    assert torch.equal(labeler.bias, before) and labeler.updates.tolist() == [1] * K
    for part in (labeler, expected):
        step_of(part, *second, number=2)
    assert torch.equal(labeler.bias, expected.bias) and not torch.equal(labeler.bias, before)
    labeler.update(a_step(number=3))  # nothing is left to apply
    assert torch.equal(labeler.bias, expected.bias)
    assert torch.equal(labeler.updates, expected.updates)


def test_switched_off_it_is_the_released_behaviour():
    labeler = transfer(dynamic="off", calibration="off")
    static = blocks([0, 1, IGNORE])
    assert torch.equal(step_of(labeler, maps(), maps(), blocks(range(K)), static), static)
    assert not labeler.bias.any() and not labeler.updates.any()
    labeler = transfer(calibration="off", confidence=0.0)
    assert not torch.equal(step_of(labeler, maps(), maps(), blocks(range(K)), static), static)
    assert not labeler.bias.any()


def test_without_static_labels_it_labels_from_scratch():
    source, target, truth = maps(), maps(), blocks(range(K))
    labeler = transfer(confidence=0.5)
    step = a_pair(source, target, truth)
    labeler.after(step)
    labels = step.labels["target"]
    assert torch.equal(labels, after(labeler, source, target, truth, unlabelled(truth)))
    labeler.update(step)
    assert (labels != IGNORE).any() and not labeler.bias.any()


def test_neither_labels_nor_the_bias_have_a_gradient():
    labeler = transfer(confidence=0.3)
    source, target = maps(grad=True), maps(grad=True)
    labels = step_of(labeler, source, target, blocks(range(K)), blocks([0, 1, IGNORE]))
    assert not labels.requires_grad and not any(b.requires_grad for b in labeler.buffers())
    assert not list(labeler.parameters()) and labeler.bias.any()


def test_the_state_comes_back_and_holds_no_sums_of_a_step():
    labeler, other = transfer(), transfer()
    batch = maps(), maps(), blocks(range(K)), blocks(range(K))
    step_of(labeler, *batch)
    after(labeler, *batch, number=1)
    other.load_state_dict(labeler.state_dict())
    assert {*labeler.state_dict()} == {"bias", "updates"}
    # A checkpoint lies between two steps.
    labeler.update(a_step(number=1, skipped=torch.tensor(True)))
    assert torch.equal(step_of(other, *batch, number=1), step_of(labeler, *batch, number=2))
    assert torch.equal(other.bias, labeler.bias)


@pytest.mark.parametrize("options", [{"momentum": 1.0}, {"momentum": -0.1}, {"ramp": 1.5}])
def test_impossible_momentum_and_ramp_are_errors(options):
    with pytest.raises(ValueError, match=f"must be a float in .*, not {str(*options.values())}"):
        build("losses", {"name": "bcl.LabelTransfer", **options}, num_classes=K, in_channels=D)


# --- contrast --------------------------------------------------------------------------------------------------------


def contrast(f_s, f_t, y_s, y_t, prototypes=None, num_classes=K, **options):
    return Contrast(num_classes=num_classes, **options)(a_pair(f_s, f_t, y_s, y_t, prototypes))


def naive_direction(means, known, features, labels, both, tau):
    """One direction for one image, as released: z is upsampled, then weighted cross-entropy."""
    z = torch.stack(
        [
            F.cosine_similarity(features, means[c][:, None, None], dim=0)
            if known[c]
            else -torch.ones_like(features[0])
            for c in range(len(means))
        ]
    )
    z = F.interpolate(z[None] / tau, size=labels.shape, mode="nearest-exact")
    if not both.any():
        return 0 * z.sum()
    return F.cross_entropy(z, labels[None], weight=both.to(z.dtype), ignore_index=IGNORE)


def naive_contrast(source, target, truth, pseudo, tau=0.1, detach=False):
    """(L_FCL, L_BCL), means of pairs; class means by boolean masks."""
    losses = []
    for f_s, f_t, y_s, y_t in zip(source, target, truth, pseudo):
        means, known = [], []
        for f, y in ((f_s, y_s), (f_t, y_t)):
            y = resize_labels(y[None], f.shape[-2:])[0]
            found = torch.tensor([(y == c).any() for c in range(K)])
            rho = [
                f[:, y == c].mean(1) if found[c] else torch.zeros_like(f[:, 0, 0]) for c in range(K)
            ]
            means.append([r.detach() for r in rho] if detach else rho)
            known.append(found)
        both = known[0] & known[1]
        losses.append(
            [
                naive_direction(means[0], known[0], f_t, y_t, both, tau),
                naive_direction(means[1], known[1], f_s, y_s, both, tau),
            ]
        )
    return torch.stack([torch.stack(pair) for pair in losses]).mean(0)


@LAYOUTS
@pytest.mark.parametrize("detach", [False, True])
@pytest.mark.parametrize("label_size", [(24, 20), (6, 5), (17, 23)])
def test_contrast_and_its_gradient_equal_the_released_form(label_size, detach, layout):
    source, target = (maps(3).contiguous(memory_format=layout).requires_grad_() for _ in range(2))
    truth, pseudo = (
        torch.tensor([*ids, IGNORE])[torch.randint(4, (3, *label_size))]
        for ids in ([0, 1, 2], [1, 2, 4])
    )
    pseudo[2] = 4  # a pair without a common class
    options = {
        "forward_weight": 2.0,
        "backward_weight": 0.7,
        "temperature": 0.2,
        "detach_prototypes": detach,
    }
    value = contrast(source, target, truth, pseudo, **options)
    forward, backward = naive_contrast(source, target, truth, pseudo, 0.2, detach)
    torch.testing.assert_close(value, 2 * forward + 0.7 * backward, rtol=1e-12, atol=0)
    actual, expected = (
        torch.autograd.grad(loss, [source, target])
        for loss in (value, 2 * forward + 0.7 * backward)
    )
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    assert all(g.is_contiguous(memory_format=layout) for g in actual)


def test_contrast_of_orthogonal_classes_is_its_lower_limit():
    labels = torch.arange(19).view(1, 1, 19)
    features = 3 * of_classes(labels, torch.eye(19, 32, dtype=torch.float64))
    value = contrast(features, features, labels, labels, num_classes=19, **FORWARD)
    assert value.item() == pytest.approx(math.log1p(18 * math.exp(-10)), rel=1e-9)
    assert value.item() == pytest.approx(8.17e-4, rel=1e-3)


def test_contrast_where_other_classes_are_absent_is_smaller_still():
    labels = torch.full((1, 2, 3), 4)
    features = of_classes(labels, torch.eye(19, 32, dtype=torch.float64))
    value = contrast(features, features, labels, labels, num_classes=19, **FORWARD)
    assert value.item() == pytest.approx(math.log1p(18 * math.exp(-20)), rel=1e-6)
    assert value.item() == pytest.approx(3.7e-8, rel=1e-2)
    labels = torch.tensor([[[0, 1]]])  # opposite instead of absent
    features = of_classes(labels, torch.tensor([[1.0], [-1.0]]).double())
    value = contrast(features, features, labels, labels, num_classes=2, **FORWARD)
    assert value.item() == pytest.approx(math.log1p(math.exp(-20)), rel=1e-6)


def test_contrast_has_an_upper_limit():
    member = Centroids(num_classes=19, in_channels=4).double()
    member.vectors.copy_(torch.ones(19, 4))
    member.vectors[3] *= -1
    member.seen[:] = True
    labels, features = torch.full((1, 2, 3), 3), torch.ones(1, 4, 2, 3, dtype=torch.float64)
    value = contrast(
        features, features, labels, labels, {"bank": member}, 19, source="bank", **FORWARD
    )
    assert value.item() == pytest.approx(math.log(1 + 18 * math.exp(20)))
    assert value < 20 + math.log(19)


def test_swapping_the_domains_swaps_both_losses():
    source, target, truth, pseudo = maps(), maps(), blocks([0, 1, 2]), blocks([1, 2, 4, IGNORE])
    forward, backward = (
        contrast(source, target, truth, pseudo, **only) for only in (FORWARD, BACKWARD)
    )
    torch.testing.assert_close(
        contrast(target, source, pseudo, truth, **FORWARD), backward, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        contrast(target, source, pseudo, truth, **BACKWARD), forward, rtol=1e-12, atol=0
    )
    torch.testing.assert_close(
        contrast(source, target, truth, pseudo), forward + backward, rtol=1e-12, atol=0
    )
    assert not torch.isclose(forward, backward)


def test_the_length_of_pixels_and_of_prototypes_changes_nothing():
    source, target, truth, pseudo = maps(), maps(), blocks(range(K)), blocks(range(K))
    value = contrast(source, target, truth, pseudo, **FORWARD)
    lengths = torch.rand(2, 1, 6, 5, dtype=torch.float64) * 9 + 0.1
    torch.testing.assert_close(
        contrast(7 * source, target * lengths, truth, pseudo, **FORWARD), value
    )
    # A mean is another one if its pixels change their length.
    assert not torch.isclose(
        contrast(source * lengths, target, truth, pseudo, **FORWARD), value, rtol=1e-4
    )


def test_ignored_pixels_and_classes_of_one_image_only_do_not_count():
    source, target = maps(), maps(grad=True)
    truth, pseudo = blocks([0, 1, 2]), blocks([1, 2, 4, IGNORE])
    value = contrast(source, target, truth, pseudo, **FORWARD)
    (gradient,) = torch.autograd.grad(value, target)
    cells = resize_labels(pseudo, (6, 5))
    left_out = (cells == 4) | (cells == IGNORE)
    assert (gradient.abs().sum(1)[left_out] == 0).all() and (
        gradient.abs().sum(1)[~left_out] > 0
    ).all()
    other = torch.where(left_out[:, None], torch.randn_like(target), target)
    assert contrast(source, other, truth, pseudo, **FORWARD) == value


def test_every_pair_counts_alike():
    source, target, truth, pseudo = maps(3), maps(3), blocks(range(K), 3), blocks(range(K), 3)
    pseudo[1, 4:] = IGNORE  # few pixels
    pairs = [contrast(*(x[b : b + 1] for x in (source, target, truth, pseudo))) for b in range(3)]
    torch.testing.assert_close(contrast(source, target, truth, pseudo), sum(pairs) / 3)
    pseudo[0] = IGNORE  # this pair now has 0
    torch.testing.assert_close(contrast(source, target, truth, pseudo), (pairs[1] + pairs[2]) / 3)


@pytest.mark.parametrize(
    "truth, pseudo", [([IGNORE], [0, 1]), ([0, 1], [IGNORE]), ([0, 1], [2, 3]), ([4], [3])]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_contrast_without_a_common_class_is_exactly_zero_with_a_graph(truth, pseudo, dtype):
    source, target = maps(dtype=dtype, grad=True), maps(dtype=dtype, grad=True)
    value = contrast(source, target, blocks(truth), blocks(pseudo))
    value.backward()
    assert value == 0 and not source.grad.any() and not target.grad.any()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "truth, pseudo", [([0], [0]), ([0, 1], [0, 1, 2]), ([0, 1, IGNORE], [1]), ([2], [2, 3, IGNORE])]
)
def test_contrast_of_poor_batches_is_finite(truth, pseudo, dtype, batch):
    source, target = (maps(batch, dtype=dtype, grad=True) for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        value = contrast(source, target, blocks(truth, batch), blocks(pseudo, batch))
    value.backward()
    assert value.dtype == torch.float32 and value > 0 and value.isfinite()
    assert source.grad.isfinite().all() and target.grad.isfinite().all() and target.grad.any()


def test_contrast_of_features_of_zero_has_finite_gradients():
    features = torch.zeros(2, D, 6, 5, requires_grad=True)
    value = contrast(features, features, blocks(range(K)), blocks(range(K)))
    value.backward()
    assert value.isfinite() and features.grad.isfinite().all()


def test_bf16_features_are_contrasted_and_transferred_in_float32():
    source, target = (maps(size=(30, 30), dtype=torch.bfloat16) for _ in range(2))
    truth, static = blocks(range(K), size=(30, 30)), blocks([0, 1, IGNORE], size=(30, 30))
    labelers = [LabelTransfer(num_classes=K, in_channels=D, confidence=0.5) for _ in range(2)]
    with torch.autocast("cpu", torch.bfloat16):
        value = contrast(source, target, truth, static)
        labels = step_of(labelers[0], source, target, truth, static)
    assert value == contrast(source.float(), target.float(), truth, static)
    assert torch.equal(labels, step_of(labelers[1], source.float(), target.float(), truth, static))
    assert (
        torch.equal(labelers[0].bias, labelers[1].bias) and labelers[0].bias.dtype == torch.float32
    )


@pytest.mark.parametrize("only, pixels", [(FORWARD, "target"), (BACKWARD, "source")])
def test_gradients_through_the_prototypes_can_be_cut(only, pixels):
    leaves = {"source": maps(grad=True), "target": maps(grad=True)}
    labels = blocks(range(K)), blocks(range(K))
    for detach in (False, True):
        value = contrast(*leaves.values(), *labels, detach_prototypes=detach, **only)
        for name, gradient in zip(
            leaves, torch.autograd.grad(value, [*leaves.values()], allow_unused=True)
        ):
            reached = gradient is not None and bool(gradient.any())
            assert reached == (name == pixels or not detach), (name, detach)


def test_a_configured_pair_is_the_default():
    batch = maps(), maps(), blocks([0, 1, 2]), blocks([1, 2, 4])
    members = {
        "pair": Pair(num_classes=K, in_channels=D),
        "other": Pair(num_classes=K, in_channels=D),
    }
    for options in ({}, {"source": "other", "target": "other"}):
        torch.testing.assert_close(
            contrast(*batch, members, **options), contrast(*batch), rtol=1e-12, atol=0
        )


def test_a_member_with_the_means_of_a_pair_gives_the_loss_of_the_pair():
    source, target, truth, pseudo = maps(1), maps(1), blocks([0, 1, 2], 1), blocks([1, 2, 4], 1)
    member = Centroids(num_classes=K, in_channels=D).double()
    member.update([(source, resize_labels(truth, (6, 5)), None)], a_step())
    actual = contrast(source, target, truth, pseudo, {"bank": member}, source="bank")
    torch.testing.assert_close(actual, contrast(source, target, truth, pseudo))


MEMBERS = {
    "centroids": Centroids(num_classes=K, in_channels=D),
    "mixtures": Mixtures(num_classes=K, in_channels=D, components=2),
    "basis": OrthogonalBasis(num_classes=K, in_channels=D),
    "classifier": Linear(num_classes=K, in_channels=D),
}


@pytest.mark.parametrize("role", ["source", "target"])
@pytest.mark.parametrize("name", MEMBERS)
def test_other_prototypes_give_finite_losses_with_gradients(name, role):
    source, target = (maps(dtype=torch.float32, grad=True) for _ in range(2))
    truth, pseudo = blocks([0, 1, 2]), blocks([1, 2, 4])
    if name in ("centroids", "mixtures"):
        empty = contrast(
            source,
            target,
            truth,
            pseudo,
            {name: type(MEMBERS[name])(num_classes=K, in_channels=D)},
            **{role: name},
        )
        assert empty == 0  # it has seen no class yet
        shown = source.detach(), resize_labels(truth, (6, 5)), None
        MEMBERS[name].update([shown], a_step())
    value = contrast(source, target, truth, pseudo, MEMBERS, **{role: name})
    gradients = torch.autograd.grad(value, [source, target])
    assert value > 0 and value.isfinite() and all(g.isfinite().all() and g.any() for g in gradients)


def test_unknown_prototypes_are_an_error_that_lists_the_known_ones():
    batch = maps(), maps(), blocks(range(K)), blocks(range(K))
    with pytest.raises(
        UserError,
        match="Contrast needs the prototypes 'centroid'; there are centroids, mixtures, basis, cl",
    ):
        contrast(*batch, MEMBERS, source="centroid")


def test_contrast_draws_target_pixels_to_the_means_of_their_class():
    truth = blocks(range(K))
    source = of_classes(resize_labels(truth, (6, 5)), torch.randn(K, D))
    target = torch.randn(2, D, 6, 5, requires_grad=True)
    optimizer = torch.optim.Adam([target], lr=0.1)
    for _ in range(60):
        optimizer.zero_grad()
        contrast(source, target, truth, truth, **FORWARD).backward()
        optimizer.step()
    labels = after(
        LabelTransfer(num_classes=K, in_channels=D, confidence=0.0),
        source,
        target,
        truth,
        unlabelled(truth),
    )
    assert torch.equal(labels, truth)


# --- processes -------------------------------------------------------------------------------------------------------


def state_after_training(rank=0, world=1):
    """theta, bias and updates of a process that has every `world`-th image; class 2 has static labels in one alone."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(5, K, 24, 30, generator=generator) * 3
    static = StaticLabels(num_classes=K)
    target = Target(logits, (24, 30), range(rank, 5, world))
    static.prepare(target)
    labeler, mine = transfer(), slice(rank, None, world)
    for step in range(3):
        source, features = (
            torch.randn(4, D, 6, 5, dtype=torch.float64, generator=generator) for _ in range(2)
        )
        truth, labels = (torch.randint(K, (4, 24, 20), generator=generator) for _ in range(2))
        labels[1::2][labels[1::2] == 2] = IGNORE
        step_of(labeler, source[mine], features[mine], truth[mine], labels[mine], number=step)
    return {"theta": static.theta, "stored": target.stored, **labeler.state_dict()}


def one_of_two(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    torch.save(state_after_training(rank, 2), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    on_two_processes(one_of_two, tmp_path)
    expected = state_after_training()
    states = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    stored = states[0].pop("stored") | states[1].pop("stored")
    assert all(torch.equal(stored[i], labels) for i, labels in expected.pop("stored").items())
    for key, value in expected.items():
        assert torch.equal(states[0][key], states[1][key]), key
        torch.testing.assert_close(states[0][key], value, rtol=0, atol=1e-14)
    assert expected["updates"].tolist() == [3] * K and expected["theta"].isfinite().all()


@pytest.mark.parametrize("members", [{}, {"pair": Pair(num_classes=K, in_channels=D)}])
def test_contrast_takes_the_weights_of_pixels(members):
    """In the means and in the sums, while the divisor stays the number of pixels."""
    truth, pseudo = blocks(range(K)), blocks(range(K))
    step = a_pair(maps(), maps(), truth, pseudo, members)
    plain = Contrast(num_classes=K)(step)
    step.weights = {view: torch.ones(truth.shape).double() for view in ("source", "target")}
    torch.testing.assert_close(Contrast(num_classes=K)(step), plain)
    for options, view in ((FORWARD, "target"), (BACKWARD, "source")):
        step.weights = {view: torch.full(truth.shape, 0.25).double()}
        loss = Contrast(num_classes=K, **options)
        torch.testing.assert_close(
            loss(step), 0.25 * loss(a_pair(*features_of(step), truth, pseudo))
        )


def features_of(step):
    return (step.outputs[view].features for view in ("source", "target"))


def test_contrast_learns_nothing_of_pixels_without_weight():
    """A row of cells whose labels are wrong, in both domains."""
    truth, pseudo = blocks(range(K)), blocks(range(K))
    source, target = maps(grad=True), maps(grad=True)
    kept = torch.ones(truth.shape).double()
    kept[:, :4] = 0  # the first row of cells
    wrong = [labels.where(kept > 0, (labels + 1) % K) for labels in (truth, pseudo)]
    values = []
    for labels in ((truth, pseudo), wrong):
        step = a_pair(source, target, *labels)
        step.weights = {"source": kept, "target": kept}
        loss = Contrast(num_classes=K)(step)
        values.append(torch.autograd.grad(loss, [source, target]))
    for right, other in zip(*values):
        assert not right[:, :, 0].any() and not other[:, :, 0].any() and right[:, :, 1:].any()
    labeler = transfer()
    step = a_pair(source.detach(), target.detach(), *wrong)
    step.weights = {"source": kept, "target": kept}
    labeler.after(step)
    moves, expected = labeler.moves, transfer()
    expected.after(
        a_pair(source.detach(), target.detach(), *(w.where(kept > 0, IGNORE) for w in wrong))
    )
    torch.testing.assert_close(moves, expected.moves)
