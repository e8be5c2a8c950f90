"""A grader that misbehaves as its answer says; grading processes import it by name."""

import os
import sys
import time
from pathlib import Path


def wait(label, metadata):
    Path(metadata["file"]).write_text(str(os.getpid()))
    return 9**9**9 if label == "in one operation" else time.sleep(600)


def fail(label, metadata):
    raise KeyError("no such thing")


BEHAVIOURS = {
    "hang in python": lambda label, metadata: time.sleep(600),
    "hang in one operation": lambda label, metadata: 9**9 ** int(label),
    "want memory": lambda label, metadata: bytearray(64 << 30),
    "die": lambda label, metadata: os._exit(3),
    "raise": fail,
    "pid": wait,
}


def score(response, label, metadata):
    if response in BEHAVIOURS:
        BEHAVIOURS[response](label, metadata)
    if response == "print":
        print("a grader says something", file=sys.stdout)
    if response == "modules":
        return float(len({"torch", "transformers", "aiohttp", "math_verify"} & set(sys.modules)))
    return float(len(response))
