"""What the rows say of the time and memory of attribution, hooks and deltas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

from benchmarks.verdicts.parts import Part, Row, part

OURS, BARE = "register_neuron_hooks", "no hooks"
# Of the model and batch that the claim names: 4 layers of 2048 neurons, 4 x 128 tokens, float32.
BYTES_OF_SUMS = 4 * 2048 * 4
BYTES_OF_ACTIVATIONS = BYTES_OF_SUMS * 4 * 128


def attribution(rows: Sequence[Row]) -> Iterator[Part]:
    """Error and best time of packed attribution, and what hooks add on the same model."""
    errors = [row["relative_error"] for row in rows if row.get("method") == "packed"]
    claim = "largest relative error of packed attribution, beside one pass per prefix"
    yield part(claim, max(errors, default=None), "at most", 1e-5)

    def best(method: str, share: float) -> float | None:
        seconds = [row["seconds"] for row in rows if (row.get("method"), row.get("scored_share")) == (method, share)]
        return min(seconds, default=None)

    for share, bar in ((1.0, 15), (0.25, 30)):
        packed, prefix, layerwise = (best(method, share) for method in ("packed", "prefix", "layerwise"))
        known = None not in (packed, prefix, layerwise)
        faster = prefix / packed if known else None
        yield part(f"times faster than one pass per prefix, {share:.0%} scored", faster, "at least", bar)
        slower = packed / layerwise if known else None
        yield part(f"time over that of the layerwise approximation, {share:.0%} scored", slower, "at most", 1.1)
    yield from added_time([row for row in rows if "variant" in row])


def added_time(rows: Sequence[Row]) -> Iterator[Part]:
    """The median time of a pass with hooks over its neighbor without, in each setting."""
    found = [row for row in rows if row["variant"] == OURS]
    for row in found:
        where = f"{row['parameters']} weights, allocator: {row['allocator']}"
        yield part(f"time over a pass without hooks, {where}", row["ratio"]["median"], "at most", 1.05)
    if not found:
        yield part("time over a pass without hooks", None, "at most", 1.05)


def attribution_budget(rows: Sequence[Row]) -> Iterator[Part]:
    """What half a pass per layer names and costs beside ten midpoints, and two passes beside gradient x activation."""

    def of(way: str, key: str) -> float | None:
        found = [row[key] for row in rows if row["way"] == way]
        return mean(found) if found else None

    full, small, midpoints = "budget 16", "budget 2", "midpoint 10, before"
    one_step = "gradient x activation, predicting"
    claim = "share of the top 10 % of each layer that half a pass per layer names"
    yield part(claim, of(full, "layer"), "at least", 0.9)
    times = of(midpoints, "seconds"), of(full, "seconds")
    ratio = None if None in times else times[0] / times[1]
    yield part(
        "processor time of ten midpoints, layer by layer, over that of half a pass per layer", ratio, "at least", 5
    )
    claim = "the same share by two passes, beside that of gradient x activation"
    yield part(claim, of(small, "layer"), "more than", of(one_step, "layer"))


def attribution_quality(rows: Sequence[Row]) -> Iterator[Part]:
    """What one midpoint names and finds where it is known which neurons count, beside ten and gradient x activation."""

    def of(where: str, way: str, key: str) -> float | None:
        found = [row[key] for row in rows if (row["where"], row["way"]) == (where, way)]
        return mean(found) if found else None

    for where in ("planted", "demo"):
        claim = f"share of the top 10 % of each layer that one midpoint names, {where}"
        yield part(claim, of(where, "one midpoint", "layer"), "at least", 0.9)
    ten = of("planted", "midpoint 10", "auc_contrast")
    claim = "AUC of planted columns by the contrast of one midpoint, beside that of ten"
    yield part(claim, of("planted", "one midpoint", "auc_contrast"), "at least", None if ten is None else ten - 0.01)
    claim = "AUC of planted columns by one midpoint, beside gradient x activation"
    one_step = of("planted", "gradient x activation", "auc")
    yield part(claim, of("planted", "one midpoint", "auc_contrast"), "more than", one_step)


def hooks(rows: Sequence[Row]) -> Iterator[Part]:
    """What hooks add to the time of a pass, and to what is held between its two halves."""
    yield from added_time(rows)
    for parameters, needed in (("trained", BYTES_OF_SUMS), ("frozen", BYTES_OF_SUMS + BYTES_OF_ACTIVATIONS)):
        held = {
            name: [row["held_bytes"] for row in rows if (row["variant"], row["parameters"]) == (name, parameters)]
            for name in (OURS, BARE)
        }
        more = max(held[OURS]) - min(held[BARE]) if held[OURS] and held[BARE] else None
        yield part(f"bytes held beside a pass without hooks, {parameters} weights", more, "at most", needed)


def deltas(rows: Sequence[Row]) -> Iterator[Part]:
    """What deltas hold, what they train and how long a pass takes."""
    for mode in ("train", "eval"):
        held = {row["layer"]: row["bytes"] for row in rows if row["what"] == "held" and row["mode"] == mode}
        known = {"with deltas", "bitsandbytes"} <= held.keys()
        ratio = held["with deltas"] / held["bitsandbytes"] if known else None
        yield part(f"bytes held over those of bitsandbytes' own layers, {mode} mode", ratio, "at most", 0.25)
    trained = [row for row in rows if row["what"] == "trained"]
    for name in ("gradient_over_columns", "state_over_two_columns"):
        claim = f"largest {name.replace('_', ' ')} of the selected neurons"
        yield part(claim, max((row[name] for row in trained), default=None), "at most", 1)
    times = [row["ratio"] for row in rows if row["what"] == "time" and row["fraction"] == 0.05]
    claim = "time of a pass over one with a masked dense gradient, 5 % of the neurons"
    yield part(claim, max(times, default=None), "at most", 0.9)
