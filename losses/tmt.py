"""TMT's adversarial loss: regions of source and target are told apart, and the features learn to prevent it.

    model: {region: {stage: 3, variant: bias}}
    losses:
      - {name: cross_entropy.CrossEntropy, view: source}
      - {name: cross_entropy.CrossEntropy, view: mixed}
      - {name: tmt.RegionAdversarial, weight: 0.1}           # mixers.ClassMix with target: true
      - {name: cross_entropy.CrossEntropy, view: source, head: region, weight: 0.4}

"TMT: Cross-domain Semantic Segmentation with Region-adaptive Transferability Estimation" (Zhang et al., arXiv
2504.05774); weights and forms are reconstructions [R], as is most of models/region.py, which has the equations.
"""

import torch
import torch.nn.functional as F
from torch import nn

from engine.errors import UserError
from engine.statistics import precise


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
        if any("domain" not in outputs[view].aux for view in (self.source, self.target)):
            raise UserError(
                "tmt.RegionAdversarial needs regions: set model.region.stage to a stage of mit or vit, or to -1"
            )
        source, target = (outputs[view].aux["domain"] for view in (self.source, self.target))
        with torch.autocast(source.device.type, enabled=False):
            source, target = (precise(x) for x in (source, target))
            return (F.softplus(-source).mean() + F.softplus(target).mean()) / 2
