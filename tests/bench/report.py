"""The measurements as one table in Markdown: a section per workload, a line per loader."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.bench.figures import Spread, best_peer, ratio, spread

OWN = ("telar", "telar_loader")
Runs = dict[str, list[dict[str, Any]]]


def table(content: dict[str, Any]) -> str:
    """All sections, for the content of results.json."""
    machine = content["machine"]
    lines = [
        "# Data loaders",
        "",
        f"{content['date']}, {machine['cpu']}, {machine['cores']} cores ({content['cores']} used), "
        f"{machine['memory_bytes'] / 2**30:.0f} GiB, Linux {machine['kernel']}; scale {content['scale']}, "
        f"{content['repeats']} repeats, median (least to greatest).",
        "",
    ]
    for loader, versions in content["versions"].items():
        lines.append(f"- {loader}: " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    lines += [f"- {loader}: not installed: {why}" for loader, why in content["not_installed"].items()]
    for number, (title, section) in SECTIONS.items():
        runs = [run for run in content["runs"] if run["workload"] == number]
        if runs:
            lines += ["", f"## W{number}: {title}", "", *section(runs)]
            absent = [[loader, f"not installed: {why}"] for loader, why in content["not_installed"].items()]
            lines += [f"| {loader} | {why} |" for loader, why in absent]
    return "\n".join(lines) + "\n"


def grouped(runs: list[dict[str, Any]], variant: str | None = None) -> Runs:
    """Results by loader, in the order of measuring."""
    found: Runs = {}
    for run in runs:
        if variant is None or run["variant"] == variant:
            found.setdefault(run["loader"], []).append(run["result"])
    return found


def show(values: list[float], scale: float = 1.0, digits: int = 1) -> str:
    """Median and, of several, the range."""
    if not values:
        return "-"
    found = spread([value * scale for value in values])
    middle = f"{found.middle:,.{digits}f}"
    return middle if found.count == 1 else f"{middle} ({found.low:,.{digits}f} to {found.high:,.{digits}f})"


def why_not(results: list[dict[str, Any]]) -> str | None:
    """Why there are no figures, if so."""
    for result in results:
        if "not_supported" in result:
            return f"not supported: {result['not_supported']}"
        if "failed" in result:
            return f"failed: {result['failed']}"
    return None


def rows(header: list[str], found: Runs, cells: Callable[[str, list[dict[str, Any]]], list[str]]) -> list[str]:
    """A Markdown table; a loader without figures has its reason in the first cell."""
    lines = ["| loader | " + " | ".join(header) + " |", "|" + "---|" * (len(header) + 1)]
    for loader, results in found.items():
        reason = why_not(results)
        line = [reason] + [""] * (len(header) - 1) if reason else cells(loader, results)
        lines.append(f"| {loader} | " + " | ".join(str(cell).replace("|", "/") for cell in line) + " |")
    return lines


def values(results: list[dict[str, Any]], name: str) -> list[float]:
    """One figure of all results that have it."""
    return [result[name] for result in results if name in result]


def throughput(runs: list[dict[str, Any]]) -> list[str]:
    found = grouped(runs)
    lines = rows(
        ["Mtok/s", "Mtok/CPU-s", "peak RSS MB", "PSS MB", "epochs"],
        found,
        lambda _, results: [
            show(values(results, "tokens_per_second"), 1e-6),
            show(values(results, "tokens_per_cpu_second"), 1e-6),
            show(values(results, "peak_rss_bytes"), 1e-6, 0),
            show(values(results, "pss_bytes"), 1e-6, 0),
            show(values(results, "epochs"), 1, 0),
        ],
    )
    rates = {loader: values(results, "tokens_per_cpu_second") for loader, results in found.items()}
    best = best_peer(rates, OWN)
    for own in OWN:
        if best and rates.get(own) and len(rates[own]) == len(rates[best]):
            times: Spread = ratio(rates[own], rates[best])
            text = f"{own} / {best}, the best peer, per CPU-second: {times.middle:.1f} times"
            lines += ["", f"{text} ({times.low:.1f} to {times.high:.1f})."]
    return lines


def slowdown(runs: list[dict[str, Any]]) -> list[str]:
    return rows(
        [
            "slow-down %",
            "waiting for a batch % of a step",
            "step on memory ms",
            "step on loader ms",
            "with one worker: slow-down %",
        ],
        grouped(runs, ""),
        lambda loader, results: [
            show(values(results, "slowdown"), 100, 2),
            show([result["wait_seconds"] / result["memory_step_seconds"] for result in results], 100, 2),
            show(values(results, "memory_step_seconds"), 1e3),
            show(values(results, "loader_step_seconds"), 1e3),
            show(values(grouped(runs, "1 worker").get(loader, []), "slowdown"), 100, 2),
        ],
    )


def start(runs: list[dict[str, Any]]) -> list[str]:
    plans = sorted(
        {run["variant"] for run in runs if run["variant"].startswith("plan")}, key=lambda name: float(name.split()[1])
    )

    def cells(loader: str, results: list[dict[str, Any]]) -> list[str]:
        line = [
            show(values(results, "process_to_first_batch_seconds"), 1, 2),
            show(values(results, "import_seconds"), 1, 2),
            show(values(results, "first_batch_seconds"), 1, 3),
            show(values(results, "rss_bytes"), 1e-6, 0),
        ]
        for plan in plans:
            made = grouped(runs, plan).get(loader, [])
            reason = why_not(made)
            if reason or not made:
                line.append(reason or "-")
            else:
                line.append(f"{made[0]['plan_seconds']:.4f} s, {made[0]['plan_rss_bytes'] / 1e6:,.0f} MB")
        return line

    return rows(
        ["process to first batch s", "imports s", "after imports s", "RSS MB", *plans],
        grouped(runs, "first batch"),
        cells,
    )


def resume(runs: list[dict[str, Any]]) -> list[str]:
    lines: list[str] = []
    for fraction in ("50%", "90%"):
        before, after = grouped(runs, f"{fraction} before"), grouped(runs, f"{fraction} after")
        found = {loader: after.get(loader, results) for loader, results in before.items()}
        # The second half of a pair may not have been measured yet.
        found = {loader: results for loader, results in found.items() if loader in after or why_not(results)}

        def cells(loader: str, results: list[dict[str, Any]], before: Runs = before) -> list[str]:
            rest = results[0]["rest_bytes"]
            return [
                show(values(results, "resume_seconds"), 1, 3),
                show(values(results, "first_batch_disk_bytes"), 1e-6),
                show([value / rest for value in values(results, "disk_bytes")], 1, 2),
                show(values(before[loader], "state_bytes"), 1e-3),
                show(values(results, "lost"), 1, 0),
                show(values(results, "doubled"), 1, 0),
                show(values(results, "unknown"), 1, 0),
            ]

        header = [
            "load to first batch s", "disk MB to first batch", "disk bytes / bytes left", "state kB", "lost",
            "doubled", "wrong",
        ]  # fmt: skip
        lines += [f"Resume at {fraction}, files not in the page cache:", "", *rows(header, found, cells), ""]
    return lines[:-1]


def world_sizes(runs: list[dict[str, Any]]) -> list[str]:
    header = ["1", "2", "3", "4", "6", "8", "4-3-8"]

    def cell(result: dict[str, Any]) -> str:
        reason = why_not([result])
        if reason:
            return reason
        text = f"{result['identical']:.1%}"
        if "identical_to_4" in result:
            text += f" ({result['identical_to_4']:.1%} of the run at 4)"
        for name in ("lost", "doubled", "unknown"):
            if result[name]:
                text += f", {result[name]:,} {name}"
        return text

    lines = rows(
        [f"R={name}" for name in header],
        grouped(runs),
        lambda _, results: [cell(results[0][name]) if name in results[0] else "-" for name in header],
    )
    return ["Global batches of 24 with the samples of the run on one rank.", "", *lines]


def mixture(runs: list[dict[str, Any]]) -> list[str]:
    def again(result: dict[str, Any]) -> str:
        return why_not([result]) or f"{result['identical']:.1%} identical"

    return rows(
        ["max deviation, samples", "at the end", "of samples", "resume at 1 rank", "resume 2 to 3 ranks"],
        grouped(runs),
        lambda _, results: [
            f"{results[0]['max_deviation_samples']:,.1f}",
            f"{results[0]['final_deviation_samples']:,.1f}",
            f"{results[0]['samples']:,}",
            again(results[0]["resume"]),
            again(results[0]["resize"]),
        ],
    )


def remote(runs: list[dict[str, Any]]) -> list[str]:
    def cells(_: str, results: list[dict[str, Any]]) -> list[str]:
        result = results[0]
        fetched = (
            "directory" if not result["store_requests"] else f"{result['store_bytes'] / result['dataset_bytes']:.2f}"
        )
        return [
            f"{result['corrupt_samples']:,}",
            f"{result['samples']:,}",
            fetched,
            f"{result['cache_bytes'] / result['cache_limit_bytes']:.2f}",
            f"{result['stalls']} (longest {result['longest_wait_seconds']:.1f} s)",
            f"{result['starts']}",
            f"{result['silently_short_epochs']}",
            f"{result['wall_seconds']:.1f}",
            "; ".join(result["errors"]) or "none",
        ]

    header = [
        "corrupt samples",
        "samples",
        "bytes / dataset",
        "cache / limit",
        "waits > 2 s",
        "starts",
        "epochs cut short without an error",
        "s",
        "errors",
    ]
    return rows(header, grouped(runs), cells)


def quality(runs: list[dict[str, Any]]) -> list[str]:
    return rows(
        ["lag-1 correlation", "pair z", "shards in 256 samples", "of"],
        grouped(runs),
        lambda _, results: [
            f"{results[0]['lag1']:.4f}",
            f"{results[0]['pair_z']:,.1f}",
            f"{results[0]['shards_per_256']:.1f}",
            str(results[0]["shards"]),
        ],
    )


def packing(runs: list[dict[str, Any]]) -> list[str]:
    return rows(
        ["utilisation", "documents cut that fit a row", "lost tokens", "doubled tokens", "tokens that see others", "s"],
        grouped(runs),
        lambda _, results: [
            f"{results[0]['utilisation']:.2%}",
            f"{results[0]['cut_documents_that_fit']:,}",
            f"{results[0]['lost_tokens']:,} of {results[0]['tokens']:,}",
            f"{results[0]['doubled_tokens']:,}",
            f"{results[0]['leaking_token_fraction']:.1%}",
            f"{results[0]['wall_seconds']:.2f}",
        ],
    )


SECTIONS: dict[int, tuple[str, Callable[[list[dict[str, Any]]], list[str]]]] = {
    1: ("throughput, warm, shuffled, batches of 8 to int64 torch tensors", throughput),
    2: ("slow-down of a training step on one torch thread against tensors in memory", slowdown),
    3: ("start: first batch, and an order of N samples from metadata alone", start),
    4: ("resume", resume),
    5: ("numbers of ranks", world_sizes),
    6: ("mixture .7/.29/.01", mixture),
    7: ("a store at 50 MB/s with 2% of answers 503, one damaged shard, cache of a quarter", remote),
    8: ("quality of the shuffle", quality),
    9: ("documents of lognormal length in rows of 2,048", packing),
}
