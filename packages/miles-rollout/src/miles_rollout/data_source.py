"""The default data source: prompts of a JSONL file in epochs, groups that came back first."""

from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from miles_api.errors import ConfigError, DataError, HookResultError
from miles_api.loading.hookset import HookSet
from miles_api.options import options_from
from miles_api.packing.packed import ArrayBlob
from miles_api.sample import Sample
from miles_rollout.jsonl import Prompt, read_prompts, rendered, takes_messages
from miles_rollout.options import DataOptions
from miles_rollout.pristine import copied
from miles_rollout.tokenizers import encode, load_prompt_tokenizer

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.rollout_types import Group

__all__ = ["RolloutDataSourceWithBuffer", "pop_first"]

_STATE_FILE = "data_source.json"
_WAY_OUT = "--reset-data-source begins with the first prompt"


def pop_first(args: Args, rollout_id: int | None, buffer: list[Group], num_samples: int) -> list[Group]:
    """Take the oldest groups of the buffer."""
    taken = buffer[:num_samples]
    del buffer[:num_samples]
    return taken


class RolloutDataSourceWithBuffer:
    """Hand out groups of pending samples: first those that came back, then the file's prompts, epoch after epoch."""

    def __init__(self, args: Args) -> None:
        self._args = args
        options: DataOptions = options_from(args, DataOptions)
        if options.prompt_data is None:
            raise ConfigError("--prompt-data is not set: name a JSONL file of prompts")
        self._path = options.prompt_data
        self._shuffle = options.rollout_shuffle
        tokenizer = load_prompt_tokenizer(args.hf_checkpoint) if options.apply_chat_template else None
        self._prompts = self._short_enough(read_prompts(self._path, options, tokenizer, messages=takes_messages(args)))
        self._hooks = HookSet(args, ["buffer_filter"])
        self._buffer_filter = self._hooks.need("buffer_filter")
        self.rollout_id: int | None = None
        """The rollout that prompts are handed out for, once one runs; the buffer filter gets it."""
        self._buffer: list[Group] = []
        self._epoch = 0
        self._position = 0
        self._next_group = 0
        self._next_sample = 0
        self._order = self._order_of(0)

    def _short_enough(self, prompts: list[Prompt]) -> list[Prompt]:
        limit = self._args.rollout_max_prompt_len
        if limit is None:
            return prompts
        tokenizer = load_prompt_tokenizer(self._args.hf_checkpoint)
        kept = [p for p in prompts if len(encode(tokenizer, self._shown(tokenizer, p))) <= limit]
        if not kept:
            raise DataError(f"{self._path}: all {len(prompts)} prompts exceed --rollout-max-prompt-len {limit}")
        if len(kept) < len(prompts):
            print(f"data: {len(prompts) - len(kept)} of {len(prompts)} prompts exceed --rollout-max-prompt-len {limit}")
        return kept

    def _shown(self, tokenizer: Any, prompt: Prompt) -> str:
        """Return a prompt as the model will see it; what tools add to chat messages is not known here."""
        if isinstance(prompt.prompt, str):
            return prompt.prompt
        options: DataOptions = options_from(self._args, DataOptions)
        return rendered(tokenizer, prompt.prompt, None, options, f"{self._path}: --rollout-max-prompt-len")

    def _order_of(self, epoch: int) -> list[int]:
        order = list(range(len(self._prompts)))
        if self._shuffle:
            random.Random(f"{self._args.rollout_seed}/{epoch}").shuffle(order)
        return order

    def report(self) -> list[dict[str, Any]]:
        """Say how the buffer filter fared, for `hooks.json`."""
        return self._hooks.report()

    def get_buffer_length(self) -> int:
        """Return how many groups wait to be handed out again."""
        return len(self._buffer)

    def get_samples(self, num_samples: int) -> list[Group]:
        """Return `num_samples` groups of `--n-samples-per-prompt` pending samples."""
        groups: list[Group] = []
        if self._buffer:
            groups = self._from_buffer(num_samples)
        return groups + [self._new_group() for _ in range(num_samples - len(groups))]

    def _from_buffer(self, most: int) -> list[Group]:
        """Let the buffer filter pick groups; it has to take them out of the buffer."""
        hook, before = self._buffer_filter, len(self._buffer)
        taken = hook(self._args, self.rollout_id, self._buffer, most)
        who = f"buffer_filter hook {hook.reference}"
        if not isinstance(taken, list) or len(taken) > most:
            got = f"{len(taken)} groups" if isinstance(taken, list) else type(taken).__name__
            raise HookResultError(f"{who} returned {got}; up to {most} groups were asked for")
        if len(self._buffer) > before - len(taken):
            raise HookResultError(f"{who} returned {len(taken)} groups that it left in the buffer")
        return taken

    def _new_group(self) -> Group:
        if self._position == len(self._order):
            self._epoch += 1
            self._position = 0
            self._order = self._order_of(self._epoch)
        prompt = self._prompts[self._order[self._position]]
        self._position += 1
        group: Group = []
        for _ in range(self._args.n_samples_per_prompt):
            group.append(
                Sample(
                    group_index=self._next_group, index=self._next_sample, rollout_id=self._next_sample,
                    prompt=copied(prompt.prompt), label=copied(prompt.label), metadata=copied(prompt.metadata),
                )
            )  # fmt: skip
            self._next_sample += 1
        self._next_group += 1
        return group

    def add_samples(self, samples: list[Group]) -> None:
        """Put groups back; they are handed out before new prompts."""
        self._buffer.extend(samples)

    def save(self, rollout_id: int) -> None:
        """Write position and buffer to `args.save`/data_source.json."""
        state = {
            "rollout_id": rollout_id,
            "prompt_data": self._path,
            "prompts": len(self._prompts),
            "epoch": self._epoch,
            "position": self._position,
            "next_group": self._next_group,
            "next_sample": self._next_sample,
            "buffer": [[_plain(item) for item in group] for group in self._buffer],
        }
        Path(self._args.save, _STATE_FILE).write_bytes(msgspec.json.encode(state))

    def load(self, rollout_id: int | None = None) -> None:
        """Restore what `save` wrote, from `args.load`; `DataError` if it is missing or of another prompt file."""
        file = Path(self._args.load, _STATE_FILE)
        if not file.is_file():
            raise DataError(f"checkpoint {self._args.load} holds no {_STATE_FILE}; {_WAY_OUT}")
        state = msgspec.json.decode(file.read_bytes())
        if state["prompts"] != len(self._prompts):
            raise DataError(
                f"{file} was written for {state['prompts']} prompts of {state['prompt_data']}, "
                f"{self._path} has {len(self._prompts)}; {_WAY_OUT}"
            )
        self._epoch, self._position = state["epoch"], state["position"]
        self._next_group, self._next_sample = state["next_group"], state["next_sample"]
        self._order = self._order_of(self._epoch)
        self._buffer = [[_sample(item) for item in group] for group in state["buffer"]]


def _plain(item: Sample | list[Sample]) -> Any:
    return [_one_plain(one) for one in item] if isinstance(item, list) else _one_plain(item)


def _one_plain(sample: Sample) -> dict[str, Any]:
    """Return the sample as JSON holds it; routed experts in an array come back as an `ArrayBlob`."""
    experts = sample.rollout_routed_experts
    if hasattr(experts, "__array_interface__") and not isinstance(experts, ArrayBlob):
        sample = copy.copy(sample)
        sample.rollout_routed_experts = ArrayBlob.of(experts)
    return sample.to_dict()


def _sample(item: Any) -> Sample | list[Sample]:
    return [Sample.from_dict(one) for one in item] if isinstance(item, list) else Sample.from_dict(item)
