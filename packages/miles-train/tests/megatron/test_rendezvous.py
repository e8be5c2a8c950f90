"""Where the ranks meet: at a socket that was open before anybody was told of it."""

import json
import subprocess
import sys

RANK_ZERO = """
import json, socket, psutil
from miles_train.megatron import init
from miles_train.options import ParallelOptions

listener = socket.create_server(("127.0.0.1", 0))
port = listener.getsockname()[1]
place = {"rank": 0, "world_size": 1, "master_addr": "127.0.0.1", "master_port": port}
init.initialize(ParallelOptions(), **place, seed=1, listen_fd=listener.detach())
at = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == "LISTEN" and c.laddr.port == port]
init.shutdown()
print(json.dumps(at))
"""


def test_the_store_takes_the_socket_it_is_given_and_listens_nowhere_else():
    ended = subprocess.run([sys.executable, "-c", RANK_ZERO], capture_output=True, text=True, check=False, timeout=200)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout.splitlines()[-1]) == ["127.0.0.1"]
