"""Fingerprints: texts that say which model, and which bytes of it, a tier that outlives the process holds.

A model's is computed from its files: config whole, weights by name, size, time and a sample of their bytes, so it costs
milliseconds however large they are. A slab's adds what decides how a block's bytes look. Salt, LoRA and weights epoch
are in the sequence hashes, never here. Nothing of a path or a machine goes in, so workers with the same files agree.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from pathlib import Path
from typing import Any

from kvbm.errors import ConfigError
from kvbm.layout import BlockLayout

_log = logging.getLogger("kvbm.fingerprint")

MAX_FINGERPRINT_NBYTES = 2000
WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npz", ".h5", ".msgpack", ".tensors", ".onnx", ".engine",
)  # fmt: skip

_CONFIG_SUFFIXES = (".json", ".py")  # code beside the config may be what computes the KV
_BESIDE_THE_MODEL = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "generation_config", "chat_")
_WHOLE_NBYTES = 4 << 20  # config files are read whole up to this
_SAMPLE_NBYTES = 4096
_NUM_SAMPLES = 4  # of a file: its start, where safetensors say what is where, its end, and two between
_MAX_VALUE_NBYTES = 400
_BLOB_NAME = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")  # a Hugging Face cache names a blob by the digest of its bytes


def find_fingerprint(model: str) -> str:
    """Give the fingerprint that a setting means: that of the model in a directory, or the text itself.

    Parameters
    ----------
    model : str
        The path of a directory with a config.json, or any text.

    Raises
    ------
    ConfigError
        As `model_fingerprint`.
    """
    folder = Path(model)
    config = folder / "config.json"
    try:
        is_model, is_folder = config.is_file() or config.is_symlink(), folder.is_dir()
    except PermissionError as error:
        raise _unreadable(config, error) from error
    except (OSError, ValueError):  # too long for a path, or it has a NUL
        return model
    if is_model:
        fingerprint = model_fingerprint(folder)
        _log.info("model fingerprint computed path=%s fingerprint=%s", model, fingerprint)
        return fingerprint
    if is_folder:
        _log.warning("model %s is a directory without config.json: its path stands for the model", model)
    return model


def model_fingerprint(path: str | os.PathLike[str], *, revision: str | None = None) -> str:
    """Compute the fingerprint of a model from its files.

    Parameters
    ----------
    path : path
        Directory with config.json and weight files (`WEIGHT_SUFFIXES`), as engines load it. Folders in it do not count.
    revision : str, optional
        Default: the one in the path of a Hugging Face cache.

    Returns
    -------
    str
        "model-v1,type=...,revision=...,dtype=...,quantisation=...,config=DIGEST,weights=DIGEST": ASCII, under 400
        bytes. Tokenizers, chat templates and generation defaults do not count; code beside the config does.

    Raises
    ------
    ConfigError
        There is no config.json, it is no JSON object, there are no weight files, or a file cannot be read.

    Notes
    -----
    Reads a few pages of each weight file. Another time of modification is another fingerprint: changed bytes that keep
    name, size and time are noticed only where a sample meets them. In a Hugging Face cache the blob's name, a digest of
    its bytes, stands for the time: two workers that fetched the same model agree.

    Examples
    --------
    >>> import json, tempfile
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     _ = Path(folder, "config.json").write_text(json.dumps({"model_type": "llama", "torch_dtype": "bfloat16"}))
    ...     _ = Path(folder, "model.safetensors").write_bytes(bytes(1000))
    ...     model_fingerprint(folder)
    'model-v1,type=llama,revision=,dtype=bfloat16,quantisation=none,config=...,weights=...'
    """
    folder = Path(path)
    names = _names_in(folder)
    if "config.json" not in names:
        raise ConfigError(f"{folder} has no config.json: give the directory of a model, or any text that names it")
    weight_names = [name for name in names if name.endswith(WEIGHT_SUFFIXES)]
    if not weight_names:
        raise ConfigError(
            f"{folder} has a config.json and no weight files ({', '.join(WEIGHT_SUFFIXES)}): give a text that names "
            "the model instead"
        )
    config = _read_json(folder / "config.json")
    quantisation = _quantisation_of(config)
    config_digest = hashlib.blake2b(digest_size=16, person=b"kvbm-config-v1")
    for name in names:
        if name.endswith(_CONFIG_SUFFIXES) and not name.startswith(_BESIDE_THE_MODEL):
            _add(config_digest, name.encode(errors="surrogateescape"), _content_of(folder / name))
            if quantisation == "none" and "quant" in name and name.endswith(".json"):
                quantisation = _quantisation_of({"quantization_config": _read_json(folder / name)})
    weights_digest = hashlib.blake2b(digest_size=16, person=b"kvbm-weights-v1")
    for name in weight_names:
        _add(weights_digest, name.encode(errors="surrogateescape"), *_describe(folder / name))
    parts = {
        "type": config.get("model_type"),
        "revision": _revision_of(folder) if revision is None else revision,
        "dtype": config.get("torch_dtype", config.get("dtype")),
        "quantisation": quantisation,
    }
    plain = [f"{key}={_plain(value)}" for key, value in parts.items()]
    return ",".join(
        ["model-v1", *plain, f"config={config_digest.hexdigest()}", f"weights={weights_digest.hexdigest()}"]
    )


def slab_fingerprint(
    model: str | None,
    layout: BlockLayout,
    *,
    kernel_variant: str = "",
    rank: int = 0,
    num_ranks: int = 1,
    hash_algorithm: str = "kvbm-root-v1",
    hash_seed: str = "",
) -> str:
    """Say whose bytes a slab or an object store holds, and how they lie in a block.

    Parameters
    ----------
    model : str, optional
        The model's fingerprint; None where nobody gave one.
    layout : BlockLayout
        Of the tier; how many blocks it has does not count, nor where they lie in memory.
    kernel_variant : str
        Of the engine's attention kernel, where it decides what is in a block.
    rank, num_ranks : int
        Of this worker's shard.
    hash_algorithm, hash_seed : str
        How sequence hashes were made: ours, or an engine's.

    Returns
    -------
    str
        "key=value; key=value; ...": printable ASCII, at most `MAX_FINGERPRINT_NBYTES` bytes. Equal texts mean
        interchangeable bytes. A value longer than 400 bytes ends in its digest.

    Raises
    ------
    ConfigError
        The rank lies outside 0..num_ranks - 1.

    Examples
    --------
    >>> layout = BlockLayout.fully_contiguous(
    ...     num_blocks=4, num_layers=2, outer_dim=2, block_size=16, inner_dim=8, dtype="float16"
    ... )
    >>> slab_fingerprint("llama", layout).split("; ")[:4]
    ['kvbm-slab-v1', 'model=llama', 'dtype=float16', 'layers=2']
    """
    if not 0 <= rank < num_ranks:
        raise ConfigError(f"rank is {rank} of {num_ranks}, give 0 to {max(0, num_ranks - 1)}")
    parts = {
        "model": model or "",
        "dtype": layout.dtype,
        "layers": layout.num_layers,
        "outer": layout.outer_dim,
        "tokens": layout.block_size,
        "inner": layout.inner_dim,
        "heads": layout.num_heads,
        "block_nbytes": layout.block_nbytes,
        "order": ",".join(layout.region_order),
        "kernel": kernel_variant,
        "rank": f"{rank}/{num_ranks}",
        "hash": hash_algorithm,
        "seed": hash_seed,
    }
    return "; ".join(["kvbm-slab-v1", *(f"{key}={_bounded(str(value))}" for key, value in parts.items())])


# -- files -----------------------------------------------------------------------------------------------------


def _names_in(folder: Path) -> list[str]:
    """List what lies in a directory, links too, in an order that does not depend on the file system."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entry.name for entry in entries if entry.is_symlink() or entry.is_file())
    except OSError as error:
        raise _unreadable(folder, error) from error


