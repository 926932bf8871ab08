"""GMMSeg's loss: "Gaussian Mixture based Generative Semantic Segmentation Models" (Liang et al.,
NeurIPS 2022).

model.classifier: {name: gmmseg.GMMSeg}
losses: [{name: cross_entropy.CrossEntropy}, {name: gmmseg.Contrast, weight: 0.01}]
"""

from engine.ranges import Positive
from losses import protoseg


class Contrast(protoseg.Contrast):
    """Cross-entropy over the log-densities of all K M components, towards the one that a pixel is
    assigned to; that is ProtoSeg's contrast with densities for cosines and no temperature.

    Args:
        temperature: by which log-densities are divided; 1 in the released code.
        view: the view whose pixels are contrasted.
    """

    def __init__(self, *, temperature: Positive = 1.0, view: str = "source"):
        super().__init__(temperature=temperature, view=view)
