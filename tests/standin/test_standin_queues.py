"""Full launch queues, an emptied cache, two devices: each in a process of its own, which tells the stand-in at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FULL = """
import sys, threading, torch, standin_gpu, ssdtrain
from ssdtrain.devices.cuda import CudaDevice
from ssdtrain.io.open_engine import fence

device, opened, begun = CudaDevice(0), threading.Event(), threading.Event()
torch.ones(1, device="cuda"), torch.cuda.synchronize()
earlier = fence(device.driver, 0)
standin_gpu.enqueue(lambda: opened.wait(30))
for _ in range(15):
    standin_gpu.enqueue(lambda: None)

def launch():
    begun.set()
    fence(device.driver, 0) if sys.argv[1] == "fence" else earlier.make_wait(0)
    assert opened.is_set()

thread = threading.Thread(target=launch)
thread.start()
begun.wait()
while not opened.wait(0.2):  # in which the other thread gets to its launch
    opened.set()
thread.join()
torch.cuda.synchronize()
print("over")
"""

TRAINING = """
import sys, torch, ssdtrain
x = torch.linspace(0, 1, 1 << 16, device="cuda", requires_grad=True)
def gradient(context):
    x.grad = None
    with context:
        y = x
        for _ in range(40): y = y.sin()
    y.sum().backward()
    return x.grad.cpu()
expected = gradient(torch.enable_grad())
policy = {"mode": "all", "min_nbytes": "64KiB", "staging_nbytes": "1MiB", "prefetch_nbytes": "1MiB"}
offload = ssdtrain.offload_activations(sys.argv[1], policy)
assert all(torch.equal(gradient(offload), expected) for _ in range(3))
assert offload.stats.num_offloaded > 0
offload.close()
print("over")
"""

ANOTHER_DEVICE = """
import sys, torch, ssdtrain
policy = {"mode": "all", "min_nbytes": 0, "staging_nbytes": "1MiB"}
def run(context):
    with torch.cuda.device(1):
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        w = torch.linspace(0, 1, 1 << 16, device="cuda:1", requires_grad=True)
        (w * w).sin().sum().backward()
        torch.cuda.synchronize()
        with context, torch.cuda.graph(graph, stream=side):
            loss = w * w
            with torch.cuda.device(0):  # somebody has another device current
                loss = loss.sin().sin().sin()
            loss.sum().backward()
    graph.replay()
    torch.cuda.synchronize(1)
    return w.grad.cpu()
expected = run(torch.enable_grad())
offload = ssdtrain.offload_activations(sys.argv[1], policy)
assert torch.equal(run(offload), expected)
assert offload.stats.num_offloaded == 0, str(offload.stats)
assert offload.stats.skipped["CUDA graph capture"].count > 0
offload.close()
print("over")
"""


EMPTYING = """
import faulthandler, threading, torch, ssdtrain
faulthandler.dump_traceback_later(120, exit=True)
offload = ssdtrain.offload_activations(None, {"mode": "all", "min_nbytes": 0, "staging_nbytes": "1MiB"})
model = torch.nn.Sequential(*[m for _ in range(4) for m in (torch.nn.Linear(128, 128), torch.nn.GELU())]).cuda()
begun = threading.Event()
def train():
    with torch.cuda.stream(torch.cuda.Stream()):
        for _ in range(10):
            begun.set()
            with offload: loss = model(torch.ones(256, 128, device="cuda")).square().mean()
            loss.backward()
thread = threading.Thread(target=train)
thread.start()
begun.wait()
while thread.is_alive():
    torch.cuda.empty_cache()
offload.close()
print("over")
"""


def run(code: str, *arguments: str, **environment: str) -> None:
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=os.environ | environment)
    assert (done.returncode, done.stdout) == (0, "over\n"), done.stderr


@pytest.mark.parametrize("what", ["fence", "make_wait"])
def test_a_launch_that_blocks_lets_other_threads_run(what: str) -> None:
    """The queue is full until another thread lets the device go on: with the GIL held, neither ever would."""
    run(FULL, what, STANDIN_QUEUE="16")


def test_the_cache_is_emptied_beside_training() -> None:
    """Of the stand-in: emptying waits for streams with a lock held, for which others wait with the GIL, which kernels
    need here. On a GPU they do not."""
    run(EMPTYING, STANDIN_DELAY_US="200")


def test_training_with_short_queues(tmp_path: Path) -> None:
    run(TRAINING, str(tmp_path), STANDIN_QUEUE="4096")


def test_a_capture_on_a_device_that_is_not_current(tmp_path: Path) -> None:
    """Whether a stream captures was asked of the current device, not of the tensor's."""
    run(ANOTHER_DEVICE, str(tmp_path), STANDIN_DEVICES="2")
