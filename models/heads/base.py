"""The face of a head: a part of the network beside the classifier, `model.heads.<name>:
{name: module.Class, ...}`."""

from collections.abc import Callable

from torch import Tensor, nn

from engine.step import Output, View


class Head(nn.Module):
    """Constructors get what they ask for by name: `in_channels` (D of the features), `map_channels`
    and `depths` of the backbone, `num_classes`, `joint` (channels of heads.projector, 0: none),
    `classifier`, `reductions` (tokens per key and side, of each stage of a transformer).

    Attributes:
        at_test: it runs at test too; otherwise in training alone.
        twice: a first pass, without heads and gradient, goes before: `output.first`.
        needs: pairs of what of it must be trained and a loss that does so; losses say what they
            train (`Loss.trains`).
    """

    at_test = False
    twice = False
    needs: tuple[tuple[str, str], ...] = ()

    def bias(self, output: Output, step: int) -> Callable | None:
        """What a transformer calls before each of its blocks for a bias of its attention
        (models/backbones/base.py)."""
        return None

    def forward(self, view: View, maps: list[Tensor], output: Output, step: int) -> None:
        """After the decoder, before the classifier: write fields of `output`, whose `features` are
        there."""

    def draw(self, log, number: int, network, image: Tensor) -> None:
        """Pictures for TensorBoard of one image (1, 3, H, W); here none."""
