"""How far apart domains are to a network: terms of the bound on the error on an unseen domain.

    python eval.py CHECKPOINT domains=true

The error on an unseen domain is at most the error on the source, half of the distance that a
classifier can see between the domains, and the error of the best common hypothesis (Ben-David et
al., Machine Learning, 2010). PPAR's abstract says that its analysis shows how the method "reduces
domain gaps gradually"; its theorem is not known to us, so these are the terms of the usual bound
[R]. The third needs a hypothesis trained on the unseen labels and is left out: `bound` is the sum
of the first two and no bound by itself.

What is measured was fixed before the first run. No result has chosen any of it:

    cells           of the features that enter the classifier, and of the joint space where there is
                    a projector; unit vectors; of each class at most 5 of an image and 200 of a set,
                    100 each of images of even and of odd number, and of two sets as many: how often
                    a class occurs is no gap
    probe           logistic regression on standardised features, weight decay 1e-3, fitted to the
                    images of even number and tested on those of odd number, and the reverse
    distance        proxy A-distance, 2 (1 - 2 probe error), at least 0: 0 for domains that cannot
                    be told apart, 2 for domains that always can
    class distance  mean over classes of the distance of the two class means, 0 to 2
    error           1 - mAcc: the mean error of the classes
"""

import json
import logging

import torch
import torch.nn.functional as F

from engine.diagnostics import bars
from engine.errors import UserError
from engine.files import write, write_picture
from engine.prepare import images
from engine.statistics import IGNORE, pixel_hash, resize_labels

logger = logging.getLogger("engine")
PER_IMAGE, PER_SET, DECAY = 5, 200, 1e-3
COLUMNS = ("source error", "probe error", "distance", "class distance", "bound", "error")


def halves(rows):
    """Rows (N, 1 + D) of images of even and of odd number."""
    odd = rows[:, 0] % 2 == 1
    return rows[~odd], rows[odd]


def thinned(rows, count):
    """At most so many rows, evenly spaced."""
    return rows[torch.linspace(0, len(rows) - 1, min(count, len(rows))).round().long()]


