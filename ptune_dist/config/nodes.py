"""`train.nodes`: what it is where it was `auto`, and the keys that only replicas have."""

from ptune_dist.config.schema import REPLICA_KEYS, Config, TrainConfig
from ptune_dist.errors import UserError


def with_nodes(config: Config, nodes: str) -> Config:
    """The config with `train.nodes: auto` as `nodes`. As one world it has no keys of replicas.

    Raises UserError where it asks for local steps, which change what is learned.
    """
    if config.train.nodes != "auto":
        return config
    if nodes == "one_world" and config.train.sync_every > 1:
        raise UserError(
            f"train.sync_every: {config.train.sync_every} needs replicas, a world of its own on each node, and this "
            "one is over several"
        )
    changes = {"nodes": nodes}
    if nodes == "one_world":
        changes |= {key: TrainConfig.model_fields[key].default for key in REPLICA_KEYS}
    return config.model_copy(update={"train": config.train.model_copy(update=changes)})
