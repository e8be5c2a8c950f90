"""What one writes in an afternoon: a proxy of FastAPI and httpx, for benchmarks/router.py. Needs nothing of ours."""

from __future__ import annotations

import itertools
import sys

import fastapi
import httpx
import uvicorn
from fastapi.responses import StreamingResponse

app = fastapi.FastAPI()
workers = itertools.cycle(sys.argv[2:])
client = httpx.AsyncClient(limits=httpx.Limits(max_connections=1024, max_keepalive_connections=1024), timeout=60)


@app.get("/health")
async def health() -> dict[str, str]:
    """Say that it runs."""
    return {"status": "healthy"}


@app.post("/generate")
async def generate(request: fastapi.Request) -> StreamingResponse:
    """Forward a request, and its answer as it comes."""
    body = await request.body()
    headers = {"content-type": "application/json"}
    sent = client.build_request("POST", next(workers) + "/generate", content=body, headers=headers)
    reply = await client.send(sent, stream=True)
    kept = {k: v for k, v in reply.headers.items() if k in ("content-type", "content-length")}
    return StreamingResponse(reply.aiter_raw(), reply.status_code, headers=kept)


uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error", access_log=False, loop="uvloop")
