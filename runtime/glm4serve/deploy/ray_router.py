"""Ray Serve's router of requests to replicas, by the beginnings of their prompts. Ray loads it by its name."""

from __future__ import annotations

from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from glm4serve.deploy.routing import Holders, order


class PrefixRouter(RequestRouter):
    """Ranks replicas by :func:`glm4serve.deploy.routing.order`; a request's first argument is its blocks."""

    def initialize_state(self, busy: int) -> None:
        """busy: requests with which a replica's slots are all taken."""
        self._busy, self._holders = busy, Holders()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """One rank each, so that Ray takes the first that has room."""
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        lengths = self.replica_queue_len_cache
        loads = {id: lengths.get(replica.replica_id) or 0 for id, replica in replicas.items()}
        blocks = _blocks(pending_request)
        if pending_request is not None:
            # Where all are full Ray asks again at once, and for ever, unless it is told to wait between.
            pending_request.routing_context.should_backoff = True
        return [[replicas[id]] for id in order(blocks, self._holders.of(blocks, loads), loads, self._busy)]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any) -> None:
        """Its cache will hold the prompt."""
        self._holders.note(_blocks(pending_request), replica_id.unique_id)

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """So has its cache."""
        super().on_replica_actor_died(replica_id)
        self._holders.forget(replica_id.unique_id)


def _blocks(request: PendingRequest | None) -> tuple[bytes, ...]:
    return request.args[0] if request is not None and request.args else ()
