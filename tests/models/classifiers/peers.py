"""Small classifiers like ProtoSeg, DNC and GMMSeg, scenes for them, and their losses on these."""

import torch
import torch.nn.functional as F

from losses import gmmseg, protoseg
from models.classifiers.gmmseg import GMMSeg
from models.classifiers.protoseg import ProtoSeg
from tests.records import a_step, an_output

K, M, D = 4, 3, 12
PEERS = {
    "ProtoSeg": lambda **o: ProtoSeg(
        **{"in_channels": D, "num_classes": K, "per_class": M, "momentum": 0.9} | o
    ),
    "DNC": lambda **o: ProtoSeg(
        **{
            "in_channels": D,
            "num_classes": K,
            "per_class": M,
            "momentum": 0.5,
            "memory": 3,
            "pixels": 8,
        }
        | o
    ),
    "GMMSeg": lambda **o: GMMSeg(
        **{
            "in_channels": D,
            "num_classes": K,
            "components": M,
            "width": 8,
            "momentum": 0.5,
            "update_every": 2,
        }
        | o
    ),
    "GMMSeg, queue": lambda **o: PEERS["GMMSeg"](**{"queue": 30, "pixels": 8} | o),
}


def build(name, **options):
    """In float64, training but for batch norm, which would tell one batch from its halves."""
    torch.manual_seed(0)
    part = PEERS[name](**options).double().eval()
    part.training = True
    part.vectors.copy_(F.normalize(part.vectors, dim=2))  # unit vectors in float64
    return part


def scene(classes=range(K), batch=4, seed=0, size=(12, 10)):
    """Features (B, D, h, w) that differ between classes, and labels (B, h, w), some ignored."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(list(classes))[
        torch.randint(len(classes), (batch, *size), generator=generator)
    ]
    noise = torch.randn(batch, D, *size, generator=generator, dtype=torch.float64)
    features = noise + 3 * torch.eye(K, D, dtype=torch.float64)[labels].permute(0, 3, 1, 2)
    labels[:, 0] = 255
    return features, labels


def unit_rows(features):
    """An embedding without parameters: the direction of the features."""
    return F.normalize(features.movedim(1, -1).flatten(0, 2), dim=1)


def state_of(part):
    return {key: value.clone() for key, value in part.state_dict().items()}


def look(part, features):
    """What the network makes of these features."""
    output = an_output(features=features)
    output.logits = part(features, output)
    return output


def follow(part, *batch, number=0):
    """The update of a step of one micro-batch: features, labels and perhaps weights."""
    features, labels, *weights = batch
    part.update([(features, labels, *(weights or [None]))], a_step(number=number))


def evaluate(term, part, features, labels, pixels=None):
    """A loss on features that are labelled at twice their size; `pixels` are those of the step."""
    labels = labels.repeat_interleave(2, 1).repeat_interleave(2, 2)
    step = a_step(look(part, features), labels, prototypes=part)
    if pixels is not None:
        step.counts["source"] = pixels
    return term(step)


def terms(part):
    if isinstance(part, GMMSeg):
        return [gmmseg.Contrast()]
    return [protoseg.Contrast(), protoseg.Distance()]


def one_class(scores, sharpness, rounds):
    """The equations of ProtoSeg for one class: mass 1 in all, 1 / M per prototype, 1 / n per pixel."""
    q = (scores.double() / sharpness).exp()
    q = q / q.sum()
    for _ in range(rounds):
        q = q / q.sum(0) / q.shape[1]
        q = q / q.sum(1, keepdim=True) / len(q)
    return q * len(q)