def _describe(path: Path) -> list[bytes]:
    """Give a weight file's size, what stands for its time, and samples of its bytes."""
    blob = _blob_name_of(path)
    try:
        with path.open("rb", buffering=0) as file:
            status = os.fstat(file.fileno())
            nbytes = status.st_size
            last = max(0, nbytes - _SAMPLE_NBYTES)
            places = sorted({last * i // (_NUM_SAMPLES - 1) for i in range(_NUM_SAMPLES)})
            samples = []
            for place in places:
                file.seek(place)
                samples.append(file.read(_SAMPLE_NBYTES))
    except OSError as error:
        raise _unreadable(path, error) from error
    return [b"%d" % nbytes, blob.encode() if blob else b"%d" % status.st_mtime_ns, *samples]


def _content_of(path: Path) -> bytes:
    try:
        if path.stat().st_size > _WHOLE_NBYTES:
            return b"\0".join(_describe(path))
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _blob_name_of(path: Path) -> str:
    """Give the name of the blob that a file of a Hugging Face cache is a link to; "" for any other file."""
    try:
        target = path.readlink() if path.is_symlink() else None
    except OSError as error:
        raise _unreadable(path, error) from error
    if target is None or target.parent.name != "blobs" or not _BLOB_NAME.fullmatch(target.name):
        return ""
    return target.name


def _revision_of(folder: Path) -> str:
    """Give the commit in models--ORGANISATION--NAME/snapshots/COMMIT."""
    real = folder.resolve()
    is_cache = real.parent.name == "snapshots" and real.parent.parent.name.startswith("models--")
    return real.name if is_cache else ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not JSON ({error}): the model is not whole, fetch it again") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} is not a JSON object: the model is not whole, fetch it again")
    return content


def _quantisation_of(config: dict[str, Any]) -> str:
    section = config.get("quantization_config", config.get("quantization"))
    if not isinstance(section, dict):
        return str(section) if section else "none"
    for key in ("quant_method", "quant_algo", "quant_type"):
        if section.get(key):
            return str(section[key])
    inner = section.get("quantization")
    return _quantisation_of({"quantization": inner}) if isinstance(inner, dict) else "unnamed"


def _unreadable(path: Path, error: OSError) -> ConfigError:
    reason = (error.strerror or str(error)).lower()
    return ConfigError(
        f"cannot read {path} for the model's fingerprint: {reason}; make it readable, or give a text that names the "
        "model instead of its path"
    )


# -- text ------------------------------------------------------------------------------------------------------


def _add(digest: Any, *parts: bytes) -> None:
    """Feed parts so that no other division of the same bytes gives the same digest."""
    digest.update(b"%d:" % len(parts))
    for part in parts:
        digest.update(b"%d:" % len(part))
        digest.update(part)


def _plain(value: Any) -> str:
    """Make a short word of what a config says; what it loses is in the config's digest."""
    return "" if value is None else re.sub(r"[^A-Za-z0-9._+-]", "_", str(value))[:64]


def _bounded(value: str) -> str:
    """Escape what would end a value or not print, and shorten it to something that still tells texts apart."""
    raw = value.encode(errors="surrogatepass")
    text = "".join(chr(byte) if 32 <= byte < 127 and byte not in b";%" else f"%{byte:02X}" for byte in raw)
    if len(text) <= _MAX_VALUE_NBYTES:
        return text
    digest = hashlib.blake2b(raw, digest_size=16, person=b"kvbm-value-v1").hexdigest()
    return f"{text[:100]}...%({digest})"  # no other text has this bracket behind a percent sign
