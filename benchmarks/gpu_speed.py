"""Checks of gpu_acceptance.py that only a GPU can pass: launches, compilation, speed, kernels, graphs.

All functions run on a CPU, too, where the work replaces a CUDA graph and a stream does not sleep.
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
from bench.step import REFERENCE, Step, Steps, Variant
from bench.timing import alternate, ratio, seconds, synchronize, timed
from gpu_findings import Findings, Setting, distance
from torch import Tensor
from torch.autograd import DeviceType
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from hpcm_scale.config.compose import compose
from hpcm_scale.config.schema import Precision
from hpcm_scale.config.spec import RunSpec
from hpcm_scale.errors import first_line
from hpcm_scale.model.arithmetic import attend, product
from hpcm_scale.model.layers import Pointwise, depthwise_block
from hpcm_scale.model.parameters import on_meta
from hpcm_scale.training.costs import training_flops_per_image
from hpcm_scale.training.estimate import estimate

BF16 = Variant(Precision.bf16)
COMPILED = Variant(Precision.bf16, compiled=True)


def graphed(work: Callable[[], Any], device: torch.device, clear: Callable[[], None] = lambda: None) -> Callable:
    """Capture `work` as a CUDA graph; returns a function that replays it and returns its result. On a CPU, `work`.

    `clear` is called before the capture: gradients that exist then are added to, others are overwritten.
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
    """Another thread keeps running while the main thread waits for a full launch queue."""
    length = setting.pick(5.0, 0.5)
    steps = steps_of(setting, "nano", 2)
    for name, variant in {"eager": BF16, "compiled": COMPILED}.items():
        step = steps.of(variant)
        step()  # compiles
        steps.drop_gradients()
        behind = partial(behind_a_sleeping_stream, step.gradients, setting.device, length)
        gap, launch = longest_gap(behind)
        found.note(name, {"longest_gap": gap, "longest_launch": launch})
        full = launch > length / 2
        found.expect(
            full or not setting.cuda, f"{name}: no launch waited for the stream; the longest took {launch:.1f} s"
        )
        found.expect(gap < 2, f"{name}: another thread was blocked for {gap:.1f} s")


def longest_gap(work: Callable[[], Any], tick: float = 0.1) -> tuple[float, Any]:
    """Longest time between two ticks of another thread while `work` runs, seconds, and the result of `work`."""
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
    """Launch work for `length` seconds on a stream that sleeps as long, then synchronize.

    Returns the seconds of the longest call of `work`, which waits once the launch queue is full.
    """
    if device.type == "cuda":
        cycles = 100_000_000
        torch.cuda._sleep(cycles)  # raises the clock rates
        per_second = cycles / timed(partial(torch.cuda._sleep, cycles), device).seconds
        torch.cuda._sleep(int(length * per_second))
    began, longest = time.monotonic(), 0.0
    while (now := time.monotonic()) < began + length:
        work()
        longest = max(longest, time.monotonic() - now)
    synchronize(device)
    return longest


def compiling(setting: Setting, found: Findings) -> None:
    """engine.compile: its time, that it compiles once, and the loss."""
    from torch._dynamo.utils import counters

    steps = steps_of(setting, "68m", 32)
    expected = steps.of(BF16)().item()
    step = steps.of(COMPILED)
    sample = timed(step, setting.device)
    graphs = counters["stats"]["unique_graphs"]
    again = [timed(step, setting.device) for _ in range(3)]
    recompiled = counters["stats"]["unique_graphs"] - graphs
    off = distance([sample.result.item()], [expected])
    found.note("first_step_seconds", sample.seconds)
    found.note("step_seconds", statistics.median(seconds(again)))
    found.note("graphs", graphs)
    found.note("recompiled", recompiled)
    found.note("loss", off)
    found.expect(sample.seconds < 60 or not setting.cuda, f"compiling took {sample.seconds:.0f} s")
    found.expect(recompiled == 0, f"{recompiled} regions were compiled again")
    found.expect(off <= 0.005, f"the loss differs from the eager one by {off:.2%}")


def speed(setting: Setting, found: Findings) -> None:
    """Training steps relative to large matrix products; launches, idle time, and memory relative to `estimate`."""
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
        best = max(variant["utilisation"] for variant in figures["variants"].values())
        found.note(f"{name}, best", {"utilisation": best, "aim": aim})
        off = figures["peak_gb"] / figures["estimated_gb"] - 1
        found.expect(abs(off) <= 0.15 or not setting.cuda, f"{name}: peak memory is {off:+.0%} from the estimate")
        del steps
        gc.collect()  # compiled regions are reference cycles
        if setting.cuda:
            torch.cuda.empty_cache()


