"""What becomes of the settings of sglang's router, which slime calls `--router-…`, and Miles 0.x in part otherwise."""

from __future__ import annotations

from miles_api.migrate.verdicts import Flag, Flags, Rule, Take, lack, renamed

__all__ = ["ROUTER", "ROUTER_PREFIXES"]

_PREFIXES = ("--sglang-router-", "--router-")
_POLICIES = {"cache_aware": "prefix_aware", "manual": "sticky"}


def _policy(flag: Flag, _flags: Flags) -> Take:
    ours = [_POLICIES.get(name, name) for name in flag.values]
    return Take("router_policy", ours, f"was {' '.join(flag.values)}" if ours != flag.values else "")


def _most_requests(flag: Flag, _flags: Flags) -> Take:
    if flag.number == -1:
        return Take("router_max_requests", ["0"], "-1 there sets no limit")
    return Take("router_max_requests", flag.values)


def _named(name: str, rule: Rule) -> dict[str, Rule]:
    return dict.fromkeys((prefix + name for prefix in _PREFIXES), rule)


def _renamed(name: str, key: str, remark: str) -> dict[str, Rule]:
    return renamed(key, remark, *(prefix + name for prefix in _PREFIXES))


ROUTER: dict[str, Rule] = {
    **_named("policy", _policy),
    **_named("max-concurrent-requests", _most_requests),
    **_renamed("queue-size", "router_queue_size", ""),
    **_renamed("queue-timeout-secs", "router_queue_timeout", "seconds"),
    **_renamed("request-timeout-secs", "router_request_timeout", "seconds"),
    **_renamed("max-payload-size", "router_max_body_bytes", ""),
}
"""Settings that our router has too, by flag."""

ROUTER_PREFIXES = lack("miles-router has no such setting", *_PREFIXES)
"""All others, by how their flags begin."""
