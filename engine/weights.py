"""Foreign weights into a network, with a report of every key.

A key that is missing, left over or of another shape is an error unless the caller expects it: a
silent `strict=False` is how a network ends up half random.
"""

import contextlib
import fnmatch
import inspect
import logging
import os
import pickle
import re
import struct
import warnings
import zipfile
from http.client import HTTPException
from mmap import ACCESS_READ, mmap
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import torch

from engine.errors import UserError

logger = logging.getLogger("engine")

# Where a whole network has its backbone, and what then stands beside it: MMSegmentation,
# torchvision and this project; Hugging Face; SMP, whose `encoder.` is a part of other programs'
# backbones.
BODIES = {"backbone.": "", "segformer.": "decode_head.", "encoder.": "segmentation_head."}
WRAPPERS = ("state_dict", "model", "model_state_dict")  # what files have around a state dict
DAMAGE = (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    OverflowError,
    struct.error,
)
FOLDER = 0x10  # a bit that no checksum covers: PyTorch returns whatever lies in memory for a folder
UNSAFE = re.compile(rb"\n(bytearray|_rebuild_sparse_tensor)\n")
DEPTH = 50  # of lists and dicts within each other
SECONDS = 5  # without an answer there is no connection


class WeightsError(UserError):
    """Weights that cannot be read, or that do not fit the network; the message lists the keys."""


def read(path):
    """Read a file of tensors safely -> its content: PyTorch's or safetensors. Never runs code from
    the file.

    Raises:
        WeightsError: no such file, an incomplete or damaged file, one that holds more than tensors
            and plain values, or whose content claims more than the file holds.
    """
    path, sizes = Path(path), None
    if not os.path.isfile(path):
        raise WeightsError(f"there is no file {path}")
    try:
        with path.open("rb") as file:
            start = file.read(4)
    except OSError as error:
        raise WeightsError(f"cannot read {path} ({error.strerror})") from None
    if path.suffix == ".safetensors":
        content = read_safetensors(path)
    else:
        if start == b"PK\3\4":
            sizes = check_archive(path)
        elif start:
            with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                check_pickle(data, path)
        content = read_pytorch(path, start)
    check_content(content, path, sizes)
    return content


def check_archive(path):
    """Raise WeightsError for a zip archive that claims more than it holds or fails a checksum ->
    {sizes of its members, bytes}.

    PyTorch checks neither. It takes 0.3 s per GB, less than the reading that follows.
    """
    size = path.stat().st_size
    try:
        archive = zipfile.ZipFile(path)
    except DAMAGE as error:
        raise WeightsError(f"{path} is incomplete or damaged ({reason(error)})") from None
    with archive:
        members = archive.infolist()
        claimed = sum(member.file_size for member in members)
        faults = {
            "is a TorchScript archive, as OpenAI published CLIP: it holds code and is not loaded. "
            "If you trust it, convert it once: torch.save(torch.jit.load(PATH, "
            "map_location='cpu').state_dict(), NEW_PATH)": any(
                member.filename.endswith("/constants.pkl") for member in members
            ),
            f"has {size} bytes and claims to hold {claimed}: it is damaged, or made to fill the "
            "memory": claimed > size,
            "is compressed, which torch.save never does: unpack it and store it uncompressed": any(
                member.compress_type for member in members
            ),
            "is damaged: it marks what PyTorch reads as a folder": any(
                member.external_attr & FOLDER for member in members
            ),
        }
        if found := [fault for fault, there in faults.items() if there]:
            raise WeightsError(f"{path} {found[0]}")
        checked = any(member.CRC for member in members)  # torch.save can leave the checksums out
        for member in members:
            member.CRC = member.CRC if checked else None
            try:
                with archive.open(member) as content:
                    while content.read(2**20):
                        pass
            except DAMAGE:
                raise WeightsError(
                    f"{path} is damaged: its member {member.filename!a} fails its checksum"
                ) from None
        for member in members:
            if member.filename.endswith("/data.pkl"):
                check_pickle(archive.read(member), path)
    return {member.file_size for member in members}


def check_pickle(data, path):
    """Raise WeightsError for what PyTorch takes for safe and is not.

    Unpickling a bytearray allocates as many bytes as it likes, and a damaged sparse tensor makes
    PyTorch refuse the next file too.
    """
    if found := UNSAFE.search(data):
        raise WeightsError(
            f"{path} holds more than tensors and plain values ({found[1].decode()}); it is not "
            f"loaded"
        )


