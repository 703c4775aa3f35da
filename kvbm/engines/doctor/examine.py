"""The whole examination: what can be looked at from here, then the child, then what its answers allow to compare."""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import uuid
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from kvbm.engines.doctor.child import STAND_IN, VLLM, findings_of, run_child
from kvbm.engines.doctor.disk import check_disk, compare_slabs, nearest_folder
from kvbm.engines.doctor.findings import Finding, State
from kvbm.engines.doctor.memory import check_host_memory, check_memlock, check_pages
from kvbm.engines.doctor.report import ChildReport
from kvbm.engines.doctor.setup import Setup, check_transfer
from kvbm.engines.doctor.sizes import check_sizes
from kvbm.engines.doctor.versions import check_versions, find_vllm

_COPY_S = 30.0
_ENGINE_SUBJECT = "engine"


def examine(setup: Setup, *, timeout_s: float = 300.0, command: Sequence[str] | None = None) -> list[Finding]:
    """Look at everything; see `exit_status` for what it means.

    Parameters
    ----------
    setup : Setup
    timeout_s : float
        Of the child with the engine.
    command : sequence of str, optional
        Of the child; default: vLLM where it is installed, else memory in its place.

    Notes
    -----
    Writes nothing outside folders of its own, below disk.path and in the place for temporary files, and a prefix of its
    own in an object store; they are removed.
    """
    version = find_vllm()
    found = [*check_versions(version, has_remote="remote" in setup.tiers), *check_transfer(setup)]
    disk = check_disk(setup)
    has_place = all(one.state is not State.UNSAFE for one in disk if one.subject == "disk")
    block_nbytes, num_groups = 0, 1
    engine: list[Finding] = []
    if not has_place:
        engine = [Finding(_ENGINE_SUBJECT, State.NOTE, "not started: the disk tier has no place", "see the row disk")]
    elif "host" not in setup.tiers:
        engine = [Finding(_ENGINE_SUBJECT, State.NOTE, "not started: there is no host tier", "see the row host tier")]
    else:
        with ExitStack() as stack:
            if command is None:
                command = STAND_IN if version is None else VLLM
            engine, report = _ask_child(setup, command, stack, has_engine=version is not None, timeout_s=timeout_s)
        num_groups = report.num_groups
        if setup.model:  # else it is a tiny one
            block_nbytes = report.block_nbytes
            wants_one_copy = (setup.transfer.get("kv_connector_extra_config") or {}).get("one_copy", True)
            setup = replace(setup, has_one_copy=wants_one_copy and report.has_one_copy)
    if block_nbytes:  # of blocks: only now can sizes in blocks be compared
        disk = check_disk(setup, block_nbytes=block_nbytes, num_groups=num_groups)
    host = setup.nbytes_of("host", block_nbytes=block_nbytes, num_groups=num_groups)
    return [
        *found,
        *check_sizes(setup, block_nbytes=block_nbytes, num_groups=num_groups),
        *check_host_memory(host),
        check_pages(setup),
        check_memlock(host),
        *disk,
        *engine,
    ]


def _ask_child(
    setup: Setup, command: Sequence[str], stack: ExitStack, *, has_engine: bool, timeout_s: float
) -> tuple[list[Finding], ChildReport]:
    """Run the child; give its findings and what it told."""
    folder = Path(tempfile.mkdtemp(prefix="kvbm-doctor-"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    slabs = folder / "slabs"
    if setup.disk_path is not None:
        slabs = Path(tempfile.mkdtemp(prefix=".kvbm-doctor-", dir=nearest_folder(setup.disk_path)))
        stack.callback(shutil.rmtree, slabs, ignore_errors=True)
    prefix = f"doctor-{uuid.uuid4().hex}"
    model = setup.model
    if has_engine and not model:
        model = str(make_tiny_model(folder / "model"))
    request: dict[str, Any] = {
        "transfer": {**setup.transfer, "kv_connector_extra_config": setup.golden_extra(str(slabs), prefix)},
        "engine": setup.engine,
        "model": model,
        "copy_timeout_s": min(_COPY_S, timeout_s / 4),
    }
    end = run_child(command, request, folder=folder, timeout_s=timeout_s)
    what = _ENGINE_SUBJECT if has_engine else "tiers"
    found = findings_of(end, what=what, timeout_s=timeout_s)
    if "remote" in setup.tiers and not end.report.is_complete and end.report.stage.startswith("golden"):
        text = f"objects may be left below the prefix {prefix}"
        found.append(Finding("remote", State.NOTE, text, "remove them by hand"))
    if has_engine and setup.model and setup.disk_path is not None:
        is_replaced = setup.sections["disk"].get("on_mismatch") == "replace"
        found += compare_slabs(setup.disk_path, slabs, is_replaced=is_replaced)
    if has_engine and not setup.model:
        advice = "give --model PATH, and --engine-args as the engine gets them, to look at the blocks of your model"
        found.append(Finding("model", State.NOTE, "a tiny one, made for this", advice))
    return found, end.report


def make_tiny_model(folder: Path) -> Path:
    """Write what an engine needs of a model whose weights it makes up: a configuration, and a file of no weights."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 1024,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    header = b"{}".ljust(8)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    return folder
