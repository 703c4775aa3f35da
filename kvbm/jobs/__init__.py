"""The language of the wall: jobs that bookkeeping sends, results that bytes answer, and the future a caller holds."""

from kvbm.jobs.channel import JobChannel, LocalChannel
from kvbm.jobs.future import Transfer, TransferState
from kvbm.jobs.messages import (
    CopyJob,
    ForgetJob,
    InventoryJob,
    Job,
    JobResult,
    Outcome,
    ProbeJob,
    TouchedJob,
    decode_job,
    decode_result,
    encode,
)

__all__ = [
    "CopyJob",
    "ForgetJob",
    "InventoryJob",
    "Job",
    "JobChannel",
    "JobResult",
    "LocalChannel",
    "Outcome",
    "ProbeJob",
    "TouchedJob",
    "Transfer",
    "TransferState",
    "decode_job",
    "decode_result",
    "encode",
]
