"""What a busy program on the same cores costs a training step, by how the threads of OpenMP wait for each other.

    python benchmarks/waiting_threads.py

One process for each number of threads and way of waiting makes steps of the digits' U-Net (batch 8); they take turns,
and so do no busy loop beside them, one, and two. Printed are lower quartiles over the blocks, so that other programs on
the machine spoil less, and how many times its time alone a step takes. The fair share of two threads on two cores is
1.33 to 2 times beside one busy loop (the step waits for the thread that shares its core), and 2 beside two.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys

STEPS = """
import os, sys, time
import torch
from lit_diffusion.backbones import UNet
torch.set_num_threads(int(sys.argv[1]))

network = UNet((1, 8, 8), channels=32, mult=[1, 2], blocks=1, attention=[4])
optimizer = torch.optim.Adam(network.parameters())
x, c_noise = torch.randn(8, 1, 8, 8), torch.randn(8)
def step():
    optimizer.zero_grad()
    network(x, c_noise).square().mean().backward()
    optimizer.step()
step()
print("ready", flush=True)
for line in sys.stdin:
    begun, steps = time.perf_counter(), 0
    while time.perf_counter() < begun + float(line):
        step()
        steps += 1
    print((time.perf_counter() - begun) / steps, flush=True)
"""
WAYS = {
    "libgomp's own": {},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "GOMP_SPINCOUNT=1000": {"GOMP_SPINCOUNT": "1000"},
    "GOMP_SPINCOUNT=0": {"GOMP_SPINCOUNT": "0"},
    "OMP_WAIT_POLICY=PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
}
BUSY = (0, 1, 2)


def measured(rounds: int, seconds: float) -> dict[tuple[int, str], dict[int, list[float]]]:
    """Seconds of a step, block by block, for each number of threads and way, beside so many busy loops."""
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_", "KMP_"))}
    cases = [(2, way) for way in WAYS] + [(1, "libgomp's own")]
    running = {}
    for threads, way in cases:
        running[threads, way] = subprocess.Popen(
            [sys.executable, "-c", STEPS, str(threads)],
            env={**plain, **WAYS[way], "PYTHONPATH": os.getcwd()},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    found = {case: {busy: [] for busy in BUSY} for case in cases}
    try:
        for process in running.values():
            assert process.stdout.readline().strip() == "ready"
        for _ in range(rounds):
            for busy in BUSY:
                loops = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
                try:
                    for case, process in running.items():
                        process.stdin.write(f"{seconds}\n")
                        process.stdin.flush()
                        found[case][busy].append(float(process.stdout.readline()))
                finally:
                    for each in loops:
                        each.kill()
                        each.wait()
    finally:
        for process in running.values():
            process.kill()
            process.communicate()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--seconds", type=float, default=0.2, help="Of a block.")
    options = parser.parse_args()
    print("| threads | waiting | alone | beside one busy loop | beside two |\n|---|---|---|---|---|")
    for (threads, way), blocks in measured(options.rounds, options.seconds).items():
        alone, one, two = (1000 * statistics.quantiles(blocks[busy])[0] for busy in BUSY)
        beside = f"{one:.1f} ms, {one / alone:.2f} times | {two:.1f} ms, {two / alone:.2f} times"
        print(f"| {threads} | {way} | {alone:.1f} ms | {beside} |")
