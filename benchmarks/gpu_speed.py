"""Those checks of gpu_acceptance.py that only a GPU can pass: launches, compilation, speed, kernels, graphs.

Every function runs on a CPU, too, where a CUDA graph is the work itself and a stream does not sleep.
"""

from __future__ import annotations

import gc
import re
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from bench.machine import matmul_rate, products
from bench.step import PLAIN, Step, Steps, Way
from gpu_findings import Findings, Setting, distance
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from hpcm_scale.config.compose import compose
from hpcm_scale.config.schema import Precision
from hpcm_scale.errors import in_a_line
from hpcm_scale.model.arithmetic import product
from hpcm_scale.model.layers import Pointwise, attend, depthwise_block
from hpcm_scale.model.parameters import on_meta
from hpcm_scale.tracking.timing import alternate, ratio, seconds, synchronize, timed
from hpcm_scale.training.costs import training_flops_per_image
from hpcm_scale.training.estimate import estimate

BF16 = Way(Precision.bf16)
COMPILED = Way(Precision.bf16, compiled=True)


def graphed(work: Callable[[], Any], device: torch.device, clear: Callable[[], None] = lambda: None) -> Callable:
    """`work` as one CUDA graph to replay, which returns what the captured run did; on a CPU `work` itself.

    `clear` is called before the capture: gradients that are there then are added to, others are overwritten.
    """
    if device.type != "cuda":
        return work
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(3):
            work()
    torch.cuda.current_stream().wait_stream(beside)
    clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = work()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def steps_of(setting: Setting, model: str, batch: int) -> Steps:
    """Steps on random images without data or engine; `nano` and two images in a tiny setting."""
    batch = setting.pick(batch, 2)
    config = compose([f"model={setting.pick(model, 'nano')}", f"train.batch_size={batch}"])
    return Steps(config, batch, setting.device)


def heartbeat(setting: Setting, found: Findings) -> None:
    """A thread goes on while the main one waits for room in the launch queue."""
    length = setting.pick(5.0, 0.5)
    steps = steps_of(setting, "nano", 2)
    for name, way in {"eager": BF16, "compiled": COMPILED}.items():
        step = steps.of(way)
        step()  # compiles
        steps.drop_gradients()
        behind = partial(behind_a_sleeping_stream, step.gradients, setting.device, length)
        gap, launch = longest_gap(behind)
        found.note(name, {"longest_gap": gap, "longest_launch": launch})
        full = launch > length / 2
        found.expect(
            full or not setting.cuda, f"{name}: no launch waited for the stream, the longest took {launch:.1f} s"
        )
        found.expect(gap < 2, f"{name}: another thread stood still for {gap:.1f} s")


def longest_gap(work: Callable[[], Any], tick: float = 0.1) -> tuple[float, Any]:
    """The longest time in seconds between two ticks of another thread while `work` runs, and what that returned."""
    ticks, done = [time.monotonic()], threading.Event()

    def beat() -> None:
        while not done.wait(tick):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    result = work()
    ticks.append(time.monotonic())
    done.set()
    thread.join()
    return max(after - before for before, after in pairwise(ticks)), result


def behind_a_sleeping_stream(work: Callable[[], Any], device: torch.device, length: float) -> float:
    """Launch work for `length` seconds on a stream that sleeps as long, then wait for all of it.

    Returns the seconds of the longest `work`: the launch queue is full after some thousand launches, and it waits.
    """
    if device.type == "cuda":
        cycles = 100_000_000
        torch.cuda._sleep(cycles)  # wakes up the clocks
        per_second = cycles / timed(partial(torch.cuda._sleep, cycles), device).seconds
        torch.cuda._sleep(int(length * per_second))
    began, longest = time.monotonic(), 0.0
    while (now := time.monotonic()) < began + length:
        work()
        longest = max(longest, time.monotonic() - now)
    synchronize(device)
    return longest


