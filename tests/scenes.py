"""Loaded by the server whose forks are runs: they find the toy scenes of tests/tiny*.yaml drawn."""

from datasets.toy import Toy
from tests.runs import drawn

for domain, split, length in (
    ("real", "train", 10),
    ("synthetic", "train", 10),
    ("real", "val", 3),
    ("real", "test", 3),
):
    scenes = Toy(domain=domain, split=split, length=length, size=(48, 64))
    for index in range(length):
        drawn(scenes.series, index, domain, scenes.size)
