"""README's numbers, from the newest rows of each device. benchmarks/tools/report.py writes them."""

from benchmarks.models import drop_in, memory
from benchmarks.tools import page

LABELS = {"stored": "stored activations", "checkpoint": "checkpointing", "freia": "FrEIA"}


def glow(rows: list[dict]) -> str:
    """Time over plain PyTorch's, one line per provider, of the newest size.

    All providers have the default coupling, except for normflows, which has the other one.
    """
    rows = [row for row in rows if row["size"] == rows[-1]["size"]]
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["provider"] != "plain" and (row["coupling"] == "soft_clamp" or row["provider"] == "normflows"):
            lines.setdefault(row["provider"], {})[row["mode"]] = f"{float(row['ratio']):.2f}"
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    body = [[provider, *(found.get(mode, "") for mode in modes)] for provider, found in lines.items()]
    return page.table([f"Glow {rows[0]['size']}: time over plain PyTorch's", *modes], body)


def grown(rows: list[dict]) -> str:
    """The peak memory that one more flow step per level adds, with the widest networks."""
    (side, batch, hidden), ways = max(memory.against("k", rows).items(), key=lambda found: found[0][2])
    mib = {way: memory.growth(points) for way, points in ways.items()}
    others = ", ".join(f"{LABELS.get(way, way)} {mib[way]:.2f}" for way in mib if way != "reversible")
    return (
        f"Glow with three levels, hidden {hidden}, batch {batch}, {side}x{side}: one more flow step per level adds\n"
        f"{mib['reversible']:.2f} MiB to the peak memory with reversible backprop, without weights and gradients.\n"
        f"Others: {others} MiB."
    )


def took(rows: list[dict]) -> str:
    """The time of the ways that :func:`grown` compares."""
    widest = max((row["hidden"] for row in rows), key=int)
    ratio = {row["way"]: float(row["ratio"]) for row in rows if row["hidden"] == widest}
    ways = [way for way in ratio if way not in ("stored", "reversible")]
    others = ", ".join(f"{LABELS.get(way, way)} {ratio[way]:.2f}" for way in ways)
    return (
        f"Forward and backward take {ratio['reversible']:.2f} times as long as with stored activations.\n"
        f"Others: {others}."
    )


def accelerated(device: str, rows: list[dict]) -> str:
    """How many times faster the flows of other libraries are, one line per flow of the newest benchmark."""
    lines: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
    for row in rows:
        if row["flow"] in {case.name for case in drop_in.CASES}:
            by_mode = lines.setdefault((row["library"], row["flow"]), {})
            by_mode.setdefault(row["mode"], {})[row["provider"]] = float(row["p50_ms"])
    body = [
        [
            LABELS.get(library, library),
            f"`fastflow.integrations.{library}.accelerate(flow)`",
            flow,
            *(f"{by_mode[mode]['before'] / by_mode[mode]['after']:.1f}" for mode in drop_in.MODES),
        ]
        for (library, flow), by_mode in lines.items()
    ]
    head = [
        "your flow is of",
        "the one line",
        "measured",
        *(f"{mode}, times faster" for mode in drop_in.MODES),
    ]
    return f"{page.table(head, body)}\n\n({device}; `python -m benchmarks.models.drop_in`)"


def text(device: str, files: dict[str, list[dict]]) -> str:
    parts = [
        f"Measured on {device}. Plain PyTorch is 1; above 1 is slower. No row is written where\n"
        "nflows or normflows is faster than this plain PyTorch, which would then be a straw man."
    ]
    if "glow" in files:
        parts.append(
            f"{glow(files['glow'])}\n\n"
            "(`python -m benchmarks.models.glow`. normflows has another coupling; its time is divided by the\n"
            "time of a plain PyTorch Glow with that coupling.)"
        )
    if {"memory", "memory_time"} <= files.keys():
        parts.append(
            f"{grown(files['memory'])}\n{took(files['memory_time'])}\n(`python -m benchmarks.models.memory`)"
        )
    return "\n\n".join(parts)
