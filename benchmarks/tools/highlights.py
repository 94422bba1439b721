"""README's numbers, from the newest rows of each device; benchmarks/tools/report.py writes them."""

from benchmarks.models import memory
from benchmarks.tools import page


def glow(rows: list[dict]) -> str:
    """Time over plain PyTorch's, a line a provider: of the last size and the default coupling, and normflows with the other."""
    rows = [row for row in rows if row["size"] == rows[-1]["size"]]
    lines: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["provider"] != "plain" and (row["coupling"] == "soft_clamp" or row["provider"] == "normflows"):
            lines.setdefault(row["provider"], {})[row["mode"]] = f"{float(row['ratio']):.2f}"
    modes = list(dict.fromkeys(row["mode"] for row in rows))
    body = [[provider, *(found.get(mode, "") for mode in modes)] for provider, found in lines.items()]
    return page.table([f"Glow {rows[0]['size']}: time over plain PyTorch's", *modes], body)


def grown(rows: list[dict]) -> str:
    """What a step more at each level adds to the peak, with the widest networks."""
    (side, batch, hidden), ways = max(memory.against("k", rows).items(), key=lambda found: found[0][2])
    mib = {way: memory.growth(points) for way, points in ways.items()}
    others = ", ".join(f"{way} {mib[way]:.2f}" for way in mib if way != "reversible")
    size, ours = f"hidden {hidden}, batch {batch}, {side}x{side}", mib["reversible"]
    return f"Reversible backprop: a step of flow more at each of three levels ({size}) adds {ours:.2f} MiB to the peak ({others})"


def took(rows: list[dict]) -> str:
    """The time of the ways whose memory that is."""
    widest = max((row["hidden"] for row in rows), key=int)
    ratio = {row["way"]: float(row["ratio"]) for row in rows if row["hidden"] == widest}
    others = ", ".join(f"{way} {ratio[way]:.2f}" for way in ratio if way not in ("stored", "reversible"))
    return f"and forward and backward take {ratio['reversible']:.2f} times as long as with stored activations ({others})"


def text(device: str, files: dict[str, list[dict]]) -> str:
    parts = [
        f"On {device}. 1 is plain PyTorch, which is no slower than nflows and normflows in the same run; above 1 is slower."
    ]
    if "glow" in files:
        parts.append(
            f"{glow(files['glow'])}\n\n(`python -m benchmarks.models.glow`; normflows beside plain PyTorch with the coupling that it has)"
        )
    if {"memory", "memory_time"} <= files.keys():
        parts.append(
            f"{grown(files['memory'])}, {took(files['memory_time'])}: `python -m benchmarks.models.memory`."
        )
    return "\n\n".join(parts)
