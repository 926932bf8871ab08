"""The two faces of this folder: a loss, and a labeler. Both read and write one record,
engine/step.py."""

from torch import Tensor, nn

from engine.errors import UserError
from engine.step import Step


class Loss(nn.Module):
    """A term of the training loss.

    `forward` returns a scalar of at least float32. **The loss of a step is the mean of it over
    processes and micro-batches.** A sum over pixels divided by `step.pixels(view)` is normalised by
    the number of labelled pixels of the whole step, whatever the number of processes. A term that
    couples the pixels of a batch (OCCL) uses sums over all processes and is averaged over
    micro-batches.

    A loss never logs and never waits for the GPU (`.item()`, boolean indexing). A batch without
    labels gives a zero that keeps the graph. A loss has no parameters and no buffers: they would be
    missing in the checkpoint. What is learned belongs to the network (models/heads), a running
    state to models/prototypes.

    Attributes:
        needs_teacher: it reads `step.teacher`, which is computed only if a part needs it.
        needs_tower: it reads `step.tower`, likewise.
        trains: what of the heads it trains (`needs` of models/heads/base.py).
    """

    needs_teacher = False
    needs_tower = False
    trains: tuple[str, ...] = ()

    def forward(self, step: Step) -> Tensor:
        raise NotImplementedError


class Labeler(nn.Module):
    """Pseudo labels of the target, or weights of pixels; a module without parameters, whose buffers
    are saved.

    `uda.labelers`, `uda.source_weights` and `dg.reweight` name labelers. Each method may be left
    out.

    Attributes:
        needs_teacher, needs_tower: as of a Loss.
        stored: `prepare` stores its labels as "pseudo_labels"; they stay the same for the whole
            stage.
        learned: `prepare` reads what the network predicts, which means something only once it has
            learnt: not in a first stage from ImageNet.
        labels_images: `label` has a rule for whole images, which `eval.py export=pseudo_labels`
            writes.
    """

    needs_teacher = False
    needs_tower = False
    stored = False
    learned = False
    labels_images = False

    def prepare(self, preparation) -> None:
        """Once, before the first step of a stage (engine/prepare.py): fit something, store maps."""

    def before(self, step: Step) -> None:
        """Before the student sees the micro-batch: fill `step.labels` or `step.weights`; with the
        `stored` labels, cut and mirrored with the image. What is to be learned from it is added up
        until `update`, which comes once per step."""
        if self.stored:
            step.labels["target"] = step.target.extra["pseudo_labels"].long()

    def after(self, step: Step) -> None:
        """After its forward pass, without gradient: fill or replace them with the help of
        `step.outputs`."""

    def update(self, step: Step) -> None:
        """After an optimiser step. `step.skipped` (0-dim bool) is true if the step was not taken:
        then do nothing."""

    def label(self, network, image, prototypes) -> Tensor:
        """Labels (B, H, W) of whole images (B, 3, H, W), 255 where there is none; if
        `labels_images`."""
        raise NotImplementedError


def after_alone(labeler):
    """Whether `after` is all that a labeler does."""
    own, face = type(labeler), Labeler
    others = (own.prepare, own.before, own.update) == (face.prepare, face.before, face.update)
    return others and own.after is not face.after


def member(prototypes, name, who, remedy=""):
    """A prototype member by name.

    Raises:
        UserError: there is none; it says who asks and what to add.
    """
    if name not in prototypes:
        raise UserError(
            f"{who} needs the prototypes '{name}'; there are {', '.join(prototypes)}. "
            f"{remedy}".strip()
        )
    return prototypes[name]


def comparable(prototypes, name, who, remedy=""):
    """The same, of vectors that can be compared with features.

    Raises:
        UserError: they lie in an embedding of their own; otherwise as `member`.
    """
    chosen = member(prototypes, name, who, remedy)
    if chosen.space != "features":
        its = "the joint space" if chosen.space == "joint" else "an embedding of its own"
        raise UserError(
            f"{who} compares features, and the vectors of '{name}' lie in {its}: "
            "take another member, another classifier, or protoseg.Contrast or gmmseg.Contrast"
        )
    return chosen


def output_of(step, view, who):
    """The output of a view that shows its images as they come.

    Raises:
        UserError: the mixer makes no such view; it says who asks and which mixers do.
    """
    if view not in step.outputs:
        raise UserError(
            f"{who} needs the view '{view}', the images as they come; the mixer makes "
            f"{', '.join(step.outputs)}. mixers.SourceTarget and mixers.Strong make it, and "
            "mixers.ClassMix with target: true"
        )
    return step.outputs[view]