def compiling(setting: Setting, found: Findings) -> None:
    """engine.compile: how long it takes, that it happens once, and what becomes of the loss."""
    from torch._dynamo.utils import counters

    steps = steps_of(setting, "68m", 32)
    expected = steps.of(BF16)().item()
    step = steps.of(COMPILED)
    turn = timed(step, setting.device)
    graphs = counters["stats"]["unique_graphs"]
    again = [timed(step, setting.device) for _ in range(3)]
    recompiled = counters["stats"]["unique_graphs"] - graphs
    off = distance([turn.result.item()], [expected])
    found.note("first_step_seconds", turn.seconds)
    found.note("step_seconds", statistics.median(seconds(again)))
    found.note("graphs", graphs)
    found.note("recompiled", recompiled)
    found.note("loss", off)
    found.expect(turn.seconds < 60 or not setting.cuda, f"compiling took {turn.seconds:.0f} s")
    found.expect(recompiled == 0, f"{recompiled} regions were compiled again")
    found.expect(off <= 0.005, f"the loss is {off:.2%} off the eager one")


def speed(setting: Setting, found: Findings) -> None:
    """Training steps against the device's own matrix products; launches, idle time, and memory against `estimate`."""
    rate = device_rate(setting.device)
    found.note("bf16_tflops", rate / 1e12)
    aims = {("68m", 4): None, ("68m", 32): 0.30, ("1b", 32): 0.45}
    for (model, batch), aim in setting.pick(aims, {("68m", 32): None}).items():
        steps = steps_of(setting, model, batch)
        name = f"{model}, {batch}"
        try:
            figures = speed_of(setting, steps, rate, graph=model == "68m", compiled=(model, batch) == ("68m", 32))
        except torch.OutOfMemoryError:
            found.note(name, "does not fit")
            continue
        found.note(name, figures)
        best = max(way["utilisation"] for way in figures["ways"].values())
        found.note(f"{name}, best", {"utilisation": best, "aim": aim})
        off = figures["peak_gb"] / figures["estimated_gb"] - 1
        found.expect(abs(off) <= 0.15 or not setting.cuda, f"{name}: peak memory is {off:+.0%} off the estimate")
        del steps
        gc.collect()  # compiled regions refer to themselves
        if setting.cuda:
            torch.cuda.empty_cache()


def device_rate(device: torch.device) -> float:
    """FLOP/s of large bf16 matrix products."""
    pair = products(Precision.bf16, device)
    turns = alternate({product.name: product.run for product in pair}, 3, device)
    return statistics.median(matmul_rate([(product, turns[product.name]) for product in pair]).rates)


def speed_of(setting: Setting, steps: Steps, rate: float, *, graph: bool, compiled: bool) -> dict[str, Any]:
    """Figures of one size of model and batch."""
    config, device = steps.config, setting.device
    batch = config.train.batch_size
    flops = batch * training_flops_per_image(on_meta(config.model), config.data.crop)
    bf16 = replace(config, engine=compose(["engine=accelerate", "engine.precision=bf16"]).engine)
    eager = steps.of(BF16)
    figures: dict[str, Any] = {
        "peak_gb": peak_of_step(eager, device) / 1e9,
        "estimated_gb": estimate(bf16, 1).memory.device / 1e9,
        "ways": {},
    }

    def measure(name: str, work: Callable[[], Any]) -> None:
        second = statistics.median(seconds(alternate({name: work}, setting.pick(3, 1), device)[name]))
        utilisation = flops / second / rate
        figures["ways"][name] = {"seconds": second, "utilisation": utilisation} | launches(work, device, second)

    measure("eager", eager)
    if compiled:
        measure("compiled", steps.of(COMPILED))
    if graph:
        try:
            captured = graphed(eager.gradients, device, steps.drop_gradients)

            def replayed() -> None:
                captured()
                steps.optimize(drop=False)  # the graph writes the gradients where they are

            measure("graph", replayed)
        except RuntimeError as error:
            figures["no_graph"] = in_a_line(error)
        steps.drop_gradients()
    return figures


