"""Suites that third parties inherit to prove their own parts; needs the extra ``test`` (pytest, hypothesis).

`allocators.AllocatorTests`, `eviction_policies.EvictionPolicyTests`, `layouts.LayoutTests`,
`offload_policies.OffloadPolicyTests` and `storages.StorageTests` are classes of pytest tests: inherit, override the one
``make_`` method, and collect them. `pool_machine.PoolStateMachine` is a hypothesis state machine that drives a pool
beside a model of plain dicts.
"""
