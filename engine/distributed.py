"""Processes: torchrun's environment or a single process, and the few collectives that the project
needs.

Everything here works unchanged on one process, so no other file asks whether it runs distributed.

    torchrun --nproc_per_node=8 train_supervised.py configs/...      NCCL on CUDA, gloo on the CPU
    python train_supervised.py configs/...                           one process
"""

import contextlib
import ctypes
import datetime
import inspect
import os
import random

import numpy as np
import torch
import torch.distributed as dist

from engine import errors  # the module: it imports this one


def init(device="auto", timeout=30):
    """Join the process group that torchrun announces, if there is one.

    Args:
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        timeout: minutes a collective waits for the other processes.
    Returns:
        torch.device of this process.
    Raises:
        UserError: no CUDA device, more processes on this machine than CUDA devices, or processes
            that do not find each other.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda:
        count = torch.cuda.device_count()
        if not count:
            raise errors.UserError(
                "device=cuda, but PyTorch finds no CUDA device here: set device=cpu, or auto"
            )
        if local_rank >= count:
            raise errors.UserError(
                f"this machine has {count} CUDA devices, and this is process {local_rank + 1} on "
                f"it: "
                f"set --nproc_per_node={count}, or device=cpu"
            )
        torch.cuda.set_device(local_rank)
    if "WORLD_SIZE" in os.environ and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if use_cuda else "gloo"
        try:
            dist.init_process_group(backend, timeout=datetime.timedelta(minutes=timeout))
        except (ValueError, RuntimeError) as error:
            line = str(error).strip().splitlines()[0]
            raise errors.UserError(
                f"the processes cannot join ({line}): start them with torchrun, or give each RANK, "
                "WORLD_SIZE, MASTER_ADDR and a free MASTER_PORT"
            ) from None
    return torch.device("cuda", local_rank) if use_cuda else torch.device("cpu")


def setup(cfg):
    """What every script does first: join the processes, set threads, determinism and seed ->
    device."""
    device = init(cfg.device, cfg.timeout)
    if device.type == "cpu":
        keep_memory()
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    torch.use_deterministic_algorithms(cfg.deterministic, warn_only=True)
    torch.backends.cudnn.benchmark = not cfg.deterministic
    seed_everything(cfg.seed)
    return device


def keep_memory():
    """Let glibc keep what it has got from the system: by default it returns every large tensor when
    it is freed, and getting it anew, page by page, is a part of every training step on a CPU."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # another C library
        return
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt(trim_threshold, 2**31 - 1)
    mallopt(mmap_max, 0)


def place(network, device, sync_bn=False):
    """The network on its device; with `sync_bn` its batch norm takes the statistics of all
    processes (CUDA only)."""
    network = network.to(device)
    if sync_bn and device.type == "cuda" and world_size() > 1:
        network = torch.nn.SyncBatchNorm.convert_sync_batchnorm(network)
    return network


def parallel(network, device):
    """What to call in training: the network, or DDP around it where there are several processes."""
    if world_size() == 1:
        return network
    devices = [device.index] if device.type == "cuda" else None
    ddp = torch.nn.parallel.DistributedDataParallel
    # Batch statistics stay each process's own. The newest PyTorch deprecates the older name.
    names = ("forward_sync_buffers", "broadcast_buffers")
    name = next(name for name in names if name in inspect.signature(ddp.__init__).parameters)
    return ddp(network, devices, **{name: False})


def synced(network, last):
    """The context of a micro-batch: DDP adds up the gradients of all processes at the last one of a
    step."""
    return contextlib.nullcontext() if last or world_size() == 1 else network.no_sync()


def close():
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def is_main():
    return rank() == 0


def barrier():
    if dist.is_initialized():
        dist.barrier()


def seed_everything(seed):
    """Seed Python, NumPy and PyTorch alike on every process, for an identical initialisation."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


@torch.no_grad()
def all_reduce(tensor):
    """Sum over processes, a new tensor without a graph."""
    total = tensor.detach().clone()
    if world_size() > 1:
        dist.all_reduce(total)
    return total


def mean(tensor):
    """Mean over processes, without a graph."""
    return all_reduce(tensor) / world_size()


class _SyncedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return all_reduce(tensor)

    @staticmethod
    def backward(ctx, grad):
        return grad * world_size()


def synced_sum(tensor):
    """Sum over processes that keeps the graph of the local summand.

    Every process computes the same loss from the sum, and DDP averages the gradients over
    processes; the factor `world_size` in the backward pass makes that average the gradient of the
    one global loss.
    """
    return _SyncedSum.apply(tensor) if world_size() > 1 else tensor


@torch.no_grad()
def all_gather(tensor):
    """The tensors of all processes, of one shape, along a new first dimension; without a graph."""
    if world_size() == 1:
        return tensor[None]
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.stack(parts)


def of_the_first(tensor):
    """Overwrite a tensor with that of the main process."""
    if world_size() > 1:
        dist.broadcast(tensor, 0)


def any_process(flag):
    """True on every process if the flag is set on one of them. A collective on the CPU: no GPU
    waits for it."""
    return bool(all_reduce(torch.tensor(int(flag))))


def gather(value):
    """The value of every process, as a list in the order of ranks."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value)
    return values
