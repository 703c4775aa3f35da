"""The workers of a fake engine: they make the calls of a step that vLLM's model runner makes, and look at every byte.

All ranks go through a layer before any begins the next, as ranks of one model do: what one of them computes from wrong
bytes is wrong on all.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Sequence
from typing import Any

from kvbm.testing.fake_engine.memory import RankMemory
from kvbm.testing.fake_engine.requests import ConnectorOutput, FakeRequest, Pass, Step
from kvbm.testing.fake_engine.shape import EngineShape


class Workers:
    """All ranks: their memory, and the workers' halves of a connector.

    Parameters
    ----------
    shape : EngineShape
    connectors : sequence of object
        One for each rank.
    """

    def __init__(self, shape: EngineShape, connectors: Sequence[Any]) -> None:
        self._shape = shape
        self._connectors = connectors
        self.memories = [RankMemory(shape, rank) for rank in range(len(connectors))]
        self._tensors = [memory.tensors() for memory in self.memories]
        self._finished_ids: set[str] = set()  # that the workers were told of
        self._num_missing: tuple[dict[str, int], dict[str, int]] = (
            {},
            {},
        )  # ranks that have not reported: sent, received
        self._failed_ids: set[str] = set()

    def register(self) -> None:
        """Hand the tensors over."""
        for connector, tensors in zip(self._connectors, self._tensors, strict=True):
            connector.register_kv_caches(dict(tensors))

    def execute(self, step: Step, begun: Callable[[], None] | None = None) -> ConnectorOutput:
        """Run a step on all ranks, and put together what they say.

        Parameters
        ----------
        step : Step
        begun : callable, optional
            Called when the loads of the step have begun, and its forward pass has not.

        Raises
        ------
        AssertionError
            A request read wrong bytes and no rank has said so, or somebody wrote to the engine's memory.
        """
        sent = pickle.dumps(step.output.kv_connector_metadata)
        for memory, connector in zip(self.memories, self._connectors, strict=True):
            one = pickle.loads(sent)
            memory.poison(step.stale)
            memory.open(step.opened)
            _call(connector, "handle_preemptions", one)
            memory.poison(step.fresh)
            memory.open(_sync_blocks(self._shape, step))
            connector.bind_connector_metadata(one)
            if step.output.has_sync_kv_loads:
                connector.start_load_kv(None)
        if begun is not None:
            begun()
        misled = self._forward(step) if step.passes else {}
        for connector in self._connectors:
            if not step.output.has_sync_kv_loads:
                connector.start_load_kv(None)
            connector.wait_for_save()
        self._finished_ids |= step.output.finished_req_ids
        outputs = [self._report(connector, step) for connector in self._connectors]
        output = self._put_together(outputs)
        self._judge(step, misled, output)
        return output

    def _forward(self, step: Step) -> dict[str, set[int]]:
        """Compute all layers; give for each request that read wrong bytes the blocks that they lay in."""
        misled: dict[str, set[int]] = {}
        for layer in range(self._shape.num_layers):
            for group in range(self._shape.num_groups):
                name = self._shape.layer_name(group, layer)
                found: list[tuple[str, set[int]]] = []
                for memory, connector, tensors in zip(self.memories, self._connectors, self._tensors, strict=True):
                    assert connector.has_connector_metadata(), "metadata is bound until the step is over"
                    connector.wait_for_layer_load(name)
                    for one in step.passes:
                        memory.write(one, group, layer, is_misled=one.request.request_id in misled)
                    for one in step.passes:
                        tokens = range(self._shape.first_in_window(group, one.tokens.start), one.tokens.start)
                        wrong = memory.wrong(one.request, group, tokens, one.tables[group], layer=layer)
                        found += [(one.request.request_id, wrong)] if wrong else []
                    connector.save_kv_layer(name, tensors[name], None)
                for request_id, wrong in found:
                    misled.setdefault(request_id, set()).update(wrong)
        return misled

    def _report(self, connector: Any, step: Step) -> ConnectorOutput:
        finished_ids = set(step.output.finished_req_ids)
        output = ConnectorOutput()
        if hasattr(connector, "get_transfer_results"):
            results = connector.get_transfer_results(finished_ids)
            output.finished_sending = set(results.finished_sending)
            output.finished_recving = set(results.finished_recving)
            output.failed_recving = set(results.failed_recving)
        else:
            sent, received = connector.get_finished(finished_ids)
            output.finished_sending, output.finished_recving = set(sent or ()), set(received or ())
        unknown = output.finished_sending - self._finished_ids
        assert not unknown, f"{sorted(unknown)} are reported as sent, but the workers were not told that they ended"
        stray = output.failed_recving - output.finished_recving
        assert not stray, f"{sorted(stray)} are reported as failed and not as received"
        output.invalid_block_ids = set(_call(connector, "get_block_ids_with_load_errors") or ())
        _call(connector, "get_kv_connector_stats")
        _call(connector, "get_kv_connector_kv_cache_events")
        report = _call(connector, "build_connector_worker_meta")
        output.kv_connector_worker_meta = pickle.loads(pickle.dumps(report))
        connector.clear_connector_metadata()
        return output

    def _put_together(self, outputs: Sequence[ConnectorOutput]) -> ConnectorOutput:
        """Add up what the ranks say, as vLLM's KVOutputAggregator does: a request counts when all have reported it."""
        whole = ConnectorOutput(finished_sending=set(), finished_recving=set())
        for output in outputs:
            for ids, num_missing, all_ids in zip(
                (output.finished_sending, output.finished_recving),
                self._num_missing,
                (whole.finished_sending, whole.finished_recving),
                strict=True,
            ):
                for request_id in ids or ():
                    num_missing[request_id] = num_missing.get(request_id, len(outputs)) - 1
                    if not num_missing[request_id]:
                        del num_missing[request_id]
                        assert all_ids is not None, "made above"
                        all_ids.add(request_id)
            whole.invalid_block_ids |= output.invalid_block_ids
            self._failed_ids |= output.failed_recving
            report = output.kv_connector_worker_meta
            if whole.kv_connector_worker_meta is None:
                whole.kv_connector_worker_meta = report
            elif report is not None:
                whole.kv_connector_worker_meta = whole.kv_connector_worker_meta.aggregate(report)
        whole.failed_recving = self._failed_ids & (whole.finished_recving or set())
        self._failed_ids -= whole.failed_recving
        whole.finished_sending = whole.finished_sending or None
        whole.finished_recving = whole.finished_recving or None
        return whole

    # -- bytes -------------------------------------------------------------------------------------------------

    def _judge(self, step: Step, misled: dict[str, set[int]], output: ConnectorOutput) -> None:
        """See that whoever read wrong bytes was told so, and take over what was loaded for this step."""
        written = {block for one in step.passes for block in _written(self._shape, one)}
        for request_id, blocks in misled.items():
            silent = blocks - output.invalid_block_ids - written
            assert not silent, f"{request_id} read wrong bytes in the blocks {sorted(silent)}, and nobody has said so"
            assert blocks & output.invalid_block_ids, f"{request_id} read wrong bytes, and nobody has said so"
        for one in step.passes:
            for group, table in enumerate(one.tables):
                tokens = _in_window(self._shape, group, one.sync_tokens)
                good = [t for t in tokens if table[t // self._shape.block_tokens] not in output.invalid_block_ids]
                for memory in self.memories if good else ():
                    memory.take(one.request, group, good, table)
        self.look()

    def look(self) -> None:
        """See that nobody but the engine has written to its memory."""
        for rank, memory in enumerate(self.memories):
            touched = memory.touched()
            assert not touched, f"rank {rank}: somebody wrote to the blocks {sorted(touched)}, which are not theirs"

    def take_received(self, request: FakeRequest, lost: set[int]) -> None:
        """See that the load of a request brought what it should, but for blocks that are known to be lost."""
        for rank, memory in enumerate(self.memories):
            for group, table in enumerate(request.tables):
                tokens = _in_window(self._shape, group, range(*request.promised))
                good = [token for token in tokens if table[token // self._shape.block_tokens] not in lost]
                wrong = memory.wrong(request, group, good, table)
                assert not wrong, f"{request} is reported as received, rank {rank} has wrong bytes in {sorted(wrong)}"
                memory.take(request, group, good, table)

    def check(self, request: FakeRequest, num_tokens: int) -> None:
        """See that what the next token of a request needs is there."""
        for rank, memory in enumerate(self.memories):
            for group, table in enumerate(request.tables):
                tokens = range(self._shape.first_in_window(group, num_tokens), num_tokens)
                wrong = memory.wrong(request, group, tokens, table)
                assert not wrong, f"{request}: rank {rank} has wrong bytes in the blocks {sorted(wrong)}"


def _call(connector: Any, name: str, *arguments: Any) -> Any:
    method = getattr(connector, name, None)
    return None if method is None else method(*arguments)


def _in_window(shape: EngineShape, group: int, tokens: range) -> range:
    """Give those of the tokens to be loaded that the next one reads."""
    return range(max(tokens.start, shape.first_in_window(group, tokens.stop)), tokens.stop) if tokens else range(0)


def _written(shape: EngineShape, one: Pass) -> set[int]:
    """Give the blocks that a pass writes to."""
    return {table[token // shape.block_tokens] for table in one.tables for token in one.tokens}


def _sync_blocks(shape: EngineShape, step: Step) -> list[int]:
    """Give the blocks that are loaded in a step, for itself."""
    return [
        block
        for one in step.passes
        for table in one.tables
        for block in dict.fromkeys(table[token // shape.block_tokens] for token in one.sync_tokens)
        if block
    ]
