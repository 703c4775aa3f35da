"""Events: what happened to which block, read from a store's outbox in the process.

Nothing is kept while nobody subscribes; a reader that falls behind gets one Gap and then asks the pool what it holds.
"""

from kvbm.events.hub import EventHub, EventSubscription
from kvbm.events.merged import MergedSubscription, MigrationLog, Migrations
from kvbm.events.types import KvEvent, KvEventType

__all__ = [
    "EventHub",
    "EventSubscription",
    "KvEvent",
    "KvEventType",
    "MergedSubscription",
    "MigrationLog",
    "Migrations",
]
