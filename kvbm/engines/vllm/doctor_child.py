"""The doctor's child with vLLM: an engine with made-up weights and few blocks of the model's own kind.

Run as a module with the name of a file that holds the request.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from kvbm.engines.doctor.report import ReportWriter
from kvbm.errors import KvbmError

_NUM_BLOCKS = 24  # of the engine: a few golden ones, and others beside them that must stay as they are
_FEW: dict[str, Any] = {
    "load_format": "dummy",
    "num_gpu_blocks_override": _NUM_BLOCKS,
    "kv_cache_memory_bytes": 1 << 30,  # of which only the blocks above are taken
    "max_model_len": -1,  # what these blocks hold
    "max_num_seqs": 1,
}
_SIZES = (
    "model",
    "kv_transfer_config",
    "max_num_batched_tokens",
    "gpu_memory_utilization",
)  # not the layout's business
_MODULE = "kvbm.engines.vllm.doctor_connector"
_NUM_LINES, _MAX_CHARACTERS = 3, 400  # of an error that are told


def main(path: str) -> None:
    """Do what the request asks for."""
    request = json.loads(Path(path).read_text(encoding="utf-8"))
    writer = ReportWriter(Path(request["report"]))
    try:
        _examine(request, writer)
    except Exception as error:
        writer.write("error", _text_of(error))
        raise
    writer.write("end", True)


def _examine(request: dict[str, Any], writer: ReportWriter) -> None:
    writer.begin("importing vLLM")
    from vllm import LLM
    from vllm.config import KVTransferConfig

    from kvbm.engines.vllm.doctor_connector import examine_worker
    from kvbm.engines.vllm.settings import hits_change_text

    writer.begin("starting the engine")
    transfer = {**request["transfer"], "kv_connector": "DoctorConnector", "kv_connector_module_path": _MODULE}
    arguments = {name: value for name, value in request["engine"].items() if name not in _SIZES}
    arguments = {"enforce_eager": True, "skip_tokenizer_init": True, **arguments, **_FEW}
    llm = LLM(model=request["model"], kv_transfer_config=KVTransferConfig(**transfer), **arguments)
    if hits_change_text(llm.llm_engine.vllm_config):
        writer.write("warnings", "vLLM turned its prefix cache off: a text behind a hit is another one; none is loaded")
    writer.begin("golden blocks from the engine's memory to the tiers and back")
    for answer in llm.collective_rpc(examine_worker, args=(request["copy_timeout_s"],)):
        for kind, values in answer.items():
            for value in values:
                writer.write(kind, value)
    writer.begin("ending the engine")
    llm.llm_engine.engine_core.shutdown()


def _text_of(error: BaseException) -> str:
    """Give the first lines of an error: of ours where one is in the chain, else of what was at its bottom."""
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None and cause not in chain:
        chain.append(cause)
    found = next((one for one in chain if isinstance(one, KvbmError)), chain[-1])
    lines = [line.strip() for line in (str(found) or repr(found)).splitlines()]
    return f"{type(found).__name__}: {' '.join([line for line in lines if line][:_NUM_LINES])[:_MAX_CHARACTERS]}"


if __name__ == "__main__":
    main(sys.argv[1])
