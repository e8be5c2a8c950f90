"""A whole rollout as one function: draw prompts, ask the engines, score, keep the groups that teach something.

Everything between a prompt and its reward is done here by hand; evaluation is the run's own.
"""

import asyncio

from miles_api import Args, RolloutFnEvalOutput, Sample
from miles_rollout.own_loop import evaluate, sampling_seed, state_of

__all__ = ["rollout"]

ROUNDS = 4


async def rollout(
    args: Args, rollout_id: int, data_source, evaluation: bool = False
) -> list[list[Sample]] | RolloutFnEvalOutput:
    """Return `--rollout-batch-size` groups whose answers differ in reward, as far as `ROUNDS` rounds find them.

    A bare list of groups will do; `RolloutFnTrainOutput` also takes metrics.
    """
    if evaluation:
        return await evaluate(args)
    kept, equal = [], []
    for _ in range(ROUNDS):
        groups = data_source.get_samples(args.rollout_batch_size - len(kept))
        await asyncio.gather(*(answer(args, sample) for group in groups for sample in group))
        for group in groups:
            rewards = {sample.reward for sample in group}
            (kept if len(rewards) > 1 else equal).append(group)
        if len(kept) == args.rollout_batch_size:
            break
    # What all answers of a group get right, or none, teaches nothing; but a rollout has to be full.
    return kept + equal[: args.rollout_batch_size - len(kept)]


async def answer(args: Args, sample: Sample) -> None:
    """Let an engine continue the prompt; write tokens, log-probs, status and reward into the sample."""
    state = state_of(args)
    sample.tokens = state.tokenizer.encode(sample.prompt, add_special_tokens=False)
    # A seed for each sample: without it, no run can be repeated.
    sampling = {**state.sampling_params, "sampling_seed": sampling_seed(args.rollout_seed, sample.index, turn=0)}
    payload = {"input_ids": sample.tokens, "sampling_params": sampling, "return_logprob": True}
    async with state.generate_fn_semaphore:
        reply = await state.post("/generate", payload)
    chosen = reply["meta_info"]["output_token_logprobs"]
    sample.append_response_tokens(
        [token for _, token, *_ in chosen],
        log_probs=[log_prob for log_prob, *_ in chosen],
        text=reply["text"],
        meta_info=reply["meta_info"],
    )
    sample.reward = 1.0 if sample.response == sample.label else 0.0
