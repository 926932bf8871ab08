"""Processes: one needs no group, devices, seeds, memory."""

import platform
import subprocess
import sys

import pytest
import torch
from torch import nn

from engine import distributed
from engine.errors import UserError

CPU = torch.device("cpu")


def test_one_process_needs_no_process_group(monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.init("cpu") == CPU
    assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
    distributed.barrier()
    distributed.close()


def test_collectives_of_one_process_are_identities():
    tensor = torch.randn(3, requires_grad=True)
    total = distributed.all_reduce(tensor)
    assert torch.equal(total, tensor) and not total.requires_grad
    total += 1  # a new tensor: the original stays
    assert not torch.equal(total, tensor)
    assert (
        torch.equal(distributed.mean(tensor), tensor) and not distributed.mean(tensor).requires_grad
    )
    assert torch.autograd.grad((2 * distributed.synced_sum(tensor)).sum(), tensor)[0].tolist() == [
        2,
        2,
        2,
    ]
    assert [distributed.any_process(flag) for flag in (True, False, 15, 0)] == [
        True,
        False,
        True,
        False,
    ]
    assert distributed.gather({"a": 1}) == [{"a": 1}]


def test_more_processes_than_devices_is_an_error_with_the_way_out(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        UserError, match=r"2 CUDA devices, .* process 4 .*--nproc_per_node=2, or device=cpu"
    ):
        distributed.init("cuda")


def test_the_seed_decides_the_initialisation():
    weights = []
    for seed in (1, 1, 2):
        distributed.seed_everything(seed)
        weights.append(nn.Linear(3, 3).weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


FREED_MEMORY = """
import resource, torch
from engine import distributed
distributed.keep_memory()
def faults(times):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(times):
        torch.ones(2**24)  # 64 MiB, freed at once
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(50), faults(20))
"""


@pytest.mark.skipif(sys.platform != "linux" or not platform.libc_ver()[0], reason="needs glibc")
def test_memory_that_is_freed_is_used_again_without_page_faults():
    # In a process of its own: what other tests have left in the heap decides where a tensor fits.
    done = subprocess.run(
        [sys.executable, "-c", FREED_MEMORY], capture_output=True, text=True, check=True
    )
    # The first few may lie so that the next, with its alignment, does not fit where they were.
    assert int(done.stdout.split()[1]) < 1000  # 20 x 16,384 pages of 4 KiB otherwise


def test_single_process_helpers_are_identities():
    assert distributed.world_size() == 1 and distributed.gather(3) == [3]


def test_processes_that_cannot_join_are_one_sentence(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"cannot join \(.*RANK expected.*start them with torchrun"):
        distributed.init("cpu")
