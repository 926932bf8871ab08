"""Records of engine/step.py for tests, of the few fields that a test is about.

step = a_step(an_output(logits, features), labels)      # of the view "source"
step = a_step({"source": an_output(features=f), "target": an_output(features=g)}, {"source": y})
"""

import torch
from torch import Tensor

from engine.statistics import IGNORE
from engine.step import Batch, Output, Step


def an_output(logits=None, features=None, **fields):
    """An Output with these fields, None for the others."""
    return Output(logits=logits, features=features, **fields)


def a_batch(image, label=None, samples=None, part=None, **extra):
    """A Batch of images (B, 3, H, W).

    Args:
        label: (B, H, W); 255 everywhere where there is none.
        samples: numbers of its samples; from 0 where there are none.
        part: (B), the number of the data set of each.
        extra: stored maps by name.
    """
    if label is None:
        label = torch.full((len(image), *image.shape[-2:]), IGNORE)
    samples = torch.as_tensor(range(len(image)) if samples is None else samples)
    return Batch(image, label, samples, samples.tolist(), extra, part)


def a_step(
    outputs=None,
    labels=None,
    weights=None,
    prototypes=None,
    number=0,
    total=10,
    *,
    source=None,
    target=None,
    samples=None,
    **fields,
):
    """A Step. Batches are made of what is given; images that are not are black.

    Args:
        outputs, labels, weights: {view: Output or tensor}; one alone is that of the view "source".
        prototypes: {name: member}; one alone is the classifier.
        source, target: images (B, 3, H, W), or a Batch; there is a target if another view than
            "source" is named.
        samples: numbers of the samples of the batches that are made here.
        fields: other fields of the Step.
    """
    outputs, labels, weights = (named(part, "source") for part in (outputs, labels, weights))
    black = torch.zeros(image_shape(outputs, labels, weights))
    if source is None or isinstance(source, Tensor):
        source = a_batch(black if source is None else source, labels.get("source"), samples)
    if target is None and {*outputs, *labels, *weights} - {"source"}:
        target = black
    if isinstance(target, Tensor):
        target = a_batch(target, samples=samples)
    made = {"outputs": outputs, "labels": labels, "weights": weights}
    prototypes = named(prototypes, "classifier")
    return Step(number, total, source, target, prototypes, **made, **fields)


def named(values, name):
    """A dict as it is; one value under a name."""
    return {} if values is None else values if isinstance(values, dict) else {name: values}


def image_shape(outputs, labels, weights):
    """(B, 3, H, W) of images to which labels, weights or else outputs belong."""
    maps = [*labels.values(), *weights.values()]
    for output in outputs.values():
        maps += [output.logits, output.features, output.embedding, output.components]
    known = next((values for values in maps if values is not None), torch.zeros(1, 4, 4))
    return len(known), 3, *known.shape[-2:]
