"""What the four implementation packages promise each other: plain Structs in, plain Structs out, no Ray type.

A distribution offers an implementation under the entry-point group `miles.services`, named `rollout`, `engines`,
`router` or `train`; the object it names is called once with the resolved `RunConfig`. All methods block, and may be
called from any thread, one call at a time.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import msgspec

__all__ = ["Endpoint", "EngineFleet", "Placement", "RolloutService", "RouterService", "TrainService", "TrainStepReport"]


class Endpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One inference engine, as others reach it."""

    url: str
    """`http://host:port`, without a trailing slash."""
    node: str = ""
    """The host the engine runs on, as the cluster names it."""
    gpu_ids: tuple[int, ...] = ()
    tp_ranks: tuple[int, ...] = (0,)
    weight_version: str = ""
    """The version of the weights it serves; empty before the first synchronisation."""
    key: str = ""
    """Every request to it, but for `/health`, needs `Authorization: Bearer <key>`; empty where it asks for none. It is
    not for files, logs or messages: `repr` leaves it out."""

    def __repr__(self) -> str:
        shown = {name: getattr(self, name) for name in self.__struct_fields__ if name != "key"}
        return f"Endpoint({', '.join(f'{name}={value!r}' for name, value in shown.items())})"


class Placement(msgspec.Struct, frozen=True, kw_only=True):
    """Where one engine, or its part on one of several nodes, may run. Without GPUs it uses CPU threads."""

    node: str = ""
    """Address of the node, at which the engine must be reachable from the others; empty in a run of one machine."""
    gpu_ids: tuple[int, ...] = ()
    """Numbers of the GPUs on that node, as the driver of the GPU counts them; empty without GPUs."""
    node_rank: int = 0
    """Which part of an engine that spans `num_nodes` nodes this is; only part 0 answers requests."""
    num_nodes: int = 1
    dist_init_addr: str = ""
    """`host:port` at which the parts of an engine on several nodes meet; empty for an engine on one."""


class TrainStepReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one rollout's training reports back to the driver."""

    metrics: dict[str, float]
    """Scalars averaged over the optimizer steps of this rollout, by name (`train/loss`, `train/grad_norm`, …)."""
    seconds: dict[str, float]
    """Wall-clock seconds by phase (`log_probs`, `forward_backward`, `optimizer`)."""
    token_gaps: dict[str, Any] = {}
    """Where trainer and engines disagree about sampled tokens, as plain values: a line of `mismatch.jsonl`."""


@runtime_checkable
class EngineFleet(Protocol):
    """The inference engines of a run: started, paused and replaced together."""

    def start(self, placements: list[Placement]) -> None:
        """Start one engine for each placement; return when all answer `/health`, else raise `ServiceError`.

        A fleet in the process of one node gets the placements of that node alone. A part with a `node_rank` above 0 is
        started and watched like any other, and counts as ready as soon as it runs.
        """
        ...

    def endpoints(self) -> list[Endpoint]:
        """Return the address of each engine, in the order of the placements; parts above 0 have none."""
        ...

    def pause(self) -> None:
        """Stop admitting requests; those under way finish or abort, as the engine's mode says."""
        ...

    def resume(self) -> None: ...

    def dead(self) -> dict[int, str]:
        """Say which engines died by themselves, by index: how, and what they said last. Does not ask them."""
        ...

    def restart(self, index: int) -> Endpoint:
        """Replace a dead engine and return its new address; it serves no request before it has the weights.

        May be called for several engines at once, and while another thread is in `stop`, which makes it raise.
        """
        ...

    def stop(self) -> None: ...