def read_pytorch(path, start):
    """The content of a file of torch.save, which begins with the bytes `start`."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they speak to programmers
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of any type: PyTorch trusts the structure of a file
        failure = error
    types = []
    if start.startswith(b"PK"):
        with contextlib.suppress(Exception):  # a damaged list of types
            types = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    elif isinstance(failure, pickle.UnpicklingError):
        types = re.findall(r"GLOBAL (\S+)", str(failure))
    if types or start[:2] in (b"\x80\4", b"\x80\5") or "legacy .tar" in str(failure):
        what = (
            "more than tensors and plain values"
            if types
            else "pickles in a format that is not read"
        )
        raise WeightsError(
            f"{path} holds {what}{_some(sorted(types))}; it is not loaded, since unpickling can "
            f"run any code. If you "
            "trust its author, load it with the program that wrote it, and save its tensors alone: "
            "torch.save(model.state_dict(), NEW_PATH)"
        )
    raise WeightsError(f"{path} is incomplete or not a PyTorch file ({reason(failure)})")


def read_safetensors(path):
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise WeightsError(
            f"{path} needs the package safetensors: pip install safetensors ({error})"
        ) from None
    try:
        return load_file(path)
    except SafetensorError as error:
        raise WeightsError(
            f"{path} is incomplete or not a safetensors file ({reason(error)})"
        ) from None


def check_content(content, path, sizes):
    """Raise WeightsError unless what was read stays as large as its file when it is used.

    A tensor may repeat one stored number, and a list another list, a billion times.

    Args:
        sizes: bytes of each member of an archive, None for other files. torch 2.6 reads on
            behind the end of a member.
    """
    size, known = path.stat().st_size, {}

    def measure(value, depth=0):
        """How many values a nested dict or list has when it is written out, and how deep it is."""
        count, height = 1, 0
        if isinstance(value, torch.Tensor):
            check_tensor(value, size, path, sizes)
        elif isinstance(value, (dict, list, tuple)) and depth <= DEPTH:
            if id(value) not in known:
                items = value.values() if isinstance(value, dict) else value
                counts, heights = zip((1, 0), *(measure(item, depth + 1) for item in items))
                known[id(value)] = sum(counts), 1 + max(heights)
            count, height = known[id(value)]
        if depth + height > DEPTH or count > max(size, 10**6):
            raise WeightsError(f"{path} holds lists within lists without end")
        return count, height

    measure(content)


def check_tensor(tensor, size, path, sizes):
    """Raise WeightsError unless a file of so many bytes, and one member of it if it is an archive,
    can hold every number of a tensor."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        raise WeightsError(f"{path} holds a tensor without its numbers")
    held, needed = tensor.untyped_storage().nbytes(), tensor.numel() * tensor.element_size()
    if sizes and held not in sizes:
        raise WeightsError(
            f"{path} is damaged: a tensor {tuple(tensor.shape)} takes {held} bytes, and no member "
            "of the archive has as many"
        )
    stored = min(held, size)
    if needed > stored:
        raise WeightsError(
            f"{path} holds {stored} bytes of a tensor {tuple(tensor.shape)} of {needed} bytes: "
            f"save its clone()"
        )


def plain(text, longest=200):
    """A text from elsewhere as one printable line."""
    text = "".join(c if c.isprintable() else " " for c in text)
    return text if len(text) <= longest else f"{text[:longest]}..."


def reason(error):
    """What another program says is wrong, in one line, and without its advice to load what is not
    safe."""
    line = (str(error).strip().splitlines() or [""])[0]
    line = "" if re.search("weights.only", line, re.IGNORECASE) else plain(line)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def unwrap(state, source="the file"):
    """{key: tensor} from what files hold: without WRAPPERS around it, and without what
    DistributedDataParallel (`module.`) and torch.compile (`_orig_mod.`) add to the keys.

    Raises:
        WeightsError: no dict of tensors.
    """
    for wrapper in WRAPPERS:
        if isinstance(state, dict) and isinstance(state.get(wrapper), dict):
            state = state[wrapper]
    if not isinstance(state, dict):
        raise WeightsError(f"{source} holds no weights but a {type(state).__name__}")
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise WeightsError(
                f"{source} must hold tensors by name, and {key!a} is a {type(value).__name__}"
            )
    return rename(state, {r"^(module\.|_orig_mod\.)+|(?<=\.)_orig_mod\.": ""})


def divided(state):
    """A foreign state dict -> that of its backbone, and what stands beside it: {} where it is of a
    backbone alone. `model.` and `net.` before the keys, as Lightning and DAFormer have it, go."""
    state = rename(state, {r"^((model|net|module)\.)+": ""})
    for body, beside in BODIES.items():
        inner = {k.removeprefix(body): v for k, v in state.items() if k.startswith(body)}
        if inner and any(key.startswith(beside) for key in state):
            return inner, {k: v for k, v in state.items() if not k.startswith(body)}
    return state, {}


def backbone_of(state, source):
    """The backbone in a state dict that may be of a whole network."""
    inner, others = divided(state)
    if others:
        logger.info(
            f"weights {source}: of a whole network; {len(others)} keys of its heads are left out"
            + _some([*others])
        )
    return inner


