"""Category-basis prototypes as the classifier: "Frozen is better than learning" (Chen et al., PR 2024).

Logits are inner products with frozen, mutually orthogonal prototypes of one length (equations 1 and 2). Orthogonality
keeps similar classes from getting correlated weights, the equal length keeps frequent classes from getting longer ones.
There is no bias, which would bring the prior back, and features are not normalised in the pixel loss.

    model.classifier: {name: cbp.CBP, length: 2}
"""

from torch import nn

from models.prototypes.basis import OrthogonalBasis


class CBP(nn.Module):
    """Features (B, D, h, w) -> logits (B, K, h, w) = <features, prototypes>.

    Args:
        length: T, the norm of every prototype: 2 in the paper's default, 0.3 to 3 per data set and network.
    Raises:
        ValueError: fewer feature channels than classes.
    """

    def __init__(self, *, in_channels, num_classes, length: float = 2.0):
        super().__init__()
        self.prototypes = OrthogonalBasis(num_classes=num_classes, in_channels=in_channels, length=length)

    def means(self):
        """The frozen prototypes (K, D)."""
        return self.prototypes.means()

    def forward(self, features):
        return self.prototypes.score(features)