def device_rate(device: torch.device) -> float:
    """FLOP/s of large bf16 matrix products."""
    pair = products(Precision.bf16, device)
    samples = alternate({product.name: product.run for product in pair}, 3, device)
    return statistics.median(matmul_rate([(product, samples[product.name]) for product in pair]).rates)


def speed_of(setting: Setting, steps: Steps, rate: float, *, graph: bool, compiled: bool) -> dict[str, Any]:
    """Figures of one size of model and batch."""
    config, device = steps.config, setting.device
    batch = config.train.batch_size
    flops = batch * training_flops_per_image(on_meta(config.model), config.data.crop)
    bf16 = replace(config, engine=compose(["engine=accelerate", "engine.precision=bf16"]).engine)
    eager = steps.of(BF16)
    needs = estimate(RunSpec.of(bf16, 1), bf16.model, bf16.engine, bf16.optimizer, averages=0)
    figures: dict[str, Any] = {
        "peak_gb": peak_of_step(eager, device) / 1e9,
        "estimated_gb": needs.memory.device / 1e9,
        "variants": {},
    }

    def measure(name: str, work: Callable[[], Any]) -> None:
        second = statistics.median(seconds(alternate({name: work}, setting.pick(3, 1), device)[name]))
        utilisation = flops / second / rate
        figures["variants"][name] = {"seconds": second, "utilisation": utilisation} | launches(work, device, second)

    measure("eager", eager)
    if compiled:
        measure("compiled", steps.of(COMPILED))
    if graph:
        try:
            captured = graphed(eager.gradients, device, steps.drop_gradients)

            def replayed() -> None:
                captured()
                steps.optimize(drop=False)  # the graph writes to the same gradients

            measure("graph", replayed)
        except RuntimeError as error:
            figures["no_graph"] = first_line(error)
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
    """Launches of kernels and graphs in a step of `second` seconds, and the share of time without a kernel."""
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
"""Inputs, outputs, side, in 68m at crops of 256²."""
DEPTHWISE = ((960, 16), (960, 8), (960, 4), (640, 16))
"""Channels, side."""
WINDOWS = ((4, 32, 64, 20), (1, 32, 16, 20))
"""Windows of an image, heads, positions, channels of a head."""
REPEATED = 20
"""Runs of a layer per measurement."""


def kernels(setting: Setting, found: Findings) -> None:
    """Compare variants of a layer, forward and backward in bf16, by device time: ours should be the fastest."""
    device, chosen = setting.device, setting.pick(slice(None), slice(-1, None))
    for batch in setting.pick((4, 32), (1,)):
        for inputs, outputs, side in POINTWISE[chosen]:
            variants = pointwise_variants(inputs, outputs, batch, side, device)
            compare_variants(setting, found, f"1×1, {inputs} → {outputs}, {batch} × {side}²", variants)
        for channels, side in DEPTHWISE[chosen]:
            variants = depthwise_variants(channels, batch, side, device)
            compare_variants(setting, found, f"depthwise, {channels}, {batch} × {side}²", variants)
        for windows, heads, positions, width in WINDOWS[chosen]:
            shape = (batch * windows, heads, positions, width)
            compare_variants(
                setting, found, f"attention, {' × '.join(map(str, shape))}", attention_variants(shape, device)
            )


Variants = dict[str, Callable[[], Any]]


def compare_variants(setting: Setting, found: Findings, layer: str, variants: Variants) -> None:
    """Time the variants alternately; the first is ours, those in brackets are for information only."""
    ours, ready = next(iter(variants)), {}
    for name, work in variants.items():
        try:
            work()
            ready[name] = graphed(partial(repeat, work, REPEATED), setting.device)
        except RuntimeError:  # noqa: PERF203 (some milliseconds each)
            if name == ours:
                raise
            # No such kernel exists for this shape, or it cannot be captured.
    samples = alternate(ready, setting.pick(5, 1), setting.device)
    took = {name: 1e6 * statistics.median(seconds(samples[name])) / REPEATED for name in ready}
    found.note(layer, took)
    fastest = min((name for name in took if not name.startswith("(")), key=took.get)
    slower = took[ours] / took[fastest]
    found.expect(slower <= 1.15 or not setting.cuda, f"{layer}: {fastest} is {slower:.2f}× as fast as {ours}")


def repeat(work: Callable[[], Any], times: int) -> None:
    """Call `work` several times."""
    for _ in range(times):
        work()


