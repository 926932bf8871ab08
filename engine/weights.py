"""Foreign weights into a network, with a report of every key.

A key that is missing, left over or of another shape is an error unless the caller expects it: a silent `strict=False`
is how a network ends up half random.
"""

import fnmatch
import logging
import re
import zipfile
from pathlib import Path

import torch

from engine.errors import UserError

logger = logging.getLogger("engine")

HEADS = (
    "decode_head.",
    "auxiliary_head.",
    "head.",
)  # beside `backbone.` in files of MMSegmentation and MMPretrain


class WeightsError(UserError):
    """Weights that cannot be read, or that do not fit the network; the message lists the keys."""


def read(path):
    """Read a file of tensors safely -> its content: PyTorch's or safetensors. Never runs code from the file.

    Raises:
        WeightsError: no such file, an incomplete file, or one that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"there is no file {path}")
    if path.suffix == ".safetensors":
        return read_safetensors(path)
    if zipfile.is_zipfile(path) and any(
        n.endswith("/constants.pkl") for n in zipfile.ZipFile(path).namelist()
    ):
        raise WeightsError(
            f"{path} is a TorchScript archive, as OpenAI published CLIP: it holds code and is not loaded. If you trust "
            "it, convert it once: torch.save(torch.jit.load(PATH, map_location='cpu').state_dict(), NEW_PATH)"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        with open(path, "rb") as file:
            known = file.read(2) in (
                b"PK",
                b"\x80\x02",
            )  # zip or pickle, not a web page or a git-lfs pointer
        if not known or (
            "weights_only" not in str(error).lower() and "weights only" not in str(error).lower()
        ):
            raise WeightsError(
                f"{path} is incomplete or not a PyTorch file ({type(error).__name__}: {error})"
            ) from None
    try:
        found = ", ".join(torch.serialization.get_unsafe_globals_in_checkpoint(path))
    except Exception:
        found = "objects of an older pickle format"
    raise WeightsError(
        f"{path} holds more than tensors and plain values ({found}) and is not loaded, since unpickling can run any "
        "code. If you trust it, convert it once: "
        "torch.save(torch.load(PATH, weights_only=False)['state_dict'], NEW_PATH)"
    )


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
        raise WeightsError(f"{path} is incomplete or not a safetensors file ({error})") from None


def unwrap(state):
    """{key: tensor} from what files hold: without `state_dict` or `model` around it and `module.` before the keys."""
    for wrapper in ("state_dict", "model"):
        state = state[wrapper] if wrapper in state and isinstance(state[wrapper], dict) else state
    return {key.removeprefix("module."): value for key, value in state.items()}


def backbone_of(state, source):
    """The backbone in a state dict of MMSegmentation: keys without `backbone.`, no heads; others are left alone."""
    if not any(key.startswith("backbone.") for key in state):
        return state
    kept = {
        key.removeprefix("backbone."): value
        for key, value in state.items()
        if not key.startswith(HEADS)
    }
    logger.info(
        f"weights {source}: of a whole network; {len(state) - len(kept)} keys of its heads are left out"
    )
    return kept


def rename(state, table):
    """{key: tensor} with new keys: the regular expressions of a table {pattern: replacement}, one after the other."""
    renamed = {}
    for key, value in state.items():
        for old, new in table.items():
            key = re.sub(old, new, key)
        renamed[key] = value
    return renamed


def load_into(module, state, *, source, allow_missing=(), drop=()):
    """Copy a state dict into a module.

    Args:
        module: network, changed in place.
        state: {key: tensor}; `{"state_dict": ...}`, `{"model": ...}` and a prefix `module.` are unwrapped.
        source: what to call the weights in messages.
        allow_missing: patterns (`layer4.*`) of keys of the module that may keep their initial values.
        drop: patterns of keys of the weights that are not wanted (`fc.*`).
    Raises:
        WeightsError: keys that match neither side, or tensors of another shape.
    """
    state = {key: value for key, value in unwrap(state).items() if not _matches(key, drop)}
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
    if missing or unexpected or differing:
        shapes = [f"{k} {tuple(state[k].shape)} -> {tuple(own[k].shape)}" for k in differing]
        raise WeightsError(
            f"{source} does not fit {type(module).__name__}: {len(fitting)} keys match"
            + _listing("missing", missing)
            + _listing("unexpected", unexpected)
            + _listing("of another shape", shapes)
            + ". Wrong network or options? Keys that may stay random are named by allow_missing: ['layer4.*']"
        )
    module.load_state_dict(fitting, strict=False)
    initial = [key for key in own if key not in fitting and not key.endswith("num_batches_tracked")]
    logger.info(
        f"weights {source}: {len(fitting)} keys loaded, {len(initial)} keep their initial values"
        + _some(initial)
    )


def load_pretrained(
    module, weights, url, *, allow_missing=(), drop=(), adapt=lambda state, module: state
):
    """The `weights` option of a backbone: "none", "imagenet" (downloaded from `url` once, then cached) or a path.

    `adapt` changes the state dict to the names of the module. It comes without `state_dict` and `module.` around it,
    and of a whole network of MMSegmentation, only the backbone.
    """
    if weights == "none":
        return
    if weights == "imagenet":
        try:
            state = torch.hub.load_state_dict_from_url(url, map_location="cpu", weights_only=True)
        except OSError as error:
            raise WeightsError(
                f"could not download {url} ({error}); give a local copy by weights=PATH"
            ) from None
    else:
        state = read(weights)
    state = adapt(backbone_of(unwrap(state), weights), module)
    load_into(module, state, source=str(weights), allow_missing=allow_missing, drop=drop)


def _matches(key, patterns):
    return any(fnmatch.fnmatchcase(key, pattern) for pattern in patterns)


def _some(keys):
    return f" ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})" if keys else ""


def _listing(title, keys):
    return f"; {len(keys)} {title}{_some(keys)}" if keys else ""
