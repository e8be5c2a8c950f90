from miles_train.driver.stuck import where_they_are


def stack(*frames):
    return "\n".join(
        ["Thread 0x01 (most recent call first):", '  File "other.py", line 1 in other', "",
         "Current thread 0x02 (most recent call first):", *(f"  {frame}" for frame in frames), ""]
    )  # fmt: skip


COLLECTIVE = stack(
    'File "/x/torch/distributed/distributed_c10d.py", line 9 in all_reduce', 'File "/y/step.py", line 2 in train'
)
HOOK = stack('File "/home/me/hooks.py", line 5 in slow', 'File "/y/step.py", line 1 in train')


def test_the_rank_that_keeps_the_others_waiting_comes_first(tmp_path):
    stacks = {f"trainer-{rank}-{100 + rank}": COLLECTIVE for rank in range(3)}
    stacks |= {"trainer-3-103": HOOK, "driver-1": HOOK}
    lines = where_they_are(stacks, [f"trainer {rank}" for rank in range(4)], tmp_path).splitlines()
    assert lines[:2] == ["trainer 3, innermost frame first:", '  File "/home/me/hooks.py", line 5 in slow']
    assert lines[3] == "trainer 0, trainer 1, trainer 2, in a collective, which waits for other ranks:"
    assert lines[-1] == f"the stacks of 5 processes are in {tmp_path}"


def test_of_two_ranks_the_one_outside_of_a_collective_comes_first(tmp_path):
    stacks = {"trainer-0-7": COLLECTIVE, "trainer-1-8": HOOK}
    assert where_they_are(stacks, ["trainer 0", "trainer 1"], tmp_path).startswith("trainer 1, innermost")


def test_a_process_that_does_not_answer_is_named(tmp_path):
    text = where_they_are({"trainer-0-7": "", "engine-8": HOOK}, ["trainer 0"], tmp_path)
    assert "trainer 0, innermost frame first:\n  (it did not say where)" in text
    assert "no answer from trainer-0-7: stopped, or busy in the kernel" in text


def test_trainer_1_is_not_taken_for_trainer_11(tmp_path):
    text = where_they_are({"trainer-11-5": COLLECTIVE, "trainer-1-6": HOOK}, ["trainer 1"], tmp_path)
    assert "hooks.py" in text
    assert "all_reduce" not in text