def join_qkv(state):
    """Layers attn.q, attn.k and attn.v of the same block become the one layer attn.qkv."""
    for key in [key for key in state if ".attn.q." in key]:
        names = [key.replace(".attn.q.", f".attn.{letter}.") for letter in "qkv"]
        if {*names} <= {*state}:
            joined = torch.cat([state.pop(name) for name in names])
            state[key.replace(".attn.q.", ".attn.qkv.")] = joined
    return state


def rename(state, table):
    """{key: tensor} with new keys: the regular expressions of a table {pattern: replacement}, one
    after the other."""
    for old, new in table.items():
        state = {re.sub(old, new, key): value for key, value in state.items()}
    return state


def compare(module, state, allow_missing=()):
    """The tensors of a state dict that fit a module, and how the two differ, in words or ""."""
    own = module.state_dict()
    # Batch counters matter only for cumulative averages, and old or converted weights lack them.
    missing = [
        k
        for k in own
        if k not in state and not _matches(k, ("*num_batches_tracked", *allow_missing))
    ]
    unexpected = [k for k in state if k not in own and not _matches(k, ("*num_batches_tracked",))]
    fitting = {k: v for k, v in state.items() if k in own and v.shape == own[k].shape}
    differing = [k for k in state if k in own and k not in fitting]
    shapes = [f"{k} {tuple(state[k].shape)} -> {tuple(own[k].shape)}" for k in differing]
    how = _listing("missing", missing) + _listing("unexpected", unexpected)
    how += _listing("of another shape", shapes)
    return fitting, how and f"{len(fitting)} keys match{how}"


def load_into(module, state, *, source, allow_missing=(), drop=()):
    """Copy a state dict into a module.

    Args:
        module: network, changed in place.
        state: {key: tensor}; `{"state_dict": ...}`, `{"model": ...}` and a prefix `module.` are
            unwrapped.
        source: what to call the weights in messages.
        allow_missing: patterns (`layer4.*`) of keys of the module that may keep their initial
            values.
        drop: patterns of keys of the weights that are not wanted (`fc.*`).
    Raises:
        WeightsError: keys that match neither side, or tensors of another shape.
    """
    state = without(unwrap(state, source), drop)
    fitting, how = compare(module, state, allow_missing)
    if how:
        hint = " Keys that may stay random are named by allow_missing: ['layer4.*']"
        known = "allow_missing" in inspect.signature(type(module)).parameters
        raise WeightsError(
            f"{source} does not fit {type(module).__name__}: {how}. Wrong network or options?"
            f"{hint * known}"
        )
    module.load_state_dict(fitting, strict=False)
    initial = [
        key
        for key in module.state_dict()
        if key not in fitting and not key.endswith("num_batches_tracked")
    ]
    logger.info(
        f"weights {source}: {len(fitting)} keys loaded, {len(initial)} keep their initial values"
        + _some(initial)
    )


def reach(url):
    """Raise OSError or HTTPException unless a server answers soon: libraries wait and retry
    longer."""
    with contextlib.suppress(HTTPError):  # it answers
        urlopen(Request(url, method="HEAD"), timeout=SECONDS).close()


def check_hub():
    """Where the Hugging Face hub does not answer, its library takes what it has stored, or fails at
    once."""
    from huggingface_hub import constants

    try:
        reach(constants.ENDPOINT)
    except (OSError, HTTPException):
        constants.HF_HUB_OFFLINE = True


def download(url):
    """The path of a file that is downloaded once into PyTorch's cache; a hash in its name is
    checked."""
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[1])
    if not path.is_file():
        hashed = re.search(r"-([0-9a-f]{8,})\.", path.name)
        try:
            reach(url)
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hashed and hashed[1])
        except (OSError, RuntimeError, HTTPException) as error:
            raise WeightsError(
                f"could not download {url} ({reason(error)}); give a local copy by weights=PATH, "
                "or take "
                "random weights by weights=none"
            ) from None
    return path


def same_names(state, module):
    return state


def load_pretrained(module, weights, url, *, allow_missing=(), drop=(), adapt=same_names):
    """The `weights` option of a backbone: "none", "imagenet" (downloaded from `url` once, then
    cached) or a path.

    `adapt` changes the state dict to the names of the module. It comes without `state_dict` and
    `module.` around it, and of a whole network, only the backbone. The module keeps these three
    options for `model.init`.
    """
    module.foreign = adapt, drop, allow_missing
    if weights == "none":
        return
    state = read(download(url) if weights == "imagenet" else weights)
    state = adapt(backbone_of(unwrap(state, weights), weights), module)
    load_into(module, state, source=str(weights), allow_missing=allow_missing, drop=drop)


def without(state, patterns):
    """A state dict without the keys of some patterns."""
    return {key: value for key, value in state.items() if not _matches(key, patterns)}


def _matches(key, patterns):
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _some(keys):
    return f" ({plain(', '.join(keys[:3]))}{', ...' if len(keys) > 3 else ''})" if keys else ""


def _listing(title, keys):
    return f"; {len(keys)} {title}{_some(keys)}" if keys else ""
