"""DAPO's soft overlong punishment: a ramp before the longest response, not a cliff (arXiv 2503.14476, section 3.4).

With L response tokens, of at most L_max, the last C of which are the cache:

                          0                        L ≤ L_max − C
    reward += penalty ×   (L_max − C − L) / C      L_max − C < L ≤ L_max
                          −1                       L_max < L

A `reward_post_process` hook, because that is after all else that reads rewards. Whatever scored the samples (--rm-type,
--rm-weights, remote_rm, group rewards, dicts), dynamic filters and evaluation see plain accuracy, no sample is
changed, and the default post-processing (centred within groups, or as the run's flags say) gets the punished rewards.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Annotated

import msgspec

from miles_api.errors import ConfigError
from miles_api.loading.load import provider

if TYPE_CHECKING:
    from miles_api.args import Args
    from miles_api.sample import Sample

__all__ = ["OverlongOptions", "SoftOverlongPunishment"]


class OverlongOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Where the punishment begins, where it ends, and how much it is."""

    overlong_cache: Annotated[int, msgspec.Meta(ge=1)]
    """Response tokens before the longest response over which the punishment grows; the paper has 4096 of 20480."""
    overlong_max_len: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Response tokens from which on the punishment is whole; default: --rollout-max-response-len."""
    overlong_penalty: Annotated[float, msgspec.Meta(gt=0)] = 1.0
    """The whole punishment, subtracted from the reward; 1 fits rewards of 0 and 1, or of -1 and 1."""


class SoftOverlongPunishment:
    """Subtract the punishment from each reward, and hand over to the default reward post-processing."""

    options = OverlongOptions

    def __init__(self, args: Args) -> None:
        """Raise `ConfigError` for a cache longer than the longest response."""
        self._longest = args.overlong_max_len or args.rollout_max_response_len
        self._cache, self._penalty = args.overlong_cache, args.overlong_penalty
        if self._cache > self._longest:
            raise ConfigError(
                f"--overlong-cache {self._cache} is longer than the longest response, {self._longest} tokens: pass "
                f"at most {self._longest}, or set --overlong-max-len"
            )
        self._normalise = provider("miles.defaults", "reward_post_process")

    def __call__(self, args: Args, samples: list[Sample]) -> tuple[list[float], list[float]]:
        """Return the plain rewards, and the punished ones after post-processing. Called once a rollout."""
        plain = [sample.get_reward_value(args) for sample in samples]
        punished = [self._punished(sample, reward) for sample, reward in zip(samples, plain, strict=True)]
        return plain, self._normalise(args, punished)[1]

    def _punished(self, sample: Sample, reward: float) -> Sample:
        """Return a stand-in for a sample: other hooks, logs and dumps keep the one that was scored."""
        other = copy.copy(sample)
        other.reward = reward - self._penalty * self._share(sample.effective_response_length)
        return other

    def _share(self, length: int) -> float:
        """Return how much of the punishment a response of so many tokens gets, 0 to 1.

        Tokens that the model did not write, a tool's output, are not counted.
        """
        return min(max(length - (self._longest - self._cache), 0) / self._cache, 1.0)