def peak_of_step(step: Step, device: torch.device) -> int:
    """Bytes on the device at the peak of a step, weights, gradients and moments included; 0 on a CPU."""
    step()
    if device.type != "cuda":
        return 0
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def launches(work: Callable[[], Any], device: torch.device, second: float) -> dict[str, float]:
    """Launches of kernels and graphs in a step that takes `second` seconds, and the part of it without a kernel."""
    with profile(
        activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    ) as trace:
        timed(work, device)
    events = list(trace.events())
    launched = sum(re.match(r"cu(da)?(LaunchKernel|GraphLaunch)", event.name) is not None for event in events)
    kernels = [event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation]
    busy = sum(event.time_range.elapsed_us() for event in kernels) / 1e6
    return {"launches": launched, "kernels": len(kernels), "idle": max(0.0, 1 - busy / second)}


POINTWISE = ((96, 384, 128), (384, 96, 128), (192, 768, 64), (384, 1536, 32), (960, 1920, 16), (960, 1920, 4))
"""Inputs, outputs, side: of 68m at crops of 256²."""
DEPTHWISE = ((960, 16), (960, 8), (960, 4), (640, 16))
"""Channels, side."""
WINDOWS = ((4, 32, 64, 20), (1, 32, 16, 20))
"""Windows of an image, heads, positions, channels of a head."""
REPEATED = 20
"""Runs of a layer in one timing."""


def kernels(setting: Setting, found: Findings) -> None:
    """Ways to compute a layer, forward and backward in bf16, on the device alone: is ours the fastest?"""
    device, chosen = setting.device, setting.pick(slice(None), slice(-1, None))
    for batch in setting.pick((4, 32), (1,)):
        for inputs, outputs, side in POINTWISE[chosen]:
            ways = pointwise_ways(inputs, outputs, batch, side, device)
            contest(setting, found, f"1×1, {inputs} → {outputs}, {batch} × {side}²", ways)
        for channels, side in DEPTHWISE[chosen]:
            ways = depthwise_ways(channels, batch, side, device)
            contest(setting, found, f"depthwise, {channels}, {batch} × {side}²", ways)
        for windows, heads, positions, width in WINDOWS[chosen]:
            shape = (batch * windows, heads, positions, width)
            contest(setting, found, f"attention, {' × '.join(map(str, shape))}", attention_ways(shape, device))


Ways = dict[str, Callable[[], Any]]


def contest(setting: Setting, found: Findings, layer: str, ways: Ways) -> None:
    """Time the ways in turns; the first is ours, and those in brackets are for comparison alone."""
    ours, ready = next(iter(ways)), {}
    for name, work in ways.items():
        try:
            work()
            ready[name] = graphed(partial(repeat, work, REPEATED), setting.device)
        except RuntimeError:  # noqa: PERF203 (some milliseconds each)
            if name == ours:
                raise
            # There is no such kernel for this shape, or it cannot be captured.
    turns = alternate(ready, setting.pick(5, 1), setting.device)
    took = {name: 1e6 * statistics.median(seconds(turns[name])) / REPEATED for name in ready}
    found.note(layer, took)
    fastest = min((name for name in took if not name.startswith("(")), key=took.get)
    slower = took[ours] / took[fastest]
    found.expect(slower <= 1.15 or not setting.cuda, f"{layer}: {fastest} is {slower:.2f}× as fast as {ours}")


def repeat(work: Callable[[], Any], times: int) -> None:
    """Do it so often."""
    for _ in range(times):
        work()


def both_ways(layer: Callable[[Tensor], Tensor], x: Tensor, weights: Sequence[Tensor]) -> Callable[[], Any]:
    """Forward under autocast, and backward, of a layer at an input that wants a gradient, too."""
    x = x.detach().requires_grad_()

    def run_both() -> Any:
        with torch.autocast(x.device.type, torch.bfloat16):
            result = layer(x)
        return torch.autograd.grad(result, [x, *weights], result.detach())

    return run_both