@runtime_checkable
class RouterService(Protocol):
    """The one address that all generation goes through."""

    def start(self) -> str:
        """Start serving and return the base URL, else raise `ServiceError`."""
        ...

    def register(self, endpoint: Endpoint) -> None: ...

    def unregister(self, endpoint: Endpoint) -> None: ...

    def require_weights(self, version: str) -> None:
        """Send requests only to engines that serve these weights from now on, whoever registered them.

        Called after each weight synchronisation. An engine that serves others waits until it has caught up.
        """
        ...

    def report(self) -> list[dict[str, Any]]:
        """Say which hooks the router has, from where, and how they fared, for `hooks.json`."""
        ...

    def dead(self) -> str:
        """Say how the router died by itself and what it said last; an empty string while it runs. Does not ask it."""
        ...

    def restart(self) -> None:
        """Replace a dead router at the same URL; the new one knows no engine. Raises `ServiceError`."""
        ...

    def stop(self) -> None: ...


@runtime_checkable
class RolloutService(Protocol):
    """The one rollout process: data source, generation, rewards, filters, conversion."""

    def start(self, router_url: str) -> None: ...

    def generate(self, rollout_id: int, weight_version: str) -> dict[str, Any]:
        """Produce one rollout: `{"batch": TrainBatch, "metrics", "samples", "seconds", "hooks"}`.

        `samples` are a few, as plain dicts, to be shown; `hooks` says which hooks this process has and how they fared.
        """
        ...

    def evaluate(self, rollout_id: int, weight_version: str) -> dict[str, Any]:
        """Run the evaluation sets: `{"metrics", "samples", "hooks"}`."""
        ...

    def save(self, rollout_id: int, directory: str) -> None:
        """Write what the rollout process has come to (data source, buffer, error budget) below a staging directory.

        Raises `DataError` when it cannot be written; the checkpoint is then given up.
        """
        ...

    def load(self, rollout_id: int, directory: str) -> None:
        """Continue from what `save` wrote, after `start`; records of rollouts after `rollout_id` are cut.

        Raises `DataError` when it is missing or of another run; `--reset-data-source` does without.
        """
        ...

    def report(self) -> list[dict[str, Any]]:
        """Say which hooks this process has, from where, and how they fared, for `hooks.json`."""
        ...

    def stop(self) -> None: ...


@runtime_checkable
class TrainService(Protocol):
    """One trainer rank. The driver calls the same method on every rank at the same time."""

    def start(self) -> None:
        """Initialise the process group and load the model."""
        ...

    def train(self, rollout_id: int, batch: dict[str, Any]) -> TrainStepReport:
        """Train on this rank's shard of the columns."""
        ...

    def export(self, directory: str, weights_only: bool = False, checksums: bool = False) -> dict[str, str]:
        """Write the current weights as a Hugging Face directory, without tokenizer files if `weights_only`.

        With `checksums` it returns the hashes of the tensors that this rank wrote, by name, else nothing.
        """
        ...

    def score(self, tokens: list[list[int]]) -> list[list[float]]:
        """Return each sequence's log-probs after its first token, untempered; nothing where logits are not seen."""
        ...

    def save(self, rollout_id: int, directory: str) -> None:
        """Write weights, optimizer, schedule and random states below a staging directory, on a shared file system.

        Raises `DataError` when it cannot be written; the checkpoint is then given up.
        """
        ...

    def saved(self, rollout_id: int, checkpoint_dir: str, hf_checkpoint_dir: str | None) -> None:
        """Call the post-save hook on rank 0: the checkpoint was renamed into place."""
        ...

    def load(self, rollout_id: int, directory: str) -> None:
        """Continue from what `save` wrote, after `start`; `--no-load-optim` and `--no-load-rng` leave parts out.

        Raises `DataError` when it is missing or does not fit.
        """
        ...

    def offload(self, keep_weights: bool = False) -> dict[str, float]:
        """Move models and optimizers to host memory, but for the weights of the policy with `keep_weights`.

        Called with `--offload-train` when engines get the memory; a second call after one with `keep_weights` moves the
        rest. Returns `{"bytes", "seconds"}` of what this call moved.
        """
        ...

    def onload(self) -> dict[str, float]:
        """Bring back what `offload` moved, bit for bit; returns as it does."""
        ...

    def report(self) -> list[dict[str, Any]]:
        """Say which hooks this rank has, from where, and how they fared, for `hooks.json`."""
        ...

    def stop(self) -> None: ...
