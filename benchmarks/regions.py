"""What TMT's regions and attention add to a training step of a transformer, as ratios.

    python -m benchmarks.regions [--threads 1] [--rounds 5] [--side 512]
    python -m benchmarks.regions [--device cpu] [--precision fp32]

MiT-B0 and ViT-S with the SegFormer decoder on one source and one target crop: forward,
cross-entropy of both, backward, AdamW. The rows: the network alone; with ACTE, its adversarial loss
and the head that gives the uncertainty (`variant: none`); with TMA too (`variant: bias`); that on
equal patches. Every round runs all rows, in turned order every other time; times are medians over
rounds, ratios medians of ratios within a round. At the end it says which kernels of attention the
step with TMA has called; on a GPU also the peak of memory of every row.
"""

import contextlib

import torch

from benchmarks.kernels import arguments, compare, patches, record
from engine.config import load
from engine.statistics import IGNORE
from losses.cross_entropy import CrossEntropy
from losses.tmt import RegionAdversarial
from models.build import build_segmentor

K = 19
HOSTS = {
    "MiT-B0": [
        "model.backbone={name: mit.MiT, size: b0, weights: none}",
        "model.heads.region={name: region.Region, stage: 3, cell: 4}",
    ],
    "ViT-S": [
        "model.backbone={name: vit.ViT, size: s, weights: none}",
        "model.heads.region={name: region.Region, stage: 1, cell: 4}",
    ],
}
ROWS = {
    "network alone": ["model.heads.region={name: none}"],
    "and ACTE": ["model.heads.region.variant=none"],
    "and TMA": ["model.heads.region.variant=bias"],
    "TMA on equal patches": ["model.heads.region.regions=patches"],
}


def build_step(host, row, options):
    """A function that trains one step."""
    texts = [
        *HOSTS[host],
        "model.bn_views=[]",
        "model.decoder={name: segformer_mlp.SegFormerMLP, width: 256}",
        *ROWS[row],
    ]
    cfg = load("configs/toy/uda_tmt.yaml", texts)
    device, side = options.device, options.side
    model = build_segmentor(cfg.model, range(K)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    names = ("source", "target")
    views = {name: torch.rand(1, 3, side, side, device=device) for name in names}
    labels = {name: patches(1, side, side, K).clamp_max(IGNORE).to(device) for name in names}
    terms = [(1, CrossEntropy(view=name)) for name in names]
    if "region" in model.heads:
        terms += [(0.4, CrossEntropy(head="region")), (0.1, RegionAdversarial())]
    kind = {"fp32": contextlib.nullcontext, "bf16": lambda: torch.autocast(device, torch.bfloat16)}[
        options.precision
    ]

    def train():
        step = record(views, labels)
        with kind():
            step.outputs = model(step.views, 1000)
        sum(factor * term(step) for factor, term in terms).backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()

    return train


def kernels_of(step):
    """Names of the attention kernels that a step calls."""
    with torch.profiler.profile() as profile:
        step()
    return sorted(
        {
            event.key
            for event in profile.key_averages()
            if "_attention_for_cpu" in event.key or "fmha" in event.key
        }
    )


def main():
    options = arguments("regions", rounds=5, side=512, device="cpu", precision="fp32")
    print("| network | step | ms | ratio | peak MiB |\n|---|---|---|---|---|", flush=True)
    for host in HOSTS:
        steps, peaks = (
            {row: build_step(host, row, options) for row in ROWS},
            dict.fromkeys(ROWS, "-"),
        )
        if options.device == "cuda":
            for row, step in steps.items():
                step()
                torch.cuda.reset_peak_memory_stats()
                step()
                peaks[row] = torch.cuda.max_memory_allocated() >> 20
        for row, (ms, ratio) in compare(steps, options.rounds).items():
            print(f"| {host} | {row} | {ms:.0f} | {ratio:.3f} | {peaks[row]} |", flush=True)
        print(f"attention kernels with TMA: {', '.join(kernels_of(steps['and TMA']))}", flush=True)


if __name__ == "__main__":
    main()
