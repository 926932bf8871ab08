"""TMT's losses: regions of source and target are told apart against the features, and the auxiliary head learns.

    model: {region: {stage: 3, variant: bias}}
    losses:
      - {name: cross_entropy.CrossEntropy, view: source}
      - {name: cross_entropy.CrossEntropy, view: mixed}
      - {name: tmt.RegionAdversarial, weight: 0.1}           # mixers.ClassMix with target: true
      - {name: tmt.Auxiliary, view: source, weight: 0.4}

"TMT: Cross-domain Semantic Segmentation with Region-adaptive Transferability Estimation" (Zhang et al., arXiv
2504.05774); weights and forms are reconstructions [R], as is most of models/region.py, which has the equations.
"""

import torch
import torch.nn.functional as F
from torch import nn

from engine.errors import UserError
from engine.statistics import IGNORE, resize_logits


def seen(outputs, view, name):
    """A map that model.region has left in the output of a view."""
    if name not in outputs[view].aux:
        raise UserError("losses of TMT need regions: set model.region.stage to a stage of a transformer (mit, vit)")
    return outputs[view].aux[name]


class RegionAdversarial(nn.Module):
    """Mean over both domains of the mean over regions of BCE(D(f(r)), domain). The discriminator learns it, and the
    network its opposite, behind the gradient reversal.

    Args:
        source, target: views of the two domains; their labels are not used.
    """

    def __init__(self, *, source: str = "source", target: str = "target"):
        super().__init__()
        self.source, self.target = source, target

    def forward(self, outputs):
        source, target = (seen(outputs, view, "domain") for view in (self.source, self.target))
        with torch.autocast(source.device.type, enabled=False):
            source, target = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (source, target))
            return (F.softplus(-source).mean() + F.softplus(target).mean()) / 2


class Auxiliary(nn.Module):
    """Cross-entropy of the auxiliary head, from which TMA takes the uncertainty; as cross_entropy.CrossEntropy.

    Args:
        view: the view whose labels it learns.
    """

    def __init__(self, *, view: str = "source"):
        super().__init__()
        self.view = view

    def forward(self, outputs, labels, valid, weights):
        logits, labels = seen(outputs, self.view, "auxiliary"), labels[self.view]
        with torch.autocast(logits.device.type, enabled=False):
            logits = resize_logits(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels.shape[-2:])
            loss = F.cross_entropy(logits, labels, ignore_index=IGNORE, reduction="none")
            loss = loss * weights[self.view] if self.view in weights else loss
            return loss.sum() / valid[self.view].to(loss.dtype).clamp_min(1)
