"""Everything but `/generate`: health, information, abort, pause, weights."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import msgspec

from miles_api.checksum import CHECKSUM
from miles_rollout.engines.local.errors import CheckpointError, UnsupportedModelError
from miles_rollout.engines.local.memory import Memory
from miles_rollout.engines.local.update import WeightUpdates
from miles_rollout.engines.local.weights import check_weights_dir, live_checksum
from miles_rollout.engines.protocol import (
    AbortRequest,
    DetokenizeRequest,
    PauseRequest,
    TokenizeRequest,
    UpdateFromDiskRequest,
    UpdateVersionRequest,
    WeightsCheckRequest,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from miles_rollout.engines.local.engine import Engine
    from miles_rollout.engines.local.jobs import Job
    from miles_rollout.engines.local.weights import Weights

__all__ = ["Control", "Route"]

T = TypeVar("T")
Answer = tuple[int, Any]
_PAUSE_MODES = ("abort", "retract", "in_place")


class Route(NamedTuple):
    """One endpoint."""

    methods: tuple[str, ...]
    handler: Callable[[bytes], Awaitable[Answer]]


class Control:
    """The engine's control endpoints. `info` is what `/server_info` says of the process (path, limits, …)."""

    def __init__(self, engine: Engine, info: dict[str, Any]) -> None:
        self.engine, self.info = engine, info
        self._scheduler = engine.scheduler
        self.memory = Memory(engine)
        self._updating = asyncio.Lock()
        self._source: Weights = Path(info["model_path"])
        """Where the live weights were read from; empty once they were released."""
        self._updates = WeightUpdates(self._scheduler.model, lambda: self._source, self._put, self._updating)

    def routes(self) -> dict[str, Route]:
        """Return every endpoint by path."""
        get, post, both = ("GET",), ("POST",), ("GET", "POST")
        return {
            "/health": Route(get, self.health),
            "/server_info": Route(get, self.server_info),
            "/get_server_info": Route(get, self.server_info),
            "/model_info": Route(get, self.model_info),
            "/get_model_info": Route(get, self.model_info),
            "/v1/models": Route(get, self.models),
            "/v1/loads": Route(get, self.loads),
            "/tokenize": Route(post, self.tokenize),
            "/detokenize": Route(post, self.detokenize),
            "/flush_cache": Route(both, self.flush_cache),
            "/abort_request": Route(post, self.abort_request),
            "/pause_generation": Route(post, self.pause_generation),
            "/continue_generation": Route(post, self.continue_generation),
            "/update_weights_from_disk": Route(post, self.update_weights_from_disk),
            "/update_weight_version": Route(post, self.update_weight_version),
            "/begin_weight_update": Route(post, self._updates.begin),
            "/end_weight_update": Route(post, self._updates.end),
            "/update_weights_from_tensor": Route(post, self._updates.from_tensor),
            "/init_weights_update_group": Route(post, self._updates.init_group),
            "/update_weights_from_distributed": Route(post, self._updates.from_distributed),
            "/destroy_weights_update_group": Route(post, self._updates.destroy_group),
            "/weights_checker": Route(post, self.weights_checker),
            "/release_memory_occupation": Route(post, self.release_memory),
            "/resume_memory_occupation": Route(post, self.memory.resume),
        }

    def abort_jobs(self, jobs: list[Job]) -> None:
        """Abort jobs whose client has gone."""
        gone = {id(job) for job in jobs}
        self.engine.call(lambda: self._tell(self._scheduler.abort(lambda job: id(job) in gone)))

    async def health(self, _: bytes) -> Answer:
        """Say whether the model loop runs, without asking it."""
        if self.engine.alive:
            return 200, {"status": "ok"}
        return 503, {"status": "dead", "message": repr(self.engine.dead)}

    async def server_info(self, _: bytes) -> Answer:
        """Describe the process and its load."""
        version = self._scheduler.weight_version
        return 200, {**self.info, "weight_version": version, "stages_weights": True, **self._load()}

    async def model_info(self, _: bytes) -> Answer:
        """Describe the model."""
        path = self.info["model_path"]
        version = self._scheduler.weight_version
        return 200, {"model_path": path, "tokenizer_path": path, "is_generation": True, "weight_version": version}

    async def models(self, _: bytes) -> Answer:
        """List the one model, in OpenAI's form."""
        path, longest = self.info["model_path"], self.info["max_total_len"]
        card = {"id": path, "object": "model", "owned_by": "miles", "root": path, "max_model_len": longest}
        return 200, {"object": "list", "data": [card]}

    async def loads(self, _: bytes) -> Answer:
        """Say how many requests run and wait."""
        return 200, {"loads": [{"dp_rank": 0, **self._load()}]}

    async def tokenize(self, body: bytes) -> Answer:
        """Return the tokens of a text, or of several."""
        request = _parse(body, TokenizeRequest)
        if isinstance(request, str):
            return _failed(request)
        texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
        ids = [self._scheduler.codec.encode(text, special=request.add_special_tokens) for text in texts]
        counts = [len(each) for each in ids]
        one = isinstance(request.prompt, str)
        found = {"tokens": ids[0], "count": counts[0]} if one else {"tokens": ids, "count": counts}
        return 200, {**found, "max_model_len": self.info["max_total_len"]}

    async def detokenize(self, body: bytes) -> Answer:
        """Return the text of some tokens, or of several lists of them."""
        request = _parse(body, DetokenizeRequest)
        if isinstance(request, str):
            return _failed(request)
        many = [each for each in request.tokens if isinstance(each, list)]
        one = [each for each in request.tokens if isinstance(each, int)]
        if many and one:
            return _failed("'tokens' is a list of tokens, or of such lists, not both")
        vocabulary = self._scheduler.model.vocab_size
        if any(not 0 <= token < vocabulary for each in (*many, one) for token in each):
            return _failed(f"'tokens' holds what is no token: they go from 0 to {vocabulary - 1}")
        texts = self._scheduler.codec.decode_many(many or [one], request.skip_special_tokens)
        return 200, {"text": texts if many else texts[0]}

    async def flush_cache(self, _: bytes) -> Answer:
        """Drop cached prompts and idle memory; refused while requests run or wait."""
        if await self._in_loop(self._scheduler.flush):
            return 200, {"success": True, "message": "Cache flushed."}
        return _failed(f"not flushed: {self._load()['num_total_reqs']} requests are running or waiting")

    async def abort_request(self, body: bytes) -> Answer:
        """Abort one request, by its id, or all."""
        request = _parse(body, AbortRequest)
        if isinstance(request, str):
            return _failed(request)
        if not request.rid and not request.abort_all:
            return _failed("give 'rid' or 'abort_all'")

        def chosen(job: Job) -> bool:
            base, _, tail = job.rid.rpartition("_")
            return request.abort_all or job.rid == request.rid or (base == request.rid and tail.isdigit())

        await self._in_loop(lambda: self._tell(self._scheduler.abort(chosen)))
        return 200, {"success": True}

    async def pause_generation(self, body: bytes) -> Answer:
        """Stop between two steps; new requests wait."""
        request = _parse(body or b"{}", PauseRequest)
        if isinstance(request, str):
            return _failed(request)
        if request.mode not in _PAUSE_MODES:
            return _failed(f"mode {request.mode!r} is not one of {', '.join(_PAUSE_MODES)}")
        await self._in_loop(lambda: self._tell(self._scheduler.pause(request.mode)))
        return 200, {"success": True, "status": "ok", "message": f"Generation paused ({request.mode})."}

    async def continue_generation(self, _: bytes) -> Answer:
        """Go on after a pause."""
        await self._in_loop(self._scheduler.resume)
        return 200, {"success": True, "status": "ok", "message": "Generation continues."}

    async def update_weights_from_disk(self, body: bytes) -> Answer:
        """Read and check a directory's weights beside the running loop, then swap them in between two steps.

        Within a session the swap is its end.
        """
        request = _parse(body, UpdateFromDiskRequest)
        if isinstance(request, str):
            return _failed(request)
        scheduler, session = self._scheduler, self._updates.session
        async with self._updating:
            if session is not self._updates.session:
                return _failed("the weight-update session in which this was asked for is over")
            try:
                directory = check_weights_dir(Path(request.model_path))
                commit = await asyncio.to_thread(scheduler.model.stage, directory)
            except (CheckpointError, UnsupportedModelError) as error:
                return _failed(str(error))
            if session is not None:
                session.keep(directory, commit, request)
            else:
                await self._put(commit, directory, request.weight_version, request.abort_all_requests)
        return 200, {"success": True, "message": "Weights updated.", "num_paused_requests": 0}

    async def update_weight_version(self, body: bytes) -> Answer:
        """Rename the weights."""
        request = _parse(body, UpdateVersionRequest)
        if isinstance(request, str):
            return _failed(request)

        def rename() -> None:
            if request.abort_all_requests:
                self._tell(self._scheduler.abort(lambda _: True))
            self._scheduler.set_version(request.new_version)

        await self._in_loop(rename)
        return 200, {"success": True, "message": "Weight version updated.", "new_version": request.new_version}

    async def weights_checker(self, body: bytes) -> Answer:
        """Hash the weights as they were read, and name live ones that differ from them; the loop goes on meanwhile."""
        request = _parse(body or b"{}", WeightsCheckRequest)
        if isinstance(request, str):
            return _failed(request)
        action = request.action
        if action != "checksum":
            return _failed(f"action {action!r} is not supported; only 'checksum' is")
        async with self._updating:
            if not self.memory.has_weights:
                return _failed("the engine has released its weights: resume and update them first")
            try:
                sums, stale = await asyncio.to_thread(live_checksum, self._scheduler.model, self._source)
            except CheckpointError as error:
                return _failed(f"the weights were read from files that are gone or damaged: {error}")
        return 200, {"success": True, "message": "", "checksums": sums, "checksum_of": CHECKSUM, "stale": stale}

    async def release_memory(self, body: bytes) -> Answer:
        """Give memory up; nobody reads or replaces the weights at the same time."""
        async with self._updating:
            answer = await self.memory.release(body)
            if not self.memory.has_weights:
                # What was sent is held for hashes and for what completes it: as much as the weights themselves.
                self._source, self._updates.session = {}, None
        return answer

    async def _put(self, commit: Callable[[], None], source: Weights, version: str | None, aborts: bool) -> None:
        """Swap staged weights in between two steps; `source` is what they were made from."""

        def swap() -> None:
            if aborts:
                self._tell(self._scheduler.abort(lambda _: True))
            self._scheduler.swap_weights(commit, version)
            self._scheduler.weights_arrived()

        await self._in_loop(swap)
        self._source = source

    def _load(self) -> dict[str, Any]:
        running, waiting = len(self._scheduler.batch), len(self._scheduler.waiting) + self.engine.queued
        return {
            "num_running_reqs": running,
            "num_waiting_reqs": waiting,
            "num_total_reqs": running + waiting,
            "paused": self._scheduler.paused,
        }

    def _tell(self, jobs: list[Job]) -> None:
        if jobs:
            self.engine.tell(jobs)

    async def _in_loop(self, function: Callable[[], T]) -> T:
        return await asyncio.wrap_future(self.engine.call(function))


def _failed(message: str) -> Answer:
    return 400, {"success": False, "message": message}


def _parse(body: bytes, kind: type[T]) -> T | str:
    """Decode a body, or say what is wrong with it."""
    try:
        return msgspec.json.decode(body, type=kind)
    except (msgspec.ValidationError, msgspec.DecodeError) as error:
        return str(error)