def forward_backward(layer: Callable[[Tensor], Tensor], x: Tensor, weights: Sequence[Tensor]) -> Callable[[], Any]:
    """A function that runs a layer forward under autocast and backward, to input and weights."""
    x = x.detach().requires_grad_()

    def run_both() -> Any:
        with torch.autocast(x.device.type, torch.bfloat16):
            result = layer(x)
        return torch.autograd.grad(result, [x, *weights], result.detach())

    return run_both


def pointwise_variants(inputs: int, outputs: int, batch: int, side: int, device: torch.device) -> Variants:
    """A 1×1 convolution."""
    x = torch.randn(batch, inputs, side, side, device=device).bfloat16().to(memory_format=torch.channels_last)
    layer = Pointwise(inputs, outputs).to(device)
    layer.reduced = True
    weight, bias = layer.weight, layer.bias

    def as_product(x: Tensor) -> Tensor:
        return product(x.permute(0, 2, 3, 1), weight, bias).permute(0, 3, 1, 2)

    variants = {"ours": layer, "convolution": lambda x: F.conv2d(x, weight, bias), "product": as_product}
    return {name: forward_backward(variant, x, [weight, bias]) for name, variant in variants.items()}


def depthwise_variants(channels: int, batch: int, side: int, device: torch.device) -> Variants:
    """A depthwise 3×3 convolution, as in the context model and in the other memory format."""
    x = torch.randn(batch, channels, side, side, device=device).bfloat16()
    layer = depthwise_block(channels).spatial.to(device)
    last = x.to(memory_format=torch.channels_last)

    def converting(x: Tensor) -> Tensor:
        return layer(x.contiguous()).contiguous(memory_format=torch.channels_last)

    weights = [layer.weight, layer.bias]
    return {
        "ours": forward_backward(layer, last, weights),
        "NCHW between conversions": forward_backward(converting, last, weights),
        "(NCHW)": forward_backward(layer, x, weights),
    }


def attention_variants(shape: tuple[int, ...], device: torch.device) -> Variants:
    """Window attention with every backend of torch."""
    query, key, value = (torch.randn(shape, device=device).bfloat16().requires_grad_() for _ in range(3))
    chosen = SDPBackend(torch._fused_sdp_choice(query, key, value)).name

    def within(backend: SDPBackend) -> Callable[[Tensor], Tensor]:
        def attention(query: Tensor) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(query, key, value)

        return attention

    def as_products(query: Tensor) -> Tensor:
        return ((query * shape[-1] ** -0.5) @ key.transpose(-1, -2)).softmax(dim=-1) @ value

    variants: dict[str, Callable[[Tensor], Tensor]] = {f"ours ({chosen})": lambda query: attend(query, key, value)}
    names = ("FLASH_ATTENTION", "EFFICIENT_ATTENTION", "CUDNN_ATTENTION", "MATH")
    variants |= {name: within(getattr(SDPBackend, name)) for name in names}
    variants["products"] = as_products
    return {name: forward_backward(variant, query, [key, value]) for name, variant in variants.items()}


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

    samples = alternate({"eager": eager, "graph": captured}, setting.pick(10, 2), setting.device)
    found.note("loss", distance([replayed], [expected]))
    found.note("speed_up", ratio(seconds(samples["eager"]), seconds(samples["graph"])).median)
    found.note("eager_seconds", statistics.median(seconds(samples["eager"])))
    found.expect(
        distance([replayed], [expected]) <= 1e-4, f"the loss is {replayed:.6g}, and {expected:.6g} without a graph"
    )


def against_reference(setting: Setting, found: Findings) -> None:
    """bf16 training steps relative to fp32 steps of the reference (NCHW, torch's own layers), measured alternately."""
    steps = steps_of(setting, "68m", 32)
    variants = {"reference": REFERENCE, "eager": BF16, **({"compiled": COMPILED} if setting.cuda else {})}
    candidates = {name: steps.of(variant) for name, variant in variants.items()}
    samples = alternate(candidates, setting.pick(5, 3), setting.device)
    took = {name: statistics.median(seconds(each)) for name, each in samples.items()}
    fastest = min((name for name in took if name != "reference"), key=took.get)
    faster = ratio(seconds(samples["reference"]), seconds(samples[fastest]))
    found.note("seconds", took)
    found.note("fastest", fastest)
    found.note("times_as_fast", faster.median)
    found.expect(faster.median >= 8 or not setting.cuda, f"{fastest} is {faster.median:.1f}× as fast as the reference")
