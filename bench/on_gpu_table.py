"""The Markdown table of on_gpu.py's results: one row per piece, ready for docs/benchmarks.md.

Guarantees: every piece has a row, also one that failed, ran into the limit or was not run; each row names its device
where results of several are mixed, and rehearsals are marked as such.
"""

from __future__ import annotations

from typing import Any, Callable, Mapping

Numbers = Callable[[Any], str]  # of a piece's report


def tests(report: Any) -> str:
    counted = f"{report['passed']} passed, {len(report['skipped'])} skipped"
    return counted + (f", failed: {', '.join(report['failed'])}" if report["failed"] else "")


def train_7b(report: Any) -> str:
    """Of each depth, its speed, its memory beside the planner's, and where a step's time goes beside the limits."""
    found = [f"{report['case']}, {report['preset']}, {report['accumulation']} pack(s) of {report['tokens']:,} tokens"]
    for one in report["runs"]:
        if "failed" in one:
            found.append(f"{one['layers']} layers failed")
            continue
        mfu = "" if one["mfu"] is None else f"MFU {one['mfu']:.1%}, "
        found.append(
            f"{one['layers']} layers: {one['tokens_per_second']:.0f} tokens/s, {one['step_seconds']:.1f} s per step, "
            f"{mfu}device {one['device_gib']:.2f} GiB ({one['planned_device_gib']:.2f} planned), host "
            f"{one['host_gib']:.2f} ({one['planned_host_gib']:.2f}), {_step_parts(one)}"
        )
    if whole := report["extrapolated"]:
        found.append(
            f"{whole['layers']} layers, extrapolated: device {whole['device_gib']}, host {whole['host_gib']}, "
            f"{whole['step_seconds']} s per step"
        )
    return "; ".join(found)


def _step_parts(run: Any) -> str:
    """Shares of a profiled step, then of the limits that the timed ones reach."""
    profiled, roofline = run["profiled"], run["roofline"]
    shares = ", ".join(f"{name} {part / profiled['step_seconds']:.0%}" for name, part in profiled["split"].items())
    copies = "".join(f", {way} at {one['gib_per_second']:.0f} GiB/s" for way, one in profiled["copies"].items())
    reached = f"{roofline['reached']:.0%} of the {roofline['largest']} limit"
    if roofline["layers_reached"] is not None:
        reached += f", {roofline['layers_reached']:.0%} of the linear layers'"
    return f"{shares}{copies}, {reached}"


def saving(report: Any) -> str:
    found = [
        f"{preset}: {one['overlapped_still_seconds']} s without training where the save of {one['checkpoint_gib']} GiB "
        f"overlaps it, else {one['foreground_still_seconds']} s"
        for preset, one in report["presets"].items()
    ]
    return f"{report['parameters']:,} parameters, {report['ranks']} rank(s). {'; '.join(found)}"


def cost_model(report: Any) -> str:
    found = []
    for part, one in report["parts"].items():
        ours = next(line for line in one["lines"] if line["counted"] == "cost")
        weights = ", ".join(f"{term} {weight:.2f}" for term, weight in one["weights"].items())
        found.append(f"{part}: spread {ours['spread']:.1%}, worst {ours['worst']:.1%}; a FLOP takes by term: {weights}")
    return ". ".join(found)


def nvme_step(report: Any) -> str:
    return "; ".join(
        f"{name}: {one['read_gib']:.2f} GiB read, {one['written_gib']:.2f} written, swapping at {one['swapping']:.2f} "
        f"of a plain copy's rate"
        for name, one in report.items()
    )


def inference(report: Any) -> str:
    found = []
    for kind in ("images", "tokens"):
        rates = [f"{name} {one['per_second']:.3g}" for name, one in report[kind].items()]
        found.append(f"{kind} per second: {', '.join(rates)}")
    if report["peak_gpu_gib"] is not None:
        limit = report["max_gpu_memory"]
        found.append(f"{report['peak_gpu_gib']:.1f} GiB at the peak" + (f", limit {limit}" if limit else ""))
    return f"{report['parameters']:,} parameters, {report['prompts']} prompts. {'; '.join(found)}"


def attention(report: Any) -> str:
    """Of each pack, or length of segments, the speed of every way beside sdpa's."""
    found = []
    for case in report.get("cases", report.get("sweep")):
        rates = [
            f"{name} {one['ratio']:.2f} ({one['tflops']:.0f} TFLOP/s"
            + (")" if one["peak_gib"] is None else f", {one['peak_gib']:.2f} GiB)")
            for name, one in case["ways"].items()
        ]
        what = case["pack"] if "pack" in case else f"segments of {case['segment']}"
        found.append(f"{what}, {case['tokens']:,} tokens: {', '.join(rates)}")
    missing = [f"no {name} ({fault})" for name, fault in report.get("unavailable", {}).items()]
    return f"{report['precision']}, heads {report['heads']}, times sdpa's speed. {'; '.join(found + missing)}"


def pointwise(report: Any) -> str:
    """Of each part, the speed of fused kernels beside torch's own."""
    found = [
        f"{name}, {direction} {one['ratio']:.2f} ({one['gb_per_second']['fused']:.0f} GB/s)"
        for name, part in report["parts"].items()
        for direction, one in part.items()
    ]
    took = ", ".join(f"{way} {ms:.1f} ms" for way, ms in report["layer"]["ms"].items())
    return (
        f"{report['precision']}, {report['tokens']:,} tokens, compiled and tried in "
        f"{report['compiled_and_tried_seconds']:.0f} s. All of a layer: {took}. Times the speed of torch's own: "
        f"{'; '.join(found)}"
    )


# By the script's name; tests/gpu share one.
NUMBERS: dict[str, Numbers] = {
    "tests": tests,
    "attention": attention,
    "train_7b": train_7b,
    "pointwise": pointwise,
    "saving": saving,
    "cost_model": cost_model,
    "nvme_step": nvme_step,
    "inference": inference,
}


def table(results: Mapping[str, Any], numbers: Mapping[str, Numbers]) -> str:
    """`results` by piece, those that were run; `numbers` of all pieces, in their order."""
    machines = list(dict.fromkeys(_machine(result) for result in results.values()))
    lines = [*machines, "", "| piece | device | result | seconds | numbers |", "|---|---|---|---|---|"]
    for name, say in numbers.items():
        result = results.get(name)
        if result is None:
            lines.append(f"| {name} | | not run | | |")
            continue
        report = result["report"]
        shown = "" if report is None else say(report).replace("|", "\\|").replace("\n", " ")
        lines.append(f"| {name} | {result['device']} | {_outcome(result)} | {result['seconds']:.0f} | {shown} |")
    return "\n".join(lines) + "\n"


def _outcome(result: Any) -> str:
    if result["exit_code"] == 0:
        return "no report" if result["report"] is None else "ok"
    return "**past the limit**" if result["exit_code"] == 124 else f"**exit code {result['exit_code']}**"


def _machine(result: Any) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
    rehearsed = "Rehearsed at toy size, these are no measurements: " if result["rehearsed"] else ""
    return f"{rehearsed}{result['devices']} x {result['device']} ({versions})."
