"""A Ray cluster of two nodes, all of it on this machine."""

import os


class Cluster:
    """Two nodes, one of which can be killed."""

    def __init__(self, cores: int) -> None:
        """Start it.

        Args:
            cores: that each node is told it has.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        from ray.cluster_utils import Cluster as Local

        self._cores = cores
        self._cluster = Local(initialize_head=True, head_node_args={"num_cpus": cores, "include_dashboard": False})
        self._node = self._cluster.add_node(num_cpus=cores)

    @property
    def address(self) -> str:
        """Where drivers find it."""
        return str(self._cluster.address)

    def kill_node(self) -> None:
        """End the node that is not the head, with all that runs there, and let another join."""
        self._cluster.remove_node(self._node, allow_graceful=False)
        self._node = self._cluster.add_node(num_cpus=self._cores)

    def stop(self) -> None:
        """End both."""
        self._cluster.shutdown()
