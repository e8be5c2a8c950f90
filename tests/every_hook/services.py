"""Tools, an agent and a middleware: each notes what it saw."""

import asyncio
import json
import urllib.request

from notes import saw

TOOL_CALL = '<tool_call>{"name": "look", "arguments": {"key": "a"}}</tool_call>'
"""One token of the test's tokenizer: a random model calls the tool now and then."""

tools = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "description": "Look something up.",
            "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
        },
    }
]


async def execute_tool(name, params):
    saw("execute_tool", name=name, params=params)
    return "seen"


async def agent(base_url, prompt, request_kwargs, metadata, **kwargs):
    """Asks twice, so that the second prompt holds the first answer."""
    messages = list(prompt)
    for question in (None, "again"):
        if question:
            messages.append({"role": "user", "content": question})
        reply = await asyncio.to_thread(_ask, base_url, {"messages": messages, **request_kwargs})
        messages.append(reply["choices"][0]["message"])
    saw("agent", messages=len(messages), metadata=metadata)
    return {"asked": 2}


def _ask(base_url, payload):
    request = urllib.request.Request(
        f"{base_url}/chat/completions", json.dumps(payload).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)


async def abort(args):
    """Beside the agent, so it is the `agent_abort` hook."""
    saw("agent_abort", run_dir=args.run_dir)


class Middleware:
    """Counts generations."""

    def __init__(self, app, *, router):
        self._app = app
        saw("router_middleware", router=type(router).__name__)

    async def __call__(self, scope, receive, send):
        if scope["path"] == "/generate":
            saw("router_middleware.generate")
        await self._app(scope, receive, send)
