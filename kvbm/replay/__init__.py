"""Replays a request trace through the real manager, with real bytes that are checked on every hit."""

from kvbm.replay.concurrent import replay_concurrently
from kvbm.replay.generator import generate_conversations
from kvbm.replay.report import ReplayReport
from kvbm.replay.run import replay
from kvbm.replay.traces import TraceRequest, read_trace

__all__ = ["ReplayReport", "TraceRequest", "generate_conversations", "read_trace", "replay", "replay_concurrently"]
