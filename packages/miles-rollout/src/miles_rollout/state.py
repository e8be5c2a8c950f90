"""What a running rollout shares among its generations: tokenizer, hooks, the connection to the router."""

from __future__ import annotations

import asyncio
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import aiohttp
import msgspec

from miles_api.errors import ServiceError
from miles_api.options import options_from
from miles_rollout.options import EngineFleetOptions, EvalOptions, RewardOptions, RolloutOptions
from miles_rollout.tokenizers import load_tokenizer

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.hookset import HookSet

__all__ = ["State"]

_HOOK_THREADS = 8
_ERROR_BODY = 500


class State:
    """The `GenerateState` of the default loop; lives in one event loop."""

    def __init__(self, args: Args, hooks: HookSet) -> None:
        self.args = args
        self.hooks = hooks
        self.tokenizer = load_tokenizer(args.hf_checkpoint)
        self.processor = None
        self.aborted = False
        self.rewards: RewardOptions = options_from(args, RewardOptions)
        self.options: RolloutOptions = options_from(args, RolloutOptions)
        fleet: EngineFleetOptions = options_from(args, EngineFleetOptions)
        self.concurrency = self.options.sglang_server_concurrency * fleet.rollout_num_engines
        self.executor = ThreadPoolExecutor(_HOOK_THREADS, thread_name_prefix="hook")
        self.sampling_params = _sampling_params(self.options, args.rollout_temperature)
        self.eval_sampling_params = _eval_params(self.sampling_params, options_from(args, EvalOptions))
        self._base_url = f"http://{args.sglang_router_ip}:{args.sglang_router_port}"
        self.headers = {"Content-Type": "application/json"}
        # The option belongs to miles-router; another router may stand in its place.
        if "router_token" in args and args.router_token:
            self.headers["Authorization"] = f"Bearer {args.router_token}"
        self._encode = msgspec.json.Encoder().encode
        self._decode = msgspec.json.Decoder().decode

    @functools.cached_property
    def generate_fn_semaphore(self) -> asyncio.Semaphore:
        """Bounds how many generations run at once, over all engines."""
        return asyncio.Semaphore(self.concurrency)

    @functools.cached_property
    def _session(self) -> aiohttp.ClientSession:
        connector = aiohttp.TCPConnector(limit=self.concurrency, keepalive_timeout=3600)
        timeout = aiohttp.ClientTimeout(total=self.options.generate_timeout)
        return aiohttp.ClientSession(connector=connector, timeout=timeout)

    async def post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        """POST JSON to the router; raise `ServiceError` with status and body when it is refused."""
        url = self._base_url + path
        try:
            async with self._session.post(url, data=self._encode(payload), headers=self.headers) as reply:
                body = await reply.read()
        except TimeoutError as error:
            raise ServiceError(
                f"{url} did not answer within --generate-timeout {self.options.generate_timeout}"
            ) from error
        except aiohttp.ClientError as error:
            raise ServiceError(f"{url}: {type(error).__name__}: {error}") from error
        if reply.status != 200:  # noqa: PLR2004
            raise ServiceError(f"{url} answered {reply.status}: {body[:_ERROR_BODY].decode(errors='replace')}")
        return self._decode(body)

    async def close(self) -> None:
        """Close the connections and the hook threads."""
        if "_session" in self.__dict__:
            await self._session.close()
        self.executor.shutdown(wait=False, cancel_futures=True)


def _sampling_params(options: RolloutOptions, temperature: float) -> dict[str, Any]:
    params: dict[str, Any] = {
        "temperature": temperature,
        "top_p": options.rollout_top_p,
        "top_k": options.rollout_top_k,
        "max_new_tokens": options.rollout_max_response_len,
        "skip_special_tokens": options.rollout_skip_special_tokens,
    }
    if options.rollout_stop:
        params["stop"] = options.rollout_stop
    if options.rollout_stop_token_ids:
        params["stop_token_ids"] = options.rollout_stop_token_ids
    return params


def _eval_params(training: dict[str, Any], options: EvalOptions) -> dict[str, Any]:
    params = {**training, "temperature": options.eval_temperature, "top_p": options.eval_top_p, "top_k": -1}
    if options.eval_max_response_len is not None:
        params["max_new_tokens"] = options.eval_max_response_len
    return params
