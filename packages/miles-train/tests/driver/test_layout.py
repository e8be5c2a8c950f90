"""Who has which slots, and what is refused because it does not add up."""

from __future__ import annotations

import pytest

from miles_api.config import RunConfig
from miles_api.run_options import RunOptions
from miles_train.driver.layout import derived_engines, layout_of, layout_problems, lives_on_ray
from miles_train.options import ClusterOptions, ParallelOptions, WeightSyncOptions


def config(engines=None, nodes=1, ranks=1, run=None, engine="sglang", pause="retract", **cluster):
    given = {} if engines is None else {"rollout_num_engines": engines}
    base = RunConfig.of(
        RunOptions(**(run or {})), ParallelOptions(actor_num_nodes=nodes, actor_num_gpus_per_node=ranks),
        ClusterOptions(**cluster), WeightSyncOptions(pause_generation_mode=pause),
    )  # fmt: skip
    one = base.replace("command line", rollout_engine=engine, **given, **cluster)
    return one.replace("derived", **derived_engines(one))


def problems(**options):
    return "\n".join(layout_problems(config(**options)))


@pytest.mark.parametrize(
    ("options", "engines", "gpus"),
    [
        ({}, 1, 1),
        ({"engines": 3}, 3, 3),
        ({"engines": 2, "rollout_num_gpus_per_engine": 4}, 2, 8),
        ({"rollout_num_gpus": 8, "rollout_num_gpus_per_engine": 4}, 2, 8),
        ({"colocate": True, "nodes": 2, "ranks": 8, "rollout_num_gpus_per_engine": 4}, 4, 16),
        ({"colocate": True, "ranks": 8, "engines": 1, "rollout_num_gpus_per_engine": 4}, 1, 4),
    ],
)
def test_engines_follow_from_their_gpus_and_gpus_from_the_engines(options, engines, gpus):
    flat = config(**options).flat()
    assert (flat["rollout_num_engines"], flat["rollout_num_gpus"]) == (engines, gpus)
    assert problems(**options) == ""


@pytest.mark.parametrize(
    ("options", "slots"),
    [
        ({"ranks": 4, "engines": 2}, 6),
        ({"ranks": 4, "engines": 2, "colocate": True}, 4),
        ({"ranks": 4, "engines": 2, "run": {"debug_rollout_only": True}, "colocate": True}, 2),
        ({"ranks": 4, "engines": 2, "run": {"loss_type": "sft_loss"}}, 4),
    ],
)
def test_slots_are_shared_or_side_by_side(options, slots):
    assert layout_of(config(**options)).slots == slots


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engines": 3, "rollout_num_gpus": 8}, "--rollout-num-gpus 8 is not --rollout-num-engines 3"),
        ({"rollout_num_gpus": 6, "rollout_num_gpus_per_engine": 4}, "as a multiple of the third"),
        ({"engines": 4, "ranks": 2, "colocate": True}, "4 engines of 1 GPUs need 4, and the trainer has 2"),
        ({"nodes": 3, "ranks": 4, "colocate": True, "rollout_num_gpus_per_engine": 6}, "do not fit nodes of 4"),
        ({"rollout_num_gpus_per_engine": 2, "engine": "local"}, "the local engine takes one slot"),
        ({"rollout_schedule": "one-step-off", "colocate": True}, "each needs its own GPUs"),
        ({"rollout_schedule": "one-step-off", "offload_train": True}, "neither trainer nor engines ever pause"),
        ({"rollout_schedule": "one-step-off", "run": {"deterministic": True}}, "with --deterministic"),
        ({"rollout_schedule": "in-flight", "colocate": True}, "each needs its own GPUs"),
        ({"rollout_schedule": "in-flight", "pause": "abort"}, "take retract or in_place"),
    ],
)
def test_what_does_not_add_up_is_refused_with_the_numbers(options, words):
    assert words in problems(**options)


def test_ray_starts_the_engines_of_a_cluster_and_not_servers_that_run_already():
    assert lives_on_ray(config(ray_address="auto"))
    assert not lives_on_ray(config(engine="local"))
    attached = config(ray_address="auto").replace("command line", rollout_engine_urls=["http://10.0.0.1:30000"])
    assert not lives_on_ray(attached)


def test_the_trainer_gives_way_by_default_where_it_shares_its_gpus():
    assert ClusterOptions(colocate=True).trainer_gives_way
    assert not ClusterOptions().trainer_gives_way
    assert not ClusterOptions(colocate=True, offload_train=False).trainer_gives_way