def pointwise_ways(inputs: int, outputs: int, batch: int, side: int, device: torch.device) -> Ways:
    """A 1×1 convolution."""
    x = torch.randn(batch, inputs, side, side, device=device).bfloat16().to(memory_format=torch.channels_last)
    layer = Pointwise(inputs, outputs).to(device)
    layer.reduced = True
    weight, bias = layer.weight, layer.bias

    def as_product(x: Tensor) -> Tensor:
        return product(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)

    ways = {"ours": layer, "convolution": lambda x: F.conv2d(x, weight, bias), "product": as_product}
    return {name: both_ways(way, x, [weight, bias]) for name, way in ways.items()}


def depthwise_ways(channels: int, batch: int, side: int, device: torch.device) -> Ways:
    """A depthwise 3×3 convolution: as the context model has it, and in the other memory format."""
    x = torch.randn(batch, channels, side, side, device=device).bfloat16()
    layer = depthwise_block(channels).spatial.to(device)
    last = x.to(memory_format=torch.channels_last)

    def converting(x: Tensor) -> Tensor:
        return layer(x.contiguous()).contiguous(memory_format=torch.channels_last)

    weights = [layer.weight, layer.bias]
    return {
        "ours": both_ways(layer, last, weights),
        "NCHW between conversions": both_ways(converting, last, weights),
        "(NCHW)": both_ways(layer, x, weights),
    }


def attention_ways(shape: tuple[int, ...], device: torch.device) -> Ways:
    """Attention in windows, with every backend that torch has for it."""
    query, key, value = (torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(3))
    chosen = SDPBackend(torch._fused_sdp_choice(query, key, value)).name

    def within(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
        def attention(query: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value)

        return attention

    def as_products(query: Tensor) -> Tensor:
        return ((query * shape[-1] ** -0.5) @ key.transpose(-1, -2)).softmax(dim=-1) @ value

    ways: dict[str, Callable[[Tensor], Tensor]] = {f"ours ({chosen})": lambda query: attend(query, key, value)}
    names = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    ways |= {name: within(getattr(SDPBackend, name)) for name in names}
    return {name: both_ways(way, query, [key, value]) for name, way in (ways | {"products": as_products}).items()}


def whole_graph(setting: Setting, found: Findings) -> None:
    """Forward and backward of nano as one CUDA graph."""
    steps = steps_of(setting, "nano", 2)
    step = steps.of(BF16)
    expected = step.gradients().item()
    steps.drop_gradients()
    captured = graphed(step.gradients, setting.device, steps.drop_gradients)
    replayed = captured().item()

    def eager() -> None:
        steps.drop_gradients()
        step.gradients()

    turns = alternate({"eager": eager, "graph": captured}, setting.pick(10, 2), setting.device)
    found.note("loss", distance([replayed], [expected]))
    found.note("speed_up", ratio(seconds(turns["eager"]), seconds(turns["graph"])).median)
    found.note("eager_seconds", statistics.median(seconds(turns["eager"])))
    found.expect(
        distance([replayed], [expected]) <= 1e-4, f"the loss is {replayed:.6g}, without a graph {expected:.6g}"
    )


def against_plain(setting: Setting, found: Findings) -> None:
    """bf16 as it is trained against the plain NCHW fp32 step of the same network, in turns."""
    steps = steps_of(setting, "68m", 32)
    ways = {"plain": PLAIN, "eager": BF16, **({"compiled": COMPILED} if setting.cuda else {})}
    turns = alternate({name: steps.of(way) for name, way in ways.items()}, setting.pick(5, 3), setting.device)
    took = {name: statistics.median(seconds(each)) for name, each in turns.items()}
    fastest = min((name for name in took if name != "plain"), key=took.get)
    faster = ratio(seconds(turns["plain"]), seconds(turns[fastest]))
    found.note("seconds", took)
    found.note("fastest", fastest)
    found.note("times_as_fast", faster.median)
    found.expect(faster.median >= 8 or not setting.cuda, f"{fastest} is {faster.median:.1f}× as fast as plain fp32")
