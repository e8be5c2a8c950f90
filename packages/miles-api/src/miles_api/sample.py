"""`Sample`: one prompt, one response and everything known about them. Hooks read and change it freely."""

from __future__ import annotations

import copy
import math
from typing import Any, NoReturn

import msgspec

from miles_api.errors import ConfigError, SampleError
from miles_api.packing import codec
from miles_api.packing.packed import lazy_field
from miles_api.packing.sample_forms import COLUMNS, field_from_json, fields_to_json, pickled_fields, slots
from miles_api.sample_parts import PrefixCacheInfo, SpecInfo, Status

__all__ = ["PrefixCacheInfo", "Sample", "SpecInfo", "Status"]


class Sample(msgspec.Struct, kw_only=True, dict=True, eq=True):
    """One trajectory. Attributes beyond the declared ones may be set; they survive copy, deepcopy and pickle."""

    group_index: int | None = None
    """Which prompt of the run it belongs to; the samples of one prompt share it."""
    index: int | None = None
    """Its own number, unique in the run."""
    rollout_id: int | None = None
    """Which trajectory it is part of: the samples fanned out of one generation share it."""
    prompt: str | list[dict[str, Any]] = ""
    """The text given to the model, or chat messages."""
    tokens: list[int] = msgspec.field(default_factory=list)
    """Prompt ids followed by response ids."""
    multimodal_inputs: dict[str, Any] | None = None
    multimodal_train_inputs: dict[str, Any] | None = None
    response: str = ""
    """The text of the response."""
    response_length: int = 0
    """How many of the last `tokens` belong to the response."""
    label: Any = None
    """What the prompt file gives to compare with: any JSON value."""
    reward: float | dict[str, float] | None = None
    """The score, or several by name of which `--reward-key` picks one; None before scoring."""
    loss_mask: list[int] | None = None
    """One 0 or 1 for each response token; None trains on all."""
    weight_versions: list[str] = msgspec.field(default_factory=list)
    """The versions of the weights that generated it, oldest first."""
    weight_version_starts: list[int] = msgspec.field(default_factory=list)
    """At which response token each of `weight_versions` begins; shorter where an engine does not say."""
    engines: list[str] = msgspec.field(default_factory=list)
    """Which engines generated it, `host:port` in order of their first answer; empty where the router does not say."""
    rollout_log_probs: list[float] | None = None
    """The engine's log-prob of each response token, under the temperature-scaled distribution, in nats."""
    rollout_routed_experts: Any = None
    """Expert choices of a mixture-of-experts model, shape (len(tokens) - 1, layers, top_k)."""
    remove_sample: bool = False
    """True leaves it out of the loss; it still counts in advantage normalisation."""
    teacher_log_probs: list[float] | None = None
    """A teacher's log-prob of each response token, in nats."""
    status: Status = Status.PENDING
    metadata: dict[str, Any] = msgspec.field(default_factory=dict)
    """What the prompt file says besides prompt and label; hooks may add to it."""
    generate_function_path: str | None = None
    """A generate hook for this sample alone."""
    custom_rm_path: str | None = None
    """A reward hook for this sample alone."""
    train_metadata: dict[str, Any] | None = None
    """Passed on to the trainer's `metadata` column."""
    routing_key: str | None = None
    """Requests with equal keys prefer the same engine."""
    session_id: str | None = None
    non_generation_time: float = 0.0
    """Seconds spent outside the engine, in tools and environments."""
    spec_info: SpecInfo = msgspec.field(default_factory=SpecInfo)
    prefix_cache_info: PrefixCacheInfo = msgspec.field(default_factory=PrefixCacheInfo)

    @property
    def effective_response_length(self) -> int:
        """How many response tokens the loss counts."""
        return self.response_length if self.loss_mask is None else sum(self.loss_mask)

    @property
    def oldest_weight_version(self) -> str | None:
        """The version of the weights that generated its first token; None before generation."""
        return self.weight_versions[0] if self.weight_versions else None

    def get_reward_value(self, args: Any) -> float:
        """Return the reward as one number: `args.reward_key` picks from a dict.

        Raises `SampleError` if there is no reward, `ConfigError` if a dict comes without a key.
        """
        if self.reward is None:
            raise SampleError(f"{self._name()} has no reward")
        if not isinstance(self.reward, dict):
            return float(self.reward)
        if not args.reward_key:
            raise ConfigError(f"{self._name()} has rewards {sorted(self.reward)}: pick one with --reward-key")
        if args.reward_key not in self.reward:
            raise ConfigError(f"--reward-key {args.reward_key} is not among {sorted(self.reward)} of {self._name()}")
        return float(self.reward[args.reward_key])

    def validate(self) -> None:
        """Check that the fields agree with each other; raise `SampleError` naming the sample and the field."""
        if not 0 <= self.response_length <= len(self.tokens):
            self._fail("response_length", f"is {self.response_length} with {len(self.tokens)} tokens")
        for field in ("loss_mask", "rollout_log_probs", "teacher_log_probs"):
            column = getattr(self, field)
            if column is not None and len(column) != self.response_length:
                self._fail(field, f"has {len(column)} entries for {self.response_length} response tokens")
        if self.loss_mask is not None and not set(self.loss_mask) <= {0, 1}:
            self._fail("loss_mask", "holds values other than 0 and 1")
        values = self.reward.values() if isinstance(self.reward, dict) else [self.reward]
        for value in values:
            if value is not None and not (isinstance(value, int | float) and math.isfinite(value)):
                self._fail("reward", f"is {value!r}, not a finite number")
        bad = [x for x in self.rollout_log_probs or () if not math.isfinite(x)]
        if bad:
            self._fail("rollout_log_probs", f"holds {bad[0]}")

    def append_response_tokens(
        self,
        *given: Any,
        tokens: list[int] | None = None,
        log_probs: list[float] | None = None,
        text: str | None = "",
        trainable: bool = True,
        meta_info: dict[str, Any] | None = None,
        update_terminal_info: bool = True,
    ) -> None:
        """Append tokens to the response, `append_response_tokens(ids, log_probs=…)`; tool output is not `trainable`.

        Log-probs are in nats; tokens that were not generated get 0.0 once the sample has log-probs at all. `meta_info`
        is taken as by `update_from_meta_info`, without the status if `update_terminal_info` is false. slime's form,
        `append_response_tokens(args, tokens=ids, …)`, lets the mask and the log-probs grow in place.
        """
        new = list(given[-1] if tokens is None else tokens)
        in_place = tokens is not None or len(given) > 1
        self._check_new_log_probs(new, log_probs, trainable)
        if self.loss_mask is None and (self.response_length == 0 or not trainable):
            self.loss_mask = [1] * self.response_length
        if log_probs is not None and self.rollout_log_probs is None:
            self.rollout_log_probs = [0.0] * self.response_length
        self.tokens = self.tokens + new
        self.response_length += len(new)
        self.response += text or ""
        if self.loss_mask is not None:
            self.loss_mask = _grown(self.loss_mask, [int(trainable)] * len(new), in_place)
        if self.rollout_log_probs is not None:
            self.rollout_log_probs = _grown(self.rollout_log_probs, log_probs or [0.0] * len(new), in_place)
        if meta_info is not None:
            status = self.status
            self.update_from_meta_info(meta_info)
            self.status = self.status if update_terminal_info else status

    def _check_new_log_probs(self, new: list[int], log_probs: list[float] | None, trainable: bool) -> None:
        """Refuse log-probs that would leave the sample with some for a part of its generated tokens."""
        if log_probs is not None and len(log_probs) != len(new):
            self._fail("rollout_log_probs", f"gets {len(log_probs)} entries for {len(new)} tokens")
        generated = self.effective_response_length
        if log_probs is not None and self.rollout_log_probs is None and generated:
            self._fail("rollout_log_probs", f"is missing for the {generated} tokens generated before these")
        if log_probs is None and self.rollout_log_probs is not None and trainable and new:
            self._fail("rollout_log_probs", f"gets no entries for {len(new)} generated tokens")

    def strip_last_output_tokens(self, count: int, tokenizer: Any) -> None:
        """Remove the last `count` response tokens and decode the response anew.

        Routed experts are dropped: a blob cannot be cut here.
        """
        if not 0 <= count <= self.response_length:
            self._fail("response_length", f"is {self.response_length}: cannot strip {count}")
        if count == 0:
            return
        self.tokens = self.tokens[:-count]
        self.response_length -= count
        for field in ("loss_mask", "rollout_log_probs", "teacher_log_probs"):
            if getattr(self, field) is not None:
                setattr(self, field, getattr(self, field)[:-count])
        self.rollout_routed_experts = None
        self.response = tokenizer.decode(self.tokens[len(self.tokens) - self.response_length :])

    def reset_for_retry(self) -> None:
        """Forget the response, its engines, its score and its statistics; keep prompt, label, metadata and identity."""
        if self.response_length:
            self.tokens = self.tokens[: -self.response_length]
        fresh = Sample()
        for field in (
            "response", "response_length", "reward", "loss_mask", "weight_versions", "weight_version_starts", "engines",
            "rollout_log_probs", "rollout_routed_experts", "remove_sample", "teacher_log_probs", "status",
            "non_generation_time", "spec_info", "prefix_cache_info",
        ):  # fmt: skip
            setattr(self, field, getattr(fresh, field))

    def update_from_meta_info(self, *given: Any, meta_info: dict[str, Any] | None = None) -> None:
        """Take status, weight versions and counts from an engine's `meta_info`, the last argument.

        Called when the tokens have been appended: they are the last of the response.

        The engine that answered is named there, and router middleware that changed the tokens, which then stands in the
        metadata as `changed_tokens_by`.
        Hooks written for Miles or slime pass `args` before it.
        """
        meta_info = given[-1] if meta_info is None else meta_info
        kind = (meta_info.get("finish_reason") or {}).get("type")
        status = {"length": Status.TRUNCATED, "abort": Status.ABORTED, "stop": Status.COMPLETED}.get(str(kind))
        if status is None:
            self._fail("status", f"cannot follow from finish_reason {meta_info.get('finish_reason')!r}")
        self.status = status
        self._note_versions(meta_info)
        if (engine := meta_info.get("engine")) and engine not in self.engines:
            self.engines = [*self.engines, engine]
        if names := meta_info.get("changed_tokens_by"):
            names = list(dict.fromkeys([*self.metadata.get("changed_tokens_by", ()), *names]))
            self.metadata = {**self.metadata, "changed_tokens_by": names}
        self.prefix_cache_info.add(meta_info)
        if "spec_verify_ct" in meta_info:
            self.spec_info.add(meta_info)

    def _note_versions(self, meta_info: dict[str, Any]) -> None:
        """Append versions that the last answer brought, and at which response token each begins."""
        # After an update in the middle of a request, `weight_versions` lists every version with its token range.
        count, spans = meta_info.get("completion_tokens"), meta_info.get("weight_versions")
        if spans:
            count = spans[-1].get("end")
        for span in spans or [{"version": meta_info.get("weight_version"), "start": 0}]:
            version, start = span["version"], span.get("start")
            if version is None or self.weight_versions[-1:] == [str(version)]:
                continue
            self.weight_versions = [*self.weight_versions, str(version)]
            if count is not None and start is not None:
                begins = self.response_length - count + start
                self.weight_version_starts = [*self.weight_version_starts, begins]

    def to_dict(self) -> dict[str, Any]:
        """Return values that JSON holds without loss; attributes beyond the declared ones stand under `extra`.

        What JSON cannot hold (bytes, tuples, keys that are no text, NaN) stands as `{"$packed": …}`, which `from_dict`
        undoes. `WireError` names sample, attribute and type of what cannot be written down.
        """
        plain = fields_to_json(self, self._name())
        if self.__dict__:
            plain["extra"] = {k: codec.to_json(v, f"{self._name()}: {k}") for k, v in self.__dict__.items()}
        return plain

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sample:
        """Build a sample from `to_dict`'s form; keys that are no field become attributes.

        `SampleError` names the field whose value does not fit its type.
        """
        fields = {key: field_from_json(cls, key, value) for key, value in data.items() if key in cls.__struct_fields__}
        others = {key: value for key, value in data.items() if key not in fields and key != "extra"}
        sample = cls(**fields)
        extra = {**(data.get("extra") or {}), **others}
        sample.__dict__.update({key: codec.from_json(value, key) for key, value in extra.items()})
        return sample

    def __copy__(self) -> Sample:
        return _rebuild(slots(self), self.__dict__)

    def __deepcopy__(self, memo: dict[int, Any]) -> Sample:
        return _rebuild(copy.deepcopy(slots(self), memo), copy.deepcopy(self.__dict__, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (pickled_fields(self), dict(self.__dict__))

    def _name(self) -> str:
        return f"sample {self.index} (group {self.group_index})"

    def _fail(self, field: str, problem: str) -> NoReturn:
        raise SampleError(f"{self._name()}: {field} {problem}")


# Users of Miles write `Sample.Status.COMPLETED`; a Struct body cannot hold classes, so they are attached here.
Sample.Status = Status  # type: ignore[attr-defined]
Sample.SpecInfo = SpecInfo  # type: ignore[attr-defined]
Sample.PrefixCacheInfo = PrefixCacheInfo  # type: ignore[attr-defined]


def _grown(column: list[Any], more: list[Any], in_place: bool) -> list[Any]:
    if not in_place:
        return column + list(more)
    column.extend(more)
    return column


# Python code reads these fields through a property that unpacks them; C code of msgspec goes to the slot.
for _field in COLUMNS:
    setattr(Sample, _field, lazy_field(getattr(Sample, _field)))


def _rebuild(fields: dict[str, Any], extra: dict[str, Any]) -> Sample:
    sample = Sample(**fields)
    sample.__dict__.update(extra)
    return sample
