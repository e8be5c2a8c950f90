"""Agents: user code drives the conversation through an OpenAI client, and what the model saw and said is the sample."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miles_api.errors import HookResultError
from miles_api.rollout_types import GenerateFnInput, GenerateFnOutput
from miles_api.sample import Status
from miles_rollout.generate.session import Session
from miles_rollout.generate.session_samples import fill_samples, reward_samples
from miles_rollout.generate.session_server import SessionServer
from miles_rollout.state import State

if TYPE_CHECKING:
    from miles_api.loading.bind import BoundHook
    from miles_api.sample import Sample

__all__ = ["Agentic"]


class Agentic:
    """The generate hook `agentic`, built once: `--custom-agent-function-path` runs each conversation.

    The agent gets a `base_url` of its own. All it says and hears there becomes one sample, or several of one rollout
    where its conversations branch. What it returns is merged into their metadata; `reward` and `rewards` in it score
    them. `turns` counts a sample's answers.
    """

    def __init__(self) -> None:
        self._servers: dict[asyncio.AbstractEventLoop, SessionServer] = {}
        self._aborted = False

    async def __call__(self, input: GenerateFnInput) -> GenerateFnOutput:  # noqa: A002
        """Run the agent once and return its conversations, each as one sample.

        In evaluation it is the last conversation alone, so that each run of an agent counts once.
        """
        agent, sample = input.state.hooks.need("agent"), input.sample
        # An agent cannot be taken back to where it was: a sample that was begun starts anew.
        if sample.response_length:
            sample.reset_for_retry()
        if not input.state.aborted:
            self._aborted = False
        metadata, session = dict(sample.metadata), Session(input)
        started = time.perf_counter()
        async with self._server().serving(session) as base_url:
            result = await self._run(agent, input, session, base_url)
        sample.non_generation_time += time.perf_counter() - started - session.at_engines.seconds
        samples = _samples(agent, input, session, _checked(agent, input, session, result))
        if isinstance(input.state, State) and input.state.interrupts and session.aborted:
            # What the agent knew is lost.
            sample.reset_for_retry()
            sample.metadata = metadata
            samples = [sample]
        return GenerateFnOutput(samples=samples if len(samples) > 1 and not input.evaluation else samples[-1])

    async def aclose(self) -> None:
        """Stop the servers of the sessions."""
        servers, self._servers = self._servers, {}
        for loop, server in servers.items():
            if loop is asyncio.get_running_loop():
                await server.aclose()
            else:
                server.abandon()

    def _server(self) -> SessionServer:
        """Return the server of the running event loop: a rollout hook may run one for each rollout."""
        for loop in [loop for loop in self._servers if loop.is_closed()]:
            self._servers.pop(loop).abandon()
        return self._servers.setdefault(asyncio.get_running_loop(), SessionServer())

    async def _run(self, agent: BoundHook, request: GenerateFnInput, session: Session, base_url: str) -> Any:
        sample = request.sample
        try:
            return await agent.acall(None, base_url, sample.prompt, _request_kwargs(request), dict(sample.metadata))
        except asyncio.CancelledError:
            await self._abort(request)
            raise
        except Exception as error:
            if session.aborted:
                return None  # it was told that no more is generated; what there is stays
            error.add_note(f"on sample {sample.index}, after {session.turns} answers")
            # What an engine failed with says more than what the agent's client made of it.
            if session.error is not None:
                raise session.error from error
            raise

    async def _abort(self, request: GenerateFnInput) -> None:
        """Call `agent_abort` once when the rollout is aborted: its first cancelled agent does."""
        hook = request.state.hooks.one("agent_abort")
        if hook is None or not request.state.aborted or self._aborted:
            return
        self._aborted = True
        try:
            await hook.acall(None, request.args)
        except Exception as error:
            # The rollout is over, nobody waits for this call any more; the error is counted with the hook.
            print(f"warning: agent_abort hook {hook.reference} failed while a rollout was aborted: {error!r}")


def _request_kwargs(request: GenerateFnInput) -> dict[str, Any]:
    """Return what an agent passes on to `client.chat.completions.create(messages=…, **request_kwargs)`."""
    params = request.sampling_params
    return {
        "model": Path(request.args.hf_checkpoint).name,
        "temperature": params["temperature"],
        "top_p": params["top_p"],
        "max_tokens": params["max_new_tokens"],
    }


def _checked(agent: BoundHook, request: GenerateFnInput, session: Session, result: Any) -> dict[str, Any]:
    name = f"agent hook {agent.reference}"
    if session.error is not None:
        raise session.error
    if result is not None and not isinstance(result, dict):
        agent.stats.errors += 1
        raise HookResultError(f"{name} returned {type(result).__name__} for sample {request.sample.index}, not a dict")
    if session.turns == 0 and not session.aborted:
        agent.stats.errors += 1
        raise HookResultError(f"{name} returned without one request to its base_url, for sample {request.sample.index}")
    return result or {}


def _samples(agent: BoundHook, request: GenerateFnInput, session: Session, said: dict[str, Any]) -> list[Sample]:
    """Return what the session becomes, with what the agent said of it."""
    sample, leaves = request.sample, session.leaves()
    if not leaves:  # the rollout was over before the first answer
        sample.status = Status.ABORTED
        return [sample]
    skip = request.sampling_params.get("skip_special_tokens", True)
    samples = fill_samples(sample, leaves, request.state.tokenizer, skip_special=skip)
    try:
        said = reward_samples(samples, leaves, said, f"agent hook {agent.reference}")
    except HookResultError:
        agent.stats.errors += 1
        raise
    for made in samples:
        made.metadata |= said
    return samples
