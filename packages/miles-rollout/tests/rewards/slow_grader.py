"""A grader that misbehaves as its answer says; grading processes import it by name."""

import os
import sys
import time
from pathlib import Path

from miles_api.errors import DataError


def wait(label, metadata):
    Path(metadata["file"]).write_text(str(os.getpid()))
    return 9**9**9 if label == "in one operation" else time.sleep(600)


def fail(label, metadata):
    raise KeyError("no such thing")


def refuse(label, metadata):
    raise DataError("the label says too little")


BEHAVIOURS = {
    "say that the data is wrong": refuse,
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
    if response == "metadata":
        return float(len(metadata))
    return float(len(response))


def hangs_at_first(response, label, metadata):
    """Hang in as many calls as SLOW_GRADER_HANGS says, all processes together."""
    file = Path(os.environ["SLOW_GRADER_CALLS"])
    with file.open("a") as calls:
        calls.write("call\n")
    if len(file.read_text().split()) <= int(os.environ["SLOW_GRADER_HANGS"]):
        time.sleep(600)
    return 1.0