def cells(network, dataset, device, autocast, workers, short_side):
    """{space: {class: rows (N, 1 + D) float64 of an image's number and a unit feature}}."""
    found = {}
    for index, image, label in images(dataset, device, workers, short_side=short_side):
        with torch.no_grad(), autocast:
            output = network.segment(image, heads=True)
        for space, maps in (("features", output.features), ("joint", output.embedding)):
            if maps is None:
                continue
            rows = F.normalize(maps[0].double(), dim=0).flatten(1).T.cpu()
            ids = resize_labels(label, maps.shape[-2:]).flatten().cpu()
            order = pixel_hash(0, torch.tensor([index]), len(ids))[0].argsort()
            for k in set(ids.tolist()) - {IGNORE}:
                chosen = rows[order[ids[order] == k][:PER_IMAGE]]
                number = torch.full((len(chosen), 1), float(index), dtype=torch.float64)
                kept = found.setdefault(space, {}).setdefault(k, [])
                kept.append(torch.cat([number, chosen], 1))
    return {
        space: {
            k: torch.cat([thinned(half, PER_SET // 2) for half in halves(torch.cat(rows))])
            for k, rows in classes.items()
        }
        for space, classes in found.items()
    }


def fitted(rows, domains):
    """Weights (1 + D) of a logistic regression of rows (N, D) on 0 and 1 (N)."""
    weight = torch.zeros(rows.shape[1] + 1, dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = F.binary_cross_entropy_with_logits(rows @ weight[1:] + weight[0], domains)
        value = value + DECAY / 2 * weight[1:].square().sum()
        value.backward()
        return value

    optimiser.step(loss)
    return weight.detach()


def probe_error(rows, domains):
    """Share of rows (N, 1 + D) whose domain (N), 0 or 1, a linear probe that has not seen their
    images gets wrong."""
    odd, wrong = rows[:, 0] % 2 == 1, []
    for test in (odd, ~odd):
        known = rows[~test, 1:]
        scaled = (rows[:, 1:] - known.mean(0)) / known.std(0).clamp_min(1e-6)
        weight = fitted(scaled[~test], domains[~test])
        told = (scaled[test] @ weight[1:] + weight[0] > 0).double()
        wrong.append((told != domains[test]).double())
    return float(torch.cat(wrong).mean())


def gap(source, domain):
    """Cells {class: rows} of two sets -> (probe error, class distance); None where they share no
    class in images of both kinds of number."""
    pairs = []
    for k in sorted(source.keys() & domain.keys()):
        # As many of each fold, in which the probe is fitted or tested.
        folds = [*zip(halves(source[k]), halves(domain[k]))]
        chosen = [[thinned(rows, min(map(len, fold))) for rows in fold] for fold in folds]
        pairs.append([torch.cat(side) for side in zip(*chosen)])
    pairs = [pair for pair in pairs if len(pair[0])]
    a, b = (torch.cat(side) for side in zip(*pairs)) if pairs else (torch.empty(0, 1),) * 2
    if not all(map(len, halves(a))):
        return None
    domains = torch.cat([torch.zeros(len(a)), torch.ones(len(b))]).double()
    between = [(s[:, 1:].mean(0) - d[:, 1:].mean(0)).norm() for s, d in pairs]
    return probe_error(torch.cat([a, b]), domains), float(sum(between) / len(between))


def measure(network, datasets, source, matrices, folder, device, autocast, workers, short_side):
    """Write domains.json and a picture of each space, and log the terms for every set but the
    source.

    Args:
        datasets: {name: labelled set}; source: the name of the one of the training domain.
        matrices: {name: ConfusionMatrix} of the network.
        folder: of the other results.
    Raises:
        UserError: there is no other set, or one that shares no class with the source.
    """
    others = [name for name in datasets if name != source]
    if not others:
        raise UserError(
            f"domains=true needs a set beside that of the training domain, {source}: add data.test"
        )
    accuracy = {name: matrix.as_dict()["summary"]["mAcc"] for name, matrix in matrices.items()}
    if empty := [name for name, value in accuracy.items() if value is None]:
        raise UserError(f"domains=true: no pixel of {empty[0]} has a label")
    error = {name: 1 - value / 100 for name, value in accuracy.items()}
    found = {
        name: cells(network, dataset, device, autocast, workers, short_side)
        for name, dataset in datasets.items()
    }
    content, lines = {"source": source, "spaces": {}}, []
    for space, classes in found[source].items():
        content["spaces"][space] = terms = {}
        for name in others:
            gaps = gap(classes, found[name].get(space, {}))
            if gaps is None:
                raise UserError(
                    f"data.test.{name} shares no class with {source} in images of even and of odd "
                    "number, by which the probe is tested"
                )
            wrong, between = gaps
            distance = max(0.0, 2 * (1 - 2 * wrong))
            values = (error[source], wrong, distance, between)
            terms[name] = dict(zip(COLUMNS, (*values, error[source] + distance / 2, error[name])))
        width = max(map(len, ("domain", *terms)))
        lines += ["", f"{space}, source {source}", "  ".join(["domain".ljust(width), *COLUMNS])]
        for name, values in terms.items():
            told = (f"{value:{len(key)}.3f}" for key, value in values.items())
            lines.append("  ".join([name.ljust(width), *told]))
        shown = {f"{n}: {key}": terms[n][key] for n in others for key in ("distance", "error")}
        picture = bars(
            [100 * v / (2 if key.endswith("distance") else 1) for key, v in shown.items()],
            list(shown),
            f"{space}: half the distance to {source}, and the error, per cent",
        )
        write_picture(folder / f"domains_{space}.png", picture)
    logger.info("\n".join(lines))
    write(folder / "domains.json", json.dumps(content, indent=1))
