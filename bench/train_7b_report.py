"""What a run of train_7b.py has measured, and the report of it in words.

Guarantees: speeds are medians over the timed steps. The GPU's memory is the peak of the whole run, host memory that up
to the profile, because the profiler keeps what it has seen. A run that failed gives the end of its output instead.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

from bagel_ds.data.plan.cost import Work
from bagel_ds.units import GIB
from bench.host_memory import gib
from bench.measured_run import Measured
from bench.time_split import StepTimes, read_trace, step_times


def measurements(launch: Measured, results: Path, profile: range, timed: int) -> dict[str, Any]:
    """What a run's files and lines say. `profile`: the steps with the profiler; `timed` steps come after them."""
    log, trace = results / "metrics.jsonl", results / "profile" / "trace.json.gz"
    steps = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    if launch.code != 0 or len(steps) < profile.stop + timed or not trace.exists():
        return {"failed": launch.output[-3000:]}

    later = {f"step_{number}" for number in range(profile.start, profile.stop + timed)}

    def median(name: str) -> float | None:
        found = [step[name] for step in steps[profile.stop :] if step.get(name) is not None]
        return statistics.median(found) if found else None

    return {
        "step_seconds": median("perf/step_seconds"),
        "tokens_per_second": median("perf/tokens_per_sec"),
        "mfu": median("perf/mfu"),
        "device_gib": round(max(step.get("memory/device_reserved_gib") or 0.0 for step in steps), 3),
        "host_gib": gib(launch.peak(*launch.peaks.keys() - later)),
        "packs": packs_of(launch.output, profile.stop),
        "profiled": profile_numbers(step_times(read_trace(trace))),
    }


def packs_of(output: str, first_step: int) -> list[dict[str, Any]]:
    """The packs of the steps from `first_step` on, as generated_train.py names them."""
    lines = [line.split(maxsplit=2) for line in output.splitlines() if line.startswith("PACK ")]
    return [json.loads(pack) for _, step, pack in lines if int(step) >= first_step]


def work_of_pack(pack: dict[str, Any]) -> Work:
    return Work(
        und_tokens=pack["text"] + pack["vit"],
        gen_tokens=pack["latents"],
        ce_tokens=pack["labels"],
        attention_pairs=pack["pairs"],
        vit_patches=tuple(pack["vit_patches"]),
        vae_pixels=tuple(pack["vae_pixels"]),
    )


def mean_pack(packs: list[dict[str, Any]]) -> dict[str, float]:
    counts = ("samples", "text", "vit", "latents", "drawn", "labels")
    found = {name: statistics.mean(pack[name] for pack in packs) for name in counts}
    found["tokens"] = found["text"] + found["vit"] + found["latents"]
    found["visible_keys"] = statistics.mean(pack["pairs"] for pack in packs) / found["tokens"]
    return {name: round(value, 1) for name, value in found.items()}


def profile_numbers(times: StepTimes) -> dict[str, Any]:
    copies = {
        way: {"seconds": one.seconds, "gib": one.nbytes / GIB, "gib_per_second": one.rate / GIB}
        for way, one in times.copies.items()
    }
    return {"step_seconds": times.seconds, "split": times.split._asdict(), "copies": copies}


def extrapolated(one: dict[str, Any], two: dict[str, Any], to: int) -> dict[str, Any] | None:
    """What `to` layers would take if each added what the last of these did."""
    layers = two["layers"] - one["layers"]
    if "failed" in one or "failed" in two or not layers:
        return None
    names = ("device_gib", "planned_device_gib", "host_gib", "planned_host_gib", "step_seconds")
    added = {name: (two[name] - one[name]) / layers for name in names}
    whole = {name: round(two[name] + added[name] * (to - two["layers"]), 2) for name in names}
    return {"layers": to, "per_layer": {name: round(value, 3) for name, value in added.items()}, **whole}


def lines(report: dict[str, Any]) -> list[str]:
    cap = "" if report["cap_gib"] is None else f", at most {report['cap_gib']:.0f} GiB of the GPU"
    packs = f"{report['accumulation']} pack(s) of up to {report['tokens']:,} tokens per step"
    found = [f"{report['device']}, {report['case']}: {report['preset']}, {packs}{cap}"]
    for run in report["runs"]:
        found += [f"  {line}" for line in run_lines(run)]
    if whole := report["extrapolated"]:
        found.append(
            f"  {whole['layers']} layers, extrapolated: device {whole['device_gib']} ({whole['planned_device_gib']} "
            f"planned), host {whole['host_gib']} ({whole['planned_host_gib']}), {whole['step_seconds']} s per step"
        )
    return found


def run_lines(run: dict[str, Any]) -> list[str]:
    sizes = f"{run['layers']} layers, {run['parameters']:,} parameters and {run['trained']:,} that train"
    if "failed" in run:
        return [f"{sizes}: failed: {run['failed'].strip().splitlines()[-1]}"]
    mfu = "" if run["mfu"] is None else f", MFU {run['mfu']:.1%}"
    speed = f"{run['step_seconds']:.2f} s per step, {run['tokens_per_second']:,.0f} tokens/s{mfu}"
    pack = run["packs"]
    return [
        f"{sizes}: {speed}",
        f"  GiB at the peak (planned): device {run['device_gib']:.2f} ({run['planned_device_gib']:.2f}), "
        f"host {run['host_gib']:.2f} ({run['planned_host_gib']:.2f})",
        f"  a pack: {pack['samples']:.1f} samples, {pack['tokens']:,.0f} tokens: {pack['text']:,.0f} of text, "
        f"{pack['vit']:,.0f} to see, {pack['latents']:,.0f} latents of which {pack['drawn']:,.0f} are drawn; "
        f"a token sees {pack['visible_keys']:,.0f} keys",
        *profile_lines(run["profiled"]),
        *roofline_lines(run["roofline"], run["flops_per_weight"]),
    ]


def profile_lines(profiled: dict[str, Any]) -> list[str]:
    whole = profiled["step_seconds"]
    parts = [f"{name} {seconds:.2f} s ({seconds / whole:.0%})" for name, seconds in profiled["split"].items()]
    copies = [
        f"{way} {one['gib']:.1f} GiB in {one['seconds']:.2f} s, {one['gib_per_second']:.1f} GiB/s"
        for way, one in profiled["copies"].items()
    ]
    return [f"  a profiled step, {whole:.2f} s: {', '.join(parts)}"] + [f"  copies {each}" for each in copies]


def roofline_lines(roofline: dict[str, Any], flops_per_weight: dict[str, int]) -> list[str]:
    known = [f"{name} {seconds:.2f} s" for name, seconds in roofline["seconds"].items() if seconds is not None]
    found = [f"  limits: {', '.join(known)}; the step reaches {roofline['reached']:.0%} of {roofline['largest']}"]
    if roofline["layers_seconds"] is not None:
        each = ", ".join(f"{flops} for {expert}" for expert, flops in flops_per_weight.items())
        found.append(
            f"  linear layers (FLOP per weight and token: {each}): {roofline['layers_seconds']:.2f} s, of which the "
            f"step reaches {roofline['layers_reached']:.0%}; the limits allow {roofline['layers_attainable']:.0%}"
        )
    return found
