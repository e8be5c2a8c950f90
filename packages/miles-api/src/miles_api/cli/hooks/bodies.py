"""What a new hook does before its author changes it: for each hook something small that a run can use."""

from __future__ import annotations

__all__ = ["BODIES"]

BODIES: dict[str, str] = {}
"""By hook: the body of a function or class, or the whole text of a value. The test suite checks every one."""

BODIES["rollout"] = """
if evaluation:
    return RolloutFnEvalOutput({})
groups = data_source.get_samples(args.rollout_batch_size)
for group in groups:
    for sample in group:
        # Your own generation and scoring: here every answer is one made-up token.
        sample.tokens = [1, 2, 3]
        sample.append_response_tokens([4], log_probs=[-0.5], text="7")
        sample.status = Status.COMPLETED
        sample.reward = 1.0 if sample.response == str(sample.label) else 0.0
return RolloutFnTrainOutput(groups)
"""
BODIES["eval_rollout"] = """
# Your own evaluation: one entry a data set, three lists of equal length each.
sample = Sample(index=0, group_index=0, prompt="3 + 4", tokens=[1, 2, 3], label="7")
sample.append_response_tokens([4], text="7")
sample.status = Status.COMPLETED
score = 1.0 if sample.response == sample.label else 0.0
return RolloutFnEvalOutput({"sums": {"rewards": [score], "truncated": [False], "samples": [sample]}})
"""
BODIES["generate"] = """
state, sample = input.state, input.sample
if not sample.tokens:
    sample.tokens = list(state.tokenizer.encode(str(sample.prompt), add_special_tokens=False))
payload = {"input_ids": sample.tokens, "sampling_params": input.sampling_params, "return_logprob": True}
reply = await state.post("/generate", payload)
chosen = reply["meta_info"]["output_token_logprobs"]
sample.append_response_tokens(
    [entry[1] for entry in chosen], log_probs=[entry[0] for entry in chosen], text=reply["text"]
)
sample.update_from_meta_info(reply["meta_info"])
return GenerateFnOutput(samples=sample)
"""
BODIES["data_source"] = '''
def __init__(self, args: Args) -> None:
    self._args = args
    self._prompts = [("What is 3 + 4?", "7"), ("What is 2 + 2?", "4")]
    self._next_group = 0
    self._returned: list[list[Any]] = []

def get_samples(self, num_samples: int) -> list[list[Sample]]:
    """Return groups that came back first, then new ones."""
    groups = self._returned[:num_samples]
    del self._returned[:num_samples]
    while len(groups) < num_samples:
        groups.append(self._new_group())
    return groups

def _new_group(self) -> list[Sample]:
    number, size = self._next_group, self._args.n_samples_per_prompt
    self._next_group += 1
    prompt, label = self._prompts[number % len(self._prompts)]
    return [
        Sample(group_index=number, index=i, rollout_id=i, prompt=prompt, label=label)
        for i in range(number * size, number * size + size)
    ]

def add_samples(self, samples: list[list[Any]]) -> None:
    """Take groups back; one may hold a list of samples in the place of a sample."""
    self._returned.extend(samples)

def get_buffer_length(self) -> int:
    """Return how many groups wait to be handed out again."""
    return len(self._returned)

def save(self, rollout_id: int) -> None:
    """Write everything that a resumed run needs below `args.save`."""
    returned = [
        [[one.to_dict() for one in item] if isinstance(item, list) else item.to_dict() for item in group]
        for group in self._returned
    ]
    state = {"next_group": self._next_group, "returned": returned}
    Path(self._args.save, "my_data_source.json").write_text(json.dumps(state))

def load(self, rollout_id: int | None = None) -> None:
    """Restore what `save` wrote, from `args.load`."""
    state = json.loads(Path(self._args.load, "my_data_source.json").read_text())
    self._next_group = state["next_group"]
    self._returned = [
        [[*map(Sample.from_dict, item)] if isinstance(item, list) else Sample.from_dict(item) for item in group]
        for group in state["returned"]
    ]
'''
BODIES["reward"] = """
return 1.0 if sample.response.strip() == str(sample.label) else 0.0
"""
BODIES["group_reward"] = """
return [1.0 if sample.response.strip() == str(sample.label) else 0.0 for sample in samples]
"""
BODIES["reward_post_process"] = """
raw = [sample.get_reward_value(args) for sample in samples]
groups = defaultdict(list)
for sample, reward in zip(samples, raw):
    groups[sample.group_index].append(reward)
means = {group: sum(rewards) / len(rewards) for group, rewards in groups.items()}
return raw, [reward - means[sample.group_index] for sample, reward in zip(samples, raw)]
"""
BODIES["dynamic_filter"] = """
rewards = [sample.get_reward_value(args) for sample in samples]
if max(rewards) > min(rewards):
    return DynamicFilterOutput(keep=True)
return DynamicFilterOutput(keep=False, reason="equal_rewards")
"""
BODIES["buffer_filter"] = """
taken = buffer[:num_samples]
del buffer[:num_samples]
return taken
"""
BODIES["sample_filter"] = """
for group in data:
    for item in group:
        # A generation that fanned out is a list in the place of its sample.
        for sample in item if isinstance(item, list) else [item]:
            if sample.status == Status.TRUNCATED:
                sample.remove_sample = True
"""
BODIES["all_samples_process"] = """
print(f"the rollout generated {sum(map(len, all_samples))} answers in {len(all_samples)} groups")
"""
BODIES["convert_samples"] = """
batch = {
    "tokens": [sample.tokens for sample in samples],
    "response_lengths": [sample.response_length for sample in samples],
    "total_lengths": [len(sample.tokens) for sample in samples],
    "loss_masks": [_loss_mask(sample) for sample in samples],
    "rewards": rewards,
    "raw_reward": raw_rewards,
    "truncated": [int(sample.status == Status.TRUNCATED) for sample in samples],
    "sample_indices": [sample.index for sample in samples],
    "rollout_ids": [sample.rollout_id for sample in samples],
    "group_indices": [sample.group_index for sample in samples],
}
if all(sample.rollout_log_probs is not None for sample in samples):
    batch["rollout_log_probs"] = [sample.rollout_log_probs for sample in samples]
return batch


def _loss_mask(sample: Sample) -> list[int]:
    if sample.remove_sample:
        return [0] * sample.response_length
    return [1] * sample.response_length if sample.loss_mask is None else sample.loss_mask
"""
BODIES["rollout_data_postprocess"] = """
for mask, truncated in zip(rollout_data["loss_masks"], rollout_data["truncated"]):
    if truncated:
        mask.zero_()
"""
BODIES["advantage"] = """
masks, rewards = rollout_data["loss_masks"], rollout_data["rewards"]
rollout_data["advantages"] = [mask.new_full(mask.shape, reward) for mask, reward in zip(masks, rewards)]
rollout_data["returns"] = [advantages.clone() for advantages in rollout_data["advantages"]]
"""
BODIES["loss"] = """
current = torch.cat(log_probs_and_entropy(logits)[0])
old = torch.cat(batch["log_probs"]) if "log_probs" in batch else current.detach()
ratio = (current - old).exp()
loss = sum_of_sample_mean(-ratio * torch.cat(batch["advantages"]))
return loss, {"my_ratio": sum_of_sample_mean(ratio.detach())}
"""
BODIES["importance_weights"] = """
masks = torch.cat(loss_masks)
gap = (torch.cat(train_log_probs) - torch.cat(rollout_log_probs)) * masks
weights = gap.exp().clamp(args.tis_clip_low, args.tis_clip)
return pg_loss * weights, loss_masks, {"my_weight": weights}
"""
BODIES["pg_loss_reducer"] = """
def reduce(values: Tensor) -> Tensor:
    total = values.sum() * 0.0
    for part, mask in zip(values.split(response_lengths), loss_masks):
        size = 1.0 if calculate_per_token_loss else max(float(mask.sum()), 1.0)
        total = total + (part * mask).sum() / size
    return total

return reduce
"""
BODIES["megatron_init"] = """
print(f"this rank trains {args.hf_checkpoint}")
"""
BODIES["before_log_prob"] = """
for chunk in model:
    chunk.eval()
"""
BODIES["before_train_step"] = """
for group in optimizer.param_groups:
    print(f"rollout {rollout_id}, step {step_id}: learning rate {group['lr']}")
"""
BODIES["post_save"] = """
print(f"rollout {rollout_id} was saved in {checkpoint_dir}")
"""
BODIES["rollout_log"] = """
rewards = [sample.get_reward_value(args) for sample in samples]
print(f"rollout {rollout_id}: reward {sum(rewards) / len(rewards):.3f} in {rollout_time:.1f} s")
return False
"""
BODIES["eval_rollout_log"] = """
for name, part in data.items():
    print(f"rollout {rollout_id}, {name}: reward {sum(part['rewards']) / len(part['rewards']):.3f}")
return False
"""
BODIES["router_middleware"] = """
def __init__(self, app: Callable[..., Awaitable[None]], *, router: Any) -> None:
    self._app = app
    self._router = router

async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] != "http":
        await self._app(scope, receive, send)
        return
    started = time.perf_counter()
    try:
        await self._app(scope, receive, send)
    finally:
        print(f"{scope['path']} took {time.perf_counter() - started:.3f} s")
"""
BODIES["model_provider"] = """
# Megatron is on trainer ranks alone: this file is loaded elsewhere too.
from miles_train.megatron.model import gpt_model

return gpt_model(
    pre_process,
    post_process,
    vp_stage,
    config=config,
    hf_config=hf_config,
    pg_collection=pg_collection,
    args=args,
)
"""
BODIES["agent"] = """
messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
request = urllib.request.Request(
    f"{base_url}/chat/completions",
    json.dumps({**request_kwargs, "messages": messages}).encode(),
    {"Content-Type": "application/json"},
)

def ask() -> Any:
    with urllib.request.urlopen(request) as reply:
        return json.load(reply)

# Blocking calls go to a thread: other conversations run meanwhile.
reply = await asyncio.to_thread(ask)
return {"answer": reply["choices"][0]["message"]["content"]}
"""
BODIES["agent_abort"] = """
print("the rollout was aborted: stop what your conversations still do outside")
"""
BODIES["execute_tool"] = """
if name == "add":
    return str(float(params["a"]) + float(params["b"]))
return f"error: there is no tool {name!r}"
"""
BODIES["tool_specs"] = """
tool_specs = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
                "required": ["a", "b"],
            },
        },
    }
]
"""
