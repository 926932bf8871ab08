"""TMT's adversarial loss: regions of source and target are told apart, and the features learn to
prevent it.

    model.heads.region: {name: region.Region, stage: 3, variant: bias}
    losses:
      - {name: cross_entropy.CrossEntropy, view: source}
      - {name: cross_entropy.CrossEntropy, view: mixed}
      - {name: tmt.RegionAdversarial, weight: 0.1}           # mixers.ClassMix with target: true
      - {name: cross_entropy.CrossEntropy, view: source, head: region, weight: 0.4}
      - {name: tmt.RegionProbe}                              # with estimator: probe

"TMT: Cross-domain Semantic Segmentation with Region-adaptive Transferability Estimation" (Zhang et
al., arXiv 2504.05774); weights and forms are reconstructions [R], as is most of
models/heads/region.py, which has the equations.
"""

import torch
import torch.nn.functional as F

from engine.errors import UserError
from engine.statistics import precise
from losses.base import Loss


class RegionAdversarial(Loss):
    """Mean over both domains of the mean over regions of BCE(D(f(r)), domain). The discriminator
    learns it, and the network its opposite, behind the gradient reversal.

    Args:
        source, target: views of the two domains; their labels are not used.
    """

    trains = ("discriminator",)

    def __init__(self, *, source: str = "source", target: str = "target"):
        super().__init__()
        self.source, self.target = source, target

    def logits(self, regions):
        """Which logits (B, N) of the regions are scored, None where there are none."""
        return regions.domain

    def forward(self, step):
        regions = [step.outputs[view].regions for view in (self.source, self.target)]
        found = [part and self.logits(part) for part in regions]
        if any(part is None for part in found):
            raise UserError(
                f"tmt.{type(self).__name__} needs regions: set model.heads.region={{name: "
                "region.Region, stage: ...}, a stage of mit or vit, or -1; for RegionProbe with "
                "estimator: probe, for RegionAdversarial with look: once"
            )
        with torch.autocast(found[0].device.type, enabled=False):
            source, target = map(precise, found)
            return (F.softplus(-source).mean() + F.softplus(target).mean()) / 2


class RegionProbe(RegionAdversarial):
    """The same of the probe, which learns to tell the domains and moves no feature. A probe that
    finds no difference, or learns too slowly, stays at log 2 = 0.693: then T is noise."""

    trains = ("probe",)

    def logits(self, regions):
        return regions.probe
