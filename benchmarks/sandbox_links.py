"""What the sandbox's links and CPU quotas give against what they are set to (Linux, root).

    python benchmarks/sandbox_links.py                # 2 hosts of 1 Gbit/s, 2 of 200 Mbit/s, and speeds 2:1

Each host's link is measured alone, in each direction, then both directions at once, by one TCP connection of plain
sockets (payload, after one second of start). Speeds are counts of equal matrix products on all hosts at once.
"""

from __future__ import annotations

import argparse
import json
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path

from heteromesh.planner.cluster.cluster import load_cluster
from heteromesh.runtime.sandbox import Sandbox, SandboxHost

PORT = 5201
WARM_SECONDS = 1.0
TOLERANCE = 0.05
CLUSTER = Path(__file__).parent.parent / "examples" / "clusters" / "sandbox-unequal.toml"


def receive(connection: socket.socket) -> tuple[int, float]:
    """Bytes and seconds from the first bytes after WARM_SECONDS to the end of the stream."""
    buffer = memoryview(bytearray(1 << 20))
    began, count, since = time.perf_counter(), 0, 0.0
    while got := connection.recv_into(buffer):
        now = time.perf_counter()
        if since:
            count += got
            last = now
        elif now - began > WARM_SECONDS:
            since = last = now
    return count, last - since


def send(connection: socket.socket, seconds: float) -> None:
    """Sends for so long, then says that it is the end."""
    data, until = bytes(1 << 20), time.perf_counter() + seconds + WARM_SECONDS
    while time.perf_counter() < until:
        connection.sendall(data)
    connection.shutdown(socket.SHUT_WR)


def end(role: str, peer: str, direction: str, seconds: float, output: str) -> None:
    """One end of a measured connection; the client connects and is who `direction` is told for."""
    if role == "server":
        with socket.create_server(("", PORT)) as server:
            connection = server.accept()[0]
    else:
        connection = connect(peer)
    sends = direction == "both" or (direction == "send") == (role == "client")
    sender = threading.Thread(target=send, args=(connection, seconds))
    if sends:
        sender.start()
    else:
        connection.shutdown(socket.SHUT_WR)
    if direction == "both" or not sends:
        count, spent = receive(connection)
        Path(output).write_text(json.dumps(count * 8 / spent / 1e9))
    else:
        connection.recv(1)
    if sends:
        sender.join()
    connection.close()


def connect(peer: str) -> socket.socket:
    for _ in range(100):
        try:
            return socket.create_connection((peer, PORT))
        except ConnectionRefusedError:
            time.sleep(0.05)
    raise TimeoutError(f"{peer} does not listen")


def measure(host: SandboxHost, peer: SandboxHost, direction: str, seconds: float) -> list[float]:
    """Gbit/s: [what the host sent, what it received], as far as measured."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / role for role in ("server", "client")]
        words = [sys.executable, __file__, "--direction", direction, "--seconds", str(seconds)]
        ends = [
            place.start([*words, "--role", role, "--peer", peer.address, "--output", str(output)])
            for place, role, output in zip((peer, host), ("server", "client"), outputs, strict=True)
        ]
        if any(status for status in [process.wait(timeout=60) for process in ends]):
            raise SystemExit(f"a measurement between {host.name} and {peer.name} failed")
        return [json.loads(output.read_text()) for output in outputs if output.exists()]


def gemm(seconds: float, output: str) -> None:
    """Matrix products until the time is over; all hosts begin at the same time on the clock."""
    import torch

    torch.set_num_threads(1)
    a = torch.ones(256, 256)
    until, count = time.perf_counter() + WARM_SECONDS, 0
    while time.perf_counter() < until:
        a @ a
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        a @ a
        count += 1
    Path(output).write_text(json.dumps(count / seconds))


def links(sandbox: Sandbox, seconds: float) -> list[str]:
    """A table of rates. Each host talks to one of the fastest others, so that its own link is the slower one."""
    lines = ["| host | set Mbit/s | sends alone | receives alone | sends, both | receives, both | worst |"]
    lines.append("|---|---|---|---|---|---|---|")
    for host in sandbox.hosts:
        peer = max((h for h in sandbox.hosts if h is not host), key=lambda h: h.interfaces[0].gbit)
        wanted = min(host.interfaces[0].gbit, peer.interfaces[0].gbit)
        rates = [r for d in ("send", "receive", "both") for r in measure(host, peer, d, seconds)]
        worst = max(abs(r / wanted - 1) for r in rates)
        cells = " | ".join(f"{1e3 * r:.1f}" for r in rates)
        lines.append(
            f"| {host.name} | {1e3 * wanted:.0f} | {cells} | {worst:.1%}{'' if worst <= TOLERANCE else ' !'} |"
        )
    return lines


def speeds(sandbox: Sandbox, seconds: float) -> list[str]:
    """A table of matrix products a second on all hosts at once, beside the file's speeds."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / host.name for host in sandbox.hosts]
        words = [sys.executable, __file__, "--role", "gemm", "--seconds", str(seconds), "--output"]
        running = [h.start([*words, str(o)]) for h, o in zip(sandbox.hosts, outputs, strict=True)]
        for process in running:
            process.wait(timeout=120)
        rates = [json.loads(output.read_text()) for output in outputs]
    lines = ["| host | quota, cores | products/s | relative | set |", "|---|---|---|---|---|"]
    for host, share, rate in zip(sandbox.hosts, sandbox.shares, rates, strict=True):
        wanted, found = share / max(sandbox.shares), rate / max(rates)
        lines.append(f"| {host.name} | {share:.2f} | {rate:.0f} | {found:.3f} | {wanted:.3f} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cluster", type=Path, default=CLUSTER)
    parser.add_argument("--seconds", type=float, default=3.0)
    for name in ("--role", "--peer", "--direction", "--output"):
        parser.add_argument(name, default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.role == "gemm":
        gemm(options.seconds, options.output)
    elif options.role:
        end(options.role, options.peer, options.direction, options.seconds, options.output)
    else:
        cluster = load_cluster(options.cluster)
        with Sandbox(cluster) as sandbox:
            compute = speeds(sandbox, 3 * options.seconds)
        with Sandbox(cluster, quota=False) as sandbox:
            print("\n".join([*links(sandbox, options.seconds), "", *compute]))


if __name__ == "__main__":
    main()
